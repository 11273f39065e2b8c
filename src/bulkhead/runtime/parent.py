"""Whose children a runtime's processes are: of this process, or of a client (planner.py).

Everything that a command starts is a launch program in a cloned child; what differs is who clones,
reaps and waits. `current()` is this process unless a planner's worker has said otherwise.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from bulkhead import _native
from bulkhead.boundary.seam import LaunchRequest
from bulkhead.errors import Internal, NotFound
from bulkhead.linux import pidfd, prctl, unwritable
from bulkhead.linux.fds import OwnedFd


class Parent(Protocol):
    """Who clones and reaps."""

    pid: int
    """Its process, 0 for this one: children inherit from it."""

    def clone(self, request: LaunchRequest, program: int, shared: int, channel: int) -> None:
        """Clone a child for the request; the descriptors are as native/child.h has them."""
        ...

    def reap(self, pid: int) -> int:
        """The wait status of a child that ends."""
        ...

    def adopt_orphans(self) -> None:
        """Be a subreaper from now on; prctl(2)."""
        ...

    def follow(self, pid: int, after: Sequence[str]) -> int:
        """Wait for a child, passing on signals, then run the command `after` (unless empty).

        The child's exit code, 128 + signal, or that of `after` if that failed.
        """
        ...

    def require_caller(self, why: str) -> None:
        """Nothing if this is the process that the caller started; else it gives up before a start.

        `why` names what only such a process can do: it has the caller's other descriptors, and may
        stay as long as it likes.
        """
        ...


class Own:
    """This process, by way of bulkhead-spawn: a small static program that clones our child.

    So a memory limit is not charged an interpreter, and the child never was one.
    """

    pid = 0

    def clone(self, request: LaunchRequest, program: int, shared: int, channel: int) -> None:
        """Run bulkhead-spawn for the request; its child is ours then."""
        folder = os.path.dirname(os.path.abspath(str(_native.__file__)))
        path = f"{folder}/bulkhead-spawn"
        if not os.access(path, os.X_OK):
            raise NotFound(f"{path} is not there: build it with `make -C native`")
        with ExitStack() as undo:
            binary = undo.enter_context(unwritable.open_program(path))
            ourselves = undo.enter_context(pidfd.open_process(os.getpid()))
            read, write = os.pipe2(os.O_CLOEXEC)
            said = undo.enter_context(OwnedFd(read))
            with OwnedFd(write) as errors:
                given = [program, shared, channel, int(ourselves)]
                numbers = [
                    *given,
                    request.clone_flags,
                    int(bool(request.uid_map or request.gid_map)),
                    request.cgroup_fd,
                    *request.fds,
                ]
                for fd in {*given, *request.fds} | ({request.cgroup_fd} - {-1}):
                    undo.callback(os.set_inheritable, fd, os.get_inheritable(fd))
                    os.set_inheritable(fd, True)
                spawned = os.posix_spawn(
                    f"/proc/self/fd/{int(binary)}",
                    ["bulkhead-spawn", *map(str, numbers)],
                    {},
                    file_actions=[(os.POSIX_SPAWN_DUP2, int(errors), 2)],
                )
            _, status = os.waitpid(spawned, 0)
            if status:
                # The child has a copy of standard error only if there is one: it ends with this.
                text = os.read(int(said), 4096).decode(errors="replace").strip()
                raise Internal(text or f"bulkhead-spawn ended with wait status {status}")

    def reap(self, pid: int) -> int:
        """waitpid(2)."""
        return os.waitpid(pid, 0)[1]

    def adopt_orphans(self) -> None:
        """Orphans of the container come to us; prctl(2)."""
        prctl.prctl(prctl.SET_CHILD_SUBREAPER, 1)

    def follow(self, pid: int, after: Sequence[str]) -> int:
        """Reap until `pid` has ended."""
        code = _wait(pid)
        if not after:
            return code
        from bulkhead.runtime.main import main

        return main([*after]) or code

    def require_caller(self, why: str) -> None:
        """We are."""


def _wait(pid: int) -> int:
    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    kept = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG)
    for number in signal.valid_signals() - set(kept):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, forward)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


_OWN = Own()
_current: Parent = _OWN


def current() -> Parent:
    """Whose child the next process will be."""
    return _current


def use(parent: Parent | None) -> None:
    """From now on `parent`'s; None: this process's own."""
    global _current
    _current = _OWN if parent is None else parent
