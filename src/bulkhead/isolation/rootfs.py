"""The root of a container: overlay or directory, and the change into it."""

import errno
import os
from collections.abc import Sequence
from typing import TypeVar

from bulkhead.errors import Unsupported
from bulkhead.linux import mounts as kernel
from bulkhead.linux.program import Argument, Fd, Program, Slot

OVERLAY_OPTIONS = (("redirect_dir", "nofollow"), ("metacopy", "off"))
"""An image must not decide where a directory's or a file's content comes from."""
OVERLAY_STEP = "mount overlay on /"
_PAGE = 4096
A = TypeVar("A")


def plan_private(program: Program, *, slave: bool) -> None:
    """Cut the child's mounts off from the host's; as slaves if a bind wants to see later mounts."""
    kind = kernel.MS_SLAVE if slave else kernel.MS_PRIVATE
    name = "slaves of the host's" if slave else "private"
    program.call(f"make mounts {name}", "mount", None, "/", None, kernel.MS_REC | kind, None)


def plan_overlay(
    program: Program,
    lowers: Sequence[Argument],
    upper: Argument | None,
    work: Argument | None,
    *,
    appends: bool,
) -> Slot:
    """The layers `lowers` (topmost first) under a writable `upper`, over the host's root.

    Without `upper` it is read-only (two layers at least). `appends`: the kernel takes the layers
    one by one; else their descriptors' numbers make an option string that fits in a page.
    The slot is a descriptor of the root.
    """
    if not appends:
        return _plan_overlay_string(program, lowers, upper, work)
    context = program.call(OVERLAY_STEP, "fsopen", "overlay", kernel.FSOPEN_CLOEXEC)
    for name, value in _pairs(lowers, upper, work):
        if isinstance(value, Fd):
            program.call(
                OVERLAY_STEP, "fsconfig", context, kernel.FSCONFIG_SET_FD, name, None, value
            )
        else:
            program.call(
                OVERLAY_STEP, "fsconfig", context, kernel.FSCONFIG_SET_STRING, name, value, 0
            )
    program.call(OVERLAY_STEP, "fsconfig", context, kernel.FSCONFIG_CMD_CREATE, None, None, 0)
    root = program.call(OVERLAY_STEP, "fsmount", context, kernel.FSMOUNT_CLOEXEC, 0)
    plan_cover(program, root)
    return root


def overlay_options(
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
) -> list[str | tuple[str, str | int]]:
    """The same overlay as options for `linux.mounts.new_filesystem`."""
    return [*_pairs(lowers, upper, work)]


def _pairs(lowers: Sequence[A], upper: A | None, work: A | None) -> list[tuple[str, A | str]]:
    pairs: list[tuple[str, A | str]] = [("source", "overlay")]
    pairs += [("lowerdir+", lower) for lower in lowers]
    if upper is not None and work is not None:
        pairs += [("upperdir", upper), ("workdir", work)]
    return [*pairs, *OVERLAY_OPTIONS]


_FIRST_FD = 512
"""Where layers' descriptors are put, so that their names are known when the plan is made."""


def _plan_overlay_string(
    program: Program,
    lowers: Sequence[Argument],
    upper: Argument | None,
    work: Argument | None,
) -> Slot:
    """For kernels before 6.8: mount(2) with "lowerdir=512:513:…" relative to /proc/self/fd."""
    given = [*lowers] + ([upper, work] if upper is not None else [])
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    for position, path in enumerate(given):
        fd = program.call(OVERLAY_STEP, "openat", kernel.AT_FDCWD, path, flags, 0)
        program.call(OVERLAY_STEP, "dup3", fd, _FIRST_FD + position, os.O_CLOEXEC)
        program.call(OVERLAY_STEP, "close", fd)
    names = [str(_FIRST_FD + position) for position in range(len(given))]
    options = ["lowerdir=" + ":".join(names[: len(lowers)])]
    if upper is not None:
        options += [f"upperdir={names[-2]}", f"workdir={names[-1]}"]
    options += [f"{name}={value}" for name, value in OVERLAY_OPTIONS]
    text = ",".join(options)
    if len(text) >= _PAGE:
        raise Unsupported(
            f"{len(lowers)} layers are more than this kernel's overlay takes (Linux 6.8 does)"
        )
    program.call(OVERLAY_STEP, "chdir", "/proc/self/fd")
    program.call(OVERLAY_STEP, "mount", "overlay", "/", "overlay", 0, text)
    # ".." of the root directory leads to what is mounted over it.
    return program.call(OVERLAY_STEP, "openat", kernel.AT_FDCWD, "/..", flags, 0)


def plan_directory(program: Program, path: Argument) -> Slot:
    """An existing directory (with what is mounted below it) over the host's root."""
    step = "bind the root directory"
    flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC | kernel.AT_RECURSIVE
    root = program.call(step, "open_tree", kernel.AT_FDCWD, path, flags)
    plan_cover(program, root)
    return root


def plan_cover(program: Program, root: Argument) -> None:
    """Attach the detached `root` over the host's root, where pivot_root(2) finds it.

    Absolute paths still mean the host's files until the pivot.
    """
    flags = kernel.MOVE_MOUNT_F_EMPTY_PATH
    program.call("attach the root", "move_mount", root, "", kernel.AT_FDCWD, "/", flags)


def plan_pivot(
    program: Program, root: Argument, *, readonly: bool, propagation: int = 0, pivot: bool = True
) -> None:
    """Make `root` the root directory and let go of the host's; pivot_root(2).

    Without `pivot` the host's files stay below what covers them; whoever may mount could uncover
    them, so the host's proc and sysfs, whose copies would be a way around masks, go first.
    """
    if readonly:
        _plan_attributes(program, "make / read-only", root, kernel.ATTR_RDONLY, 0)
    program.call("enter the root", "fchdir", root)
    if pivot:
        program.call("pivot the root", "pivot_root", ".", ".")
        program.call("let go of the host's files", "umount2", ".", kernel.MNT_DETACH)
    else:
        for path in ("/proc", "/sys"):
            step = f"let go of the host's {path}"
            program.call(step, "umount2", path, kernel.MNT_DETACH, ok=(errno.EINVAL, errno.ENOENT))
        program.call("enter the root", "chroot", ".")
    if propagation:  # now: pivot_root(2) takes no shared mount
        _plan_attributes(program, "set the propagation of /", root, 0, propagation)


def _plan_attributes(
    program: Program, step: str, root: Argument, attributes: int, propagation: int
) -> None:
    data = kernel.mount_attr(attributes, 0, propagation)
    flags = kernel.AT_EMPTY_PATH
    program.call(step, "mount_setattr", root, "", flags, data, kernel.ATTR_SIZE)
