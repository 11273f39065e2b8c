"""What this kernel's overlay file system can do, found out by trying; overlayfs in the kernel's
documentation.
"""

import contextlib
import errno
import os
from functools import cache

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.mounts import FSCONFIG_SET_STRING, FSOPEN_CLOEXEC


@cache
def appends_layers() -> bool:
    """Whether lower layers can be given one by one ("lowerdir+", Linux 6.8), so that their number
    and the length of their paths are not bounded by one page of options.

    OSError if there is no overlay file system, or this process may not mount one.
    """
    with OwnedFd(syscall.call("fsopen", b"overlay", FSOPEN_CLOEXEC)) as context:
        # Kernels before 6.5 take any option here and refuse it later.
        return not _takes(context, b"bulkhead-no-such-option") and _takes(context, b"lowerdir+")


def forget_volatile(work: str) -> None:
    """Let `work` be mounted again after a mount with the option "volatile".

    The kernel refuses that as long as its mark is there, since it cannot know whether the machine
    has crashed meanwhile; the caller does.
    """
    mark = f"{work}/work/incompat/volatile"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{mark}/dirty")
        os.rmdir(mark)


def _takes(context: OwnedFd, option: bytes) -> bool:
    try:
        syscall.call("fsconfig", int(context), FSCONFIG_SET_STRING, option, b"/", 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
