"""openat2(2): opening below a directory without leaving it."""

import os
import struct

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

NO_XDEV = 0x01
NO_MAGICLINKS = 0x02
NO_SYMLINKS = 0x04
BENEATH = 0x08
IN_ROOT = 0x10

_OPEN_HOW = struct.Struct("=QQQ")


def open_how(flags: int, resolve: int, mode: int = 0) -> bytes:
    """struct open_how; the kernel wants `mode` 0 unless a file may be created."""
    return _OPEN_HOW.pack(flags, mode, resolve)


HOW_SIZE = _OPEN_HOW.size


def openat2(dirfd: int, path: str, flags: int, resolve: int, mode: int = 0) -> OwnedFd:
    """Open `path` from `dirfd` under the rules of `resolve`; close-on-exec always.

    OSError: EXDEV or ELOOP where a rule is broken, EAGAIN where a rename raced (retried here).
    """
    how = open_how(flags | os.O_CLOEXEC, resolve, mode)
    for attempt in range(64):
        try:
            return OwnedFd(syscall.call("openat2", dirfd, os.fsencode(path), how, HOW_SIZE))
        except BlockingIOError:
            if attempt == 63:
                raise
    raise AssertionError("unreachable")
