"""What a container's /dev holds: device nodes and symbolic links."""

import errno
import os
import stat
from collections.abc import Sequence

from bulkhead.linux import mounts as kernel
from bulkhead.linux.program import Argument, Program, Slot
from bulkhead.linux.tree import Tree
from bulkhead.oci.runtime import Device

DEFAULT: tuple[tuple[str, int, int], ...] = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
"""Made in every container, mode 0666."""

LINKS: tuple[tuple[str, str], ...] = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
)
"""(name, target)."""

_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def plan_default(program: Program, dev: Slot, *, bind: bool, skip: Sequence[str] = ()) -> None:
    """The default nodes and links in `dev`, a tmpfs of ours.

    `bind`: the child may not make device nodes (user namespace), so the host's are bound.
    `skip`: names the configuration makes itself.
    """
    if bind:
        program.call("enter /dev", "fchdir", dev)
    for name, major, minor in DEFAULT:
        if name in skip:
            continue
        step = f"make /dev/{name}"
        if bind:
            program.call(step, "mknodat", dev, name, stat.S_IFREG | 0o666, 0)
            program.call(step, "mount", f"/dev/{name}", name, None, kernel.MS_BIND, None)
        else:
            device = os.makedev(major, minor)
            program.call(step, "mknodat", dev, name, stat.S_IFCHR | 0o666, device)
    for name, target in LINKS:
        program.call(f"link /dev/{name}", "symlinkat", target, dev, name, ok=(errno.EEXIST,))


def plan_device(tree: Tree, device: Device, *, bind: bool) -> None:
    """One device of the configuration at its path, with its mode and owner."""
    program = tree.program
    step = f"make {device.path}"
    own = tree.own(device.path)
    base: Argument
    if own is not None and own[1]:
        base, name = own
        parts = name.split("/")
        for depth in range(1, len(parts)):
            prefix = "/".join(parts[:depth])
            program.call(step, "mkdirat", base, prefix, 0o755, ok=(errno.EEXIST,))
    else:
        base = tree.make_parents(step, device.path)
        name = device.path.rpartition("/")[2]
    mode = (0o666 if device.file_mode is None else device.file_mode) & 0o7777
    if bind and device.type_ != "p":
        program.call(step, "mknodat", base, name, stat.S_IFREG | mode, 0, ok=(errno.EEXIST,))
        program.call(step, "fchdir", base)
        program.call(step, "mount", device.path, name, None, kernel.MS_BIND, None)
        return
    number = 0 if device.type_ == "p" else os.makedev(device.major, device.minor)
    made = program.call(
        step, "mknodat", base, name, _TYPES[device.type_] | mode, number, ok=(errno.EEXIST,)
    )
    if device.uid or device.gid:
        with program.when(made):
            _own(program, step, base, name, device)


def _own(program: Program, step: str, base: Argument, name: str, device: Device) -> None:
    program.call(
        step, "fchownat", base, name, device.uid or 0, device.gid or 0, kernel.AT_SYMLINK_NOFOLLOW
    )
