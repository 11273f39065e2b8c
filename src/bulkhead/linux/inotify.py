"""File change notification. See inotify(7)."""

import os

from bulkhead.linux import syscall

CLOSE_WRITE = 0x00000008
MOVED_TO = 0x00000080
MOVED_FROM = 0x00000040
DELETE = 0x00000200


def create() -> int:
    """A new non-blocking, close-on-exec descriptor; OSError(EMFILE) at the user's limit."""
    return syscall.call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)


def watch(fd: int, path: str, mask: int) -> int:
    """Watch `path` (not what is below its directories) for `mask`; the watch's number."""
    return syscall.call("inotify_add_watch", fd, os.fsencode(path), mask)
