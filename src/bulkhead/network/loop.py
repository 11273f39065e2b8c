"""A small event loop over epoll(7): descriptors with handlers, timers. No asyncio, for its size."""

import heapq
import select
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
Handler = Callable[[int], None]


class Timer:
    """A call to come; `cancel` forgets it."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None] | None) -> None:
        self.due = due
        self.call = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None

    def __lt__(self, other: "Timer") -> bool:
        return self.due < other.due


class Loop:
    """Runs handlers until `stop`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._running = False

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` when `fd` is ready; a second call changes events and handler."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch `fd` no more; call it before closing."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, after that many seconds."""
        timer = Timer(time.monotonic() + seconds, call)
        heapq.heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        """Return from `run` after the present handlers."""
        self._running = False

    def run(self) -> None:
        """Serve until stopped."""
        self._running = True
        while self._running:
            self.once()

    def once(self) -> None:
        """Wait for one round of events and timers, and handle it."""
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        wait = -1.0
        if self._timers:
            wait = max(0.0, self._timers[0].due - time.monotonic())
        for fd, events in self._epoll.poll(wait):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            call = heapq.heappop(self._timers).call
            if call is not None:
                call()

    def close(self) -> None:
        """Close the epoll descriptor; what was watched stays open."""
        self._epoll.close()
