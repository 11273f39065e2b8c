"""Namespaces of a container: which are born with the child, which are joined, which come later."""

import os
from collections.abc import Mapping
from typing import Literal

from bulkhead.errors import Invalid
from bulkhead.linux import namespaces as kernel
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Argument, Fd, Program
from bulkhead.oci.runtime import Linux, TimeOffset

_BORN = ("user", "mount", "pid", "network", "uts", "ipc")
"""New ones that clone3(2) makes. The cgroup namespace must wait until the child is in its cgroup;
the time namespace until its offsets are written.
"""
_IN_USER = ("mount", "pid", "network", "uts", "ipc", "cgroup")
_JOIN_ORDER = ("pid", "uts", "ipc", "network", "cgroup", "time")
"""The user namespace is entered after those that are the host's or another container's."""
Clock = Literal["boottime", "monotonic"]


def clone_flags(linux: Linux) -> int:
    """The CLONE_NEW* flags the child is born with: none if it enters a user namespace first."""
    flags = 0
    for namespace in linux.namespaces:
        if not namespace.path and namespace.type_ in _BORN:
            flags |= kernel.FLAGS[namespace.type_]
    if not flags & kernel.NEWNS:
        raise Invalid("a container needs a mount namespace of its own (linux.namespaces: mount)")
    return 0 if linux.namespace("user") is not None else flags


def plan_user(program: Program, user: Fd, linux: Linux) -> None:
    """Enter the user namespace `user`, become its root, make the other namespaces in it."""
    program.call("enter the user namespace", "setns", user, kernel.NEWUSER)
    plan_become_root(program)
    kinds = [n.type_ for n in linux.namespaces if not n.path and n.type_ in _IN_USER]
    flags = sum(kernel.FLAGS[kind] for kind in kinds)
    program.call(f"new {', '.join(kinds)} namespaces", "unshare", flags)
    if "pid" in kinds:
        program.fork("enter the pid namespace")


def plan_become_root(program: Program) -> None:
    """Be user and group 0 of the user namespace that was entered."""
    program.call("become group 0 inside", "setresgid", 0, 0, 0)
    program.call("clear the supplementary groups", "setgroups", 0, None)
    program.call("become user 0 inside", "setresuid", 0, 0, 0)


def paths(linux: Linux) -> dict[str, str]:
    """The namespaces to join, by kind, in the order in which they must be joined."""
    given = {n.type_: n.path for n in linux.namespaces if n.path}
    if "mount" in given:
        raise Invalid("linux.namespaces: the mount namespace cannot be another container's")
    return {kind: given[kind] for kind in _JOIN_ORDER if kind in given}


def plan_join(program: Program, descriptors: Mapping[str, Fd]) -> None:
    """Join the namespaces of `descriptors`; a joined PID namespace wants a fork afterwards."""
    for kind, fd in descriptors.items():
        program.call(f"join the {kind} namespace", "setns", fd, kernel.FLAGS[kind])


def plan_cgroup(program: Program) -> None:
    """A cgroup namespace rooted where the child is now."""
    program.call("new cgroup namespace", "unshare", kernel.NEWCGROUP)


def plan_time(program: Program, offsets: Mapping[Clock, TimeOffset]) -> None:
    """A time namespace with `offsets`, entered at once; time_namespaces(7)."""
    program.call("new time namespace", "unshare", kernel.NEWTIME)
    if offsets:
        lines = "".join(
            f"{clock} {offset.secs} {offset.nanosecs}\n"
            for clock, offset in sorted(offsets.items())
        )
        program.write("set the clocks' offsets", AT_FDCWD, "/proc/self/timens_offsets", lines)
    fd = program.call(
        "enter the time namespace",
        "openat",
        AT_FDCWD,
        "/proc/self/ns/time_for_children",
        os.O_RDONLY | os.O_CLOEXEC,
        0,
    )
    program.call("enter the time namespace", "setns", fd, kernel.NEWTIME)


def plan_hostname(program: Program, hostname: Argument, length: Argument) -> None:
    """sethostname(2)."""
    program.call("set the host name", "sethostname", hostname, length)


def plan_domainname(program: Program, domainname: str) -> None:
    """setdomainname(2)."""
    data = domainname.encode()
    program.call(f"set the domain name {domainname}", "setdomainname", data, len(data))
