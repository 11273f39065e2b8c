"""Owned file descriptors."""

import os
import select
from types import TracebackType
from typing import Self


class OwnedFd:
    """A file descriptor with one owner, closed exactly once; `int(fd)` or `.fileno()` lends it.

    `take()` hands the ownership on. Dropping the last reference closes it too, as a safety net.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number, still owned by this object; ValueError once closed or taken."""
        if self._fd < 0:
            raise ValueError("file descriptor is closed or was taken")
        return self._fd

    __int__ = fileno
    __index__ = fileno

    @property
    def closed(self) -> bool:
        """Whether this object owns nothing any more."""
        return self._fd < 0

    def take(self) -> int:
        """Give the number and its ownership to the caller."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def duplicate(self) -> "OwnedFd":
        """A second descriptor of the same open file, close-on-exec."""
        return OwnedFd(os.dup(self.fileno()))

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"


def readable(fd: int, timeout_s: float | None = None) -> bool:
    """Whether there is something to read, or an end, within that time; None: for ever.

    By poll(2): select(2) has no descriptors above 1023, which an engine comes to.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
