"""One thread that clears away, in order, what nobody waits for.

Handing work over costs a lock and, for many pieces of work done in a row, one wake-up of the loop.
What may take long (large trees, control groups with survivors) belongs into `Engine.blocking`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

_Work = Callable[[], object]
_Item = tuple[_Work, "asyncio.Future[None]"]


class Janitor:
    """The thread; begun at its first piece of work. Methods are for the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str = "janitor") -> None:
        self._loop = loop
        self._name = name
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._done: deque[tuple[asyncio.Future[None], BaseException | None]] = deque()
        self._told = False
        self._thread: threading.Thread | None = None

    def submit(self, work: _Work) -> "asyncio.Future[None]":
        """Do `work` after what was submitted before; the future ends when it is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name)
            self._thread.start()
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
            self._settle()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            work, future = item
            failure: BaseException | None = None
            try:
                work()
            except BaseException as error:
                failure = error
            self._done.append((future, failure))
            if not self._told:
                self._told = True
                self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        self._told = False  # before looking: what comes later tells again
        while self._done:
            future, failure = self._done.popleft()
            if future.done():
                continue
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)
