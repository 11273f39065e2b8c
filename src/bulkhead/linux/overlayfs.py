"""What this kernel's overlay file system can do, found out by trying; overlayfs in the kernel's
documentation.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from functools import cache

from bulkhead.linux import mounts, syscall
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


def detached(
    lowers: Sequence[str],
    options: Sequence[tuple[str, str]] = (),
    *,
    upper: str = "",
    work: str = "",
    attributes: int = 0,
) -> OwnedFd:
    """A detached mount of the layers (topmost first), writable with `upper` and `work`.

    Kernels before 6.8 take some 200 layers: E2BIG for more.
    """
    above = [("upperdir", upper), ("workdir", work)] if upper else []
    if appends_layers():
        pairs = [("source", "overlay"), *(("lowerdir+", lower) for lower in lowers)]
        return mounts.new_filesystem("overlay", [*pairs, *above, *options], attributes)
    with contextlib.ExitStack() as undo:

        def short(path: str) -> str:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            return f"/proc/self/fd/{undo.enter_context(OwnedFd(fd)).fileno()}"

        words = ["lowerdir=" + ":".join(map(short, lowers))]
        words += [f"{name}={short(path)}" for name, path in above]
        words += [f"{name}={value}" for name, value in options]
        text = ",".join(words)
        if len(text) >= _PAGE:
            raise OSError(errno.E2BIG, f"{len(lowers)} layers are more than this kernel takes")
        from tempfile import (
            mkdtemp,
        )  # imports are most of a runtime's time

        place = mkdtemp(prefix="bulkhead-overlay-")
        undo.callback(os.rmdir, place)
        mounts.mount("overlay", place, "overlay", 0, text)
        undo.callback(mounts.unmount, place, mounts.MNT_DETACH)
        root = mounts.clone_tree(place)
        if attributes:
            mounts.set_attributes(int(root), set_=attributes)
        return root


_PAGE = 4096
"""What mount(2) takes of options."""


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
