"""Namespaces: flags, entering, leaving, comparing. See namespaces(7)."""

import os
from functools import cache

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

NEWTIME = 0x00000080
NEWNS = 0x00020000
NEWCGROUP = 0x02000000
NEWUTS = 0x04000000
NEWIPC = 0x08000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000

FLAGS: dict[str, int] = {
    "user": NEWUSER,
    "mount": NEWNS,
    "pid": NEWPID,
    "network": NEWNET,
    "uts": NEWUTS,
    "ipc": NEWIPC,
    "cgroup": NEWCGROUP,
    "time": NEWTIME,
}
"""By the runtime specification's names."""

PROC_NAMES: dict[str, str] = {
    "user": "user",
    "mount": "mnt",
    "pid": "pid",
    "network": "net",
    "uts": "uts",
    "ipc": "ipc",
    "cgroup": "cgroup",
    "time": "time",
}
"""The names below /proc/PID/ns."""


@cache
def supported() -> frozenset[str]:
    """The kinds of namespaces that this kernel was built with, by the specification's names."""
    return frozenset(
        kind for kind, name in PROC_NAMES.items() if os.path.exists(f"/proc/self/ns/{name}")
    )


def setns(fd: int, flags: int) -> None:
    """Move the calling thread into the namespace of `fd` (or those of a pidfd); setns(2)."""
    syscall.call("setns", fd, flags)


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces; unshare(2)."""
    syscall.call("unshare", flags)


def open_namespace(path: str) -> OwnedFd:
    """A descriptor of the namespace at `path`, e.g. /proc/1/ns/net or a bind mount of one."""
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def identity(pid: "int | str", kind: str) -> tuple[int, int]:
    """(device, inode) of a process's namespace: equal means the same namespace."""
    status = os.stat(f"/proc/{pid}/ns/{PROC_NAMES[kind]}")
    return status.st_dev, status.st_ino
