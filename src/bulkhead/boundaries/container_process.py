"""The part of a launch that is the same for a container's first process and for one of exec:
streams or terminal, working directory, ids, capabilities, filter, program.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.isolation import capabilities, credentials, lsm, tty
from bulkhead.linux import capabilities as kernel_capabilities
from bulkhead.linux import seccomp
from bulkhead.linux.mounts import AT_FDCWD, PROC_MAGIC
from bulkhead.linux.openat2 import HOW_SIZE
from bulkhead.linux.program import KEPT_FIRST, Argument, Blob, Fd, Patched, Program, Slot
from bulkhead.linux.terminals import window_size
from bulkhead.linux.tree import OPEN_DIRECTORY, Tree
from bulkhead.oci.runtime import Process

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled system call filter and the flags to install it with."""

    program: bytes
    flags: int


LISTENER = "listener"
"""The name by which a child reports that it waits for the state that goes with its listener."""
LISTENER_STATE_MAX = 60 << 10
"""Bytes of that state: what a pipe takes at once."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told of system calls (SCMP_ACT_NOTIFY): a connected socket, and what to tell it."""

    socket: Argument
    state: Blob
    length: Slot


class FdTable:
    """Which descriptors a program takes, by name, in the order of first use."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def fd(self, key: str) -> Fd:
        """The place of descriptor `key`."""
        if key not in self.keys:
            self.keys.append(key)
        return Fd(self.keys.index(key))


def candidates(process: Process) -> list[str]:
    """The paths to try for argv[0]: itself if it has a slash, else one in each part of PATH."""
    name = process.args[0]
    if "/" in name:
        return [name]
    path = DEFAULT_PATH
    for variable in process.env:
        if variable.startswith("PATH="):
            path = variable[5:]
    return [f"{directory or '.'}/{name}" for directory in path.split(":")]


def plan_host_proc(program: Program) -> Slot:
    """The host's /proc, where "self" is the child whatever its PID namespace; before the pivot."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    proc = program.call("open /proc", "openat", AT_FDCWD, "/proc", flags, 0)
    program.expect_fstype("verify /proc", proc, PROC_MAGIC)
    return proc


def plan_oom_score(program: Program, wanted: int | None, inherited: int, proc: Argument) -> None:
    """oom_score_adj, if it differs from what the child inherits."""
    if wanted is not None and wanted != inherited:
        program.write(f"set oom_score_adj to {wanted}", proc, "self/oom_score_adj", str(wanted))


def has_label(process: Process) -> bool:
    """Whether the process asks for a label that this kernel can give, or must be refused."""
    profile = process.apparmor_profile
    wanted = bool(profile) and (profile != lsm.UNCONFINED or lsm.apparmor())
    return wanted or bool(process.selinux_label)


def plan_label(program: Program, proc: Slot | None, process: Process) -> None:
    """AppArmor profile and SELinux label of the program, through the host's /proc."""
    if proc is not None:
        lsm.plan_exec_label(program, proc, process.apparmor_profile, process.selinux_label)


def window(program: Program, rows: int, columns: int) -> Blob:
    """The hole for a terminal's size."""
    return program.hole("window", window_size(rows, columns))


def plan_group(program: Program, group: str) -> None:
    """Join the control group (v2) at `group`, if there is one."""
    if group:
        program.write("join the control group", AT_FDCWD, f"{group}/cgroup.procs", "0")


def plan_streams(program: Program, fds: FdTable) -> None:
    """Standard streams from descriptors that came along."""
    tty.plan_streams(program, (fds.fd("stdin"), fds.fd("stdout"), fds.fd("stderr")))


def plan_listener(program: Program, fds: FdTable) -> Listener:
    """Take the state from the pipe "listener-state", which is written once the child says so."""
    pipe, state = fds.fd("listener-state"), Blob(bytes(LISTENER_STATE_MAX))
    program.send_fd("report before the listener", LISTENER, pipe)
    length = program.call("read the state", "read", pipe, state, LISTENER_STATE_MAX)
    return Listener(fds.fd("listener"), state, length)


def plan_directory(tree: Tree, cwd: str, *, create: bool) -> None:
    """Enter the working directory, made if it is missing (`create`), never through a magic link."""
    program = tree.program
    step = f"enter the working directory {cwd}"
    relative = cwd.lstrip("/") or "."
    ok = (errno.ENOENT,) if create and relative != "." else ()
    fd = program.call(step, "openat2", tree.root, relative, OPEN_DIRECTORY, HOW_SIZE, ok=ok)
    if not ok:
        program.call(step, "fchdir", fd)
        return
    with program.when(fd):
        program.call(step, "fchdir", fd)
    with program.when(fd, failed=True):
        made = tree.make(f"make the working directory {cwd}", cwd, directory=True)
        program.call(step, "fchdir", made)


def plan_identity(
    program: Program,
    process: Process,
    filter_: Filter | None,
    *,
    can_setgroups: bool = True,
    available: frozenset[str] | None = None,
    keep: Sequence[Argument] = (),
    keep_numbers: bool = False,
    listener: Listener | None = None,
) -> None:
    """Limits, capabilities, ids, no_new_privs and filter, in the order that works.

    `keep` are 10, 11, … afterwards, or 3, 4, … with `keep_numbers`.
    """
    if process.scheduler is not None:
        credentials.plan_scheduler(program, process.scheduler)
    if process.io_priority is not None:
        credentials.plan_io_priority(program, process.io_priority)
    credentials.plan_rlimits(program, process.rlimits)
    sets = process.capabilities
    planned = None
    if sets is not None:
        planned = capabilities.plan(
            effective=sets.effective,
            permitted=sets.permitted,
            inheritable=sets.inheritable,
            bounding=sets.bounding,
            ambient=sets.ambient,
            available=available,
        )
        names = [_capability(number) for number in planned.drop]
        credentials.plan_bounding(program, planned.drop, names)
    credentials.plan_ids(program, process.user, can_setgroups=can_setgroups)
    _plan_close(program, keep, numbers=keep_numbers, listener=listener)
    if filter_ is not None and not process.no_new_privileges:
        _plan_filter(program, filter_, listener)
    if planned is not None:
        credentials.plan_capabilities(
            program,
            planned.header,
            planned.data,
            planned.raise_ambient,
            clear_ambient=bool(planned.inheritable),
        )
    if process.no_new_privileges:
        credentials.plan_no_new_privs(program)
        if filter_ is not None:
            _plan_filter(program, filter_, listener)


def _plan_close(
    program: Program, keep: Sequence[Argument], *, numbers: bool, listener: Listener | None
) -> None:
    step = "close all other descriptors"
    program.close(step, [listener.socket, *keep] if listener is not None else keep)
    first = KEPT_FIRST
    if listener is not None:
        program.call(
            "keep the listener's socket to itself", "fcntl", first, fcntl.F_SETFD, fcntl.FD_CLOEXEC
        )
        first += 1
    if numbers and keep:
        last = first + len(keep)
        for position in range(len(keep)):
            program.call("pass descriptors on", "dup3", first + position, 3 + position, 0)
        program.call(step, "close_range", max(first, 3 + len(keep)), last - 1, 0)


def _plan_filter(program: Program, filter_: Filter, listener: Listener | None) -> None:
    if listener is None:
        credentials.plan_seccomp(program, filter_.program, filter_.flags)
        return
    flags = filter_.flags | seccomp.FLAGS["SECCOMP_FILTER_FLAG_NEW_LISTENER"]
    notify = credentials.plan_seccomp(program, filter_.program, flags)
    # unix(7), cmsg(3): the descriptor of the notifications, with the state of the container.
    step = "hand over the listener of system calls"
    control = Blob(struct.pack("=QiiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, 0, 0))
    program.store(step, control, 16, 4, notify)
    vector = Blob(bytes(16))
    program.store(step, vector, 0, 8, listener.state)
    program.store(step, vector, 8, 8, listener.length)
    header = Patched(
        struct.pack("=QQQQQQQ", 0, 0, 0, 1, 0, len(control.data), 0),
        ((16, 8, vector), (32, 8, control)),
    )
    program.call(step, "sendmsg", KEPT_FIRST, header, 0)


def _capability(number: int) -> str:
    names = kernel_capabilities.NAMES
    return names[number] if number < len(names) else f"capability {number}"


def plan_exec(program: Program, process: Process, paths: Sequence[str]) -> None:
    """The program itself; candidates, argv and env are holes."""
    program.exec(
        "execute the program",
        program.vector("candidates", paths),
        program.vector("argv", process.args),
        program.vector("env", process.env),
    )
