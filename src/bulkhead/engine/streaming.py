"""Long work in threads whose progress goes to a client as items."""

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from bulkhead.engine.calls import Call
from bulkhead.errors import Unavailable

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_T = TypeVar("_T")
_AHEAD = 256
"""Progress messages that may wait for a slow client before the work waits too."""


class Canceled(Unavailable):
    """The client left; raised in the working thread at its next message."""


async def with_progress(
    engine: "Engine", call: Call, work: Callable[[Callable[[dict[str, Any]], None]], _T]
) -> _T:
    """Run `work(progress)` in a thread; what it reports becomes items.

    When the client cancels, the next report raises in the thread, which undoes what it began; this
    coroutine waits for that.
    """
    loop = engine.loop
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    room = threading.Semaphore(_AHEAD)
    stop = threading.Event()

    def progress(message: dict[str, Any]) -> None:
        while not room.acquire(timeout=0.5):
            if stop.is_set():
                break
        if stop.is_set():
            raise Canceled("canceled by the client")
        loop.call_soon_threadsafe(queue.put_nowait, message)

    def run() -> _T:
        try:
            return work(progress)
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    future = loop.run_in_executor(engine.pool, run)
    try:
        while (message := await queue.get()) is not None:
            room.release()
            await call.item(message)
        return await future
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([future])
        raise
