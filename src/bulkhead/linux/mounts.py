"""Mounting by descriptors: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2),
mount_setattr(2), with their constants. Errors are OSError with the kernel's errno.
"""

import os
import struct
from collections.abc import Iterable

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_EMPTY_PATH = 0x40

ATTR_RDONLY = 0x01
ATTR_NOSUID = 0x02
ATTR_NODEV = 0x04
ATTR_NOEXEC = 0x08
ATTR_ATIME = 0x70
"""The mask of the access time modes, to clear before one is set."""
ATTR_RELATIME = 0x00
ATTR_NOATIME = 0x10
ATTR_STRICTATIME = 0x20
ATTR_NODIRATIME = 0x80
ATTR_IDMAP = 0x100000
ATTR_NOSYMFOLLOW = 0x200000

MS_RDONLY = 0x01
MS_NOSUID = 0x02
MS_NODEV = 0x04
MS_NOEXEC = 0x08
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_DETACH = 2

PROC_MAGIC = 0x9FA0
SYSFS_MAGIC = 0x62656572
DEVPTS_MAGIC = 0x1CD1
TMPFS_MAGIC = 0x01021994
OVERLAYFS_MAGIC = 0x794C7630
CGROUP_MAGIC = 0x27E0EB
CGROUP2_MAGIC = 0x63677270

_MOUNT_ATTR = struct.Struct("=QQQQ")
ATTR_SIZE = _MOUNT_ATTR.size


def mount_attr(set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0) -> bytes:
    """struct mount_attr."""
    return _MOUNT_ATTR.pack(set_, clear, propagation, userns_fd)


def new_filesystem(
    fstype: str, options: Iterable["str | tuple[str, str | int]"] = (), attributes: int = 0
) -> OwnedFd:
    """A new, detached mount of `fstype`; closing the descriptor unmounts it unless it was attached.

    An option is a flag, a (name, text) pair, or a (name, descriptor) pair.
    """
    with OwnedFd(syscall.call("fsopen", os.fsencode(fstype), FSOPEN_CLOEXEC)) as context:
        for option in options:
            _configure(context, option)
        syscall.call("fsconfig", int(context), FSCONFIG_CMD_CREATE, None, None, 0)
        return OwnedFd(syscall.call("fsmount", int(context), FSMOUNT_CLOEXEC, attributes))


def _configure(context: OwnedFd, option: "str | tuple[str, str | int]") -> None:
    if isinstance(option, str):
        syscall.call("fsconfig", int(context), FSCONFIG_SET_FLAG, option.encode(), None, 0)
        return
    name, value = option
    if isinstance(value, int):
        syscall.call("fsconfig", int(context), FSCONFIG_SET_FD, name.encode(), None, value)
    else:
        syscall.call(
            "fsconfig", int(context), FSCONFIG_SET_STRING, name.encode(), os.fsencode(value), 0
        )


def clone_tree(path: str, *, dirfd: int = AT_FDCWD, recursive: bool = False) -> OwnedFd:
    """A detached bind mount of `path` (an empty one: of `dirfd` itself)."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    flags |= AT_RECURSIVE if recursive else 0
    flags |= 0 if path else AT_EMPTY_PATH
    return OwnedFd(syscall.call("open_tree", dirfd, os.fsencode(path), flags))


def set_attributes(
    fd: int,
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    recursive: bool = False,
) -> None:
    """Change the mount that `fd` is of, and with `recursive` all below it."""
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    attributes = mount_attr(set_, clear, propagation, userns_fd)
    syscall.call("mount_setattr", fd, b"", flags, attributes, ATTR_SIZE)


def attach(fd: int, target: str, *, dirfd: int = AT_FDCWD) -> None:
    """Attach the detached mount `fd` at `target`; a symbolic link at its end is not followed."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    syscall.call("move_mount", fd, b"", dirfd, os.fsencode(target), flags)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    syscall.call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(fstype),
        flags,
        os.fsencode(data),
    )


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    syscall.call("umount2", os.fsencode(target), flags)
