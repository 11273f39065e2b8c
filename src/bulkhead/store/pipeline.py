"""Threads that hand pieces of a stream to one another through bounded channels."""

import threading
from collections import deque
from collections.abc import Callable, Iterator

_DEPTH = 8 << 20


class Cancelled(Exception):
    """The other side of a channel has failed; the real error is kept by the `Crew`."""


class Channel:
    """A queue of byte pieces between two threads, bounded by the bytes it holds."""

    def __init__(self, depth: int = _DEPTH) -> None:
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._depth = depth
        self._closed = self._cancelled = False
        self._changed = threading.Condition()

    def put(self, piece: bytes) -> None:
        """Add a piece, waiting while the channel is full; Cancelled if it was cancelled."""
        with self._changed:
            while self._held >= self._depth and not self._cancelled:
                self._changed.wait()
            if self._cancelled:
                raise Cancelled
            self._pieces.append(piece)
            self._held += len(piece)
            self._changed.notify_all()

    def close(self) -> None:
        """No more pieces will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake both sides with Cancelled."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._pieces and not self._closed and not self._cancelled:
                    self._changed.wait()
                if self._cancelled:
                    raise Cancelled
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._held -= len(piece)
                self._changed.notify_all()
            yield piece


class Crew:
    """Threads that share a fate: the first to fail cancels every channel.

    Leaving the `with` block joins all of them and raises the first failure.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._channels: list[Channel] = []
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def channel(self) -> Channel:
        """A channel that is cancelled when any member fails."""
        channel = Channel()
        self._channels.append(channel)
        return channel

    def spare(self, channel: Channel) -> None:
        """Close `channel` and let its reader finish what is in it, whatever fails now."""
        self._channels.remove(channel)
        channel.close()

    def fail(self, error: BaseException) -> None:
        """Remember the first real error and stop everyone."""
        with self._lock:
            if self._failure is None and not isinstance(error, Cancelled):
                self._failure = error
        for channel in tuple(self._channels):
            channel.cancel()

    def start(self, work: Callable[[], None], name: str) -> None:
        """Run `work` in a thread of its own."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.fail(error)

        thread = threading.Thread(target=run, name=f"bulkhead-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(error)
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
