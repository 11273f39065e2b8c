"""The keeper's event loop: epoll and timers. Imported by the keeper process: few imports."""

import select
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
ENDED = select.EPOLLHUP | select.EPOLLERR


class Loop:
    """epoll and timers. Callbacks are per descriptor; the last registration wins."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> bool:
        """Call `handler(events)`; mask 0 ends it. False for what epoll cannot watch: files."""
        known = self._masks.get(fd)
        if not mask:
            if known is not None:
                self.unwatch(fd)
            return True
        self._handlers[fd] = handler
        if known == mask:
            return True
        try:
            if known is None:
                self._epoll.register(fd, mask)
            else:
                self._epoll.modify(fd, mask)
        except PermissionError:
            del self._handlers[fd]
            return False
        self._masks[fd] = mask
        return True

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; before it is closed."""
        if self._masks.pop(fd, None) is not None:
            del self._handlers[fd]
            self._epoll.unregister(fd)

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once, later."""
        self._timers.append((time.monotonic() + delay_s, callback))

    def run_once(self) -> None:
        """Wait for something and handle it."""
        timeout = -1.0
        if self._timers:
            timeout = max(0.0, min(t for t, _ in self._timers) - time.monotonic())
        for fd, events in self._epoll.poll(timeout, 64):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        if self._timers:
            now = time.monotonic()
            due = [timer for timer in self._timers if timer[0] <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for _, callback in due:
                callback()
