"""Launch programs without a holder: a `Launcher` (boundary/seam.py) over `parent.current()`.

The child goes to its parent's subreaper when that ends. It reports over a socket ("pty" with a
terminal's master, the names of the gates it comes to) whose end means that it has executed its
program, or has failed as its shared memory says.
"""

import errno
import mmap
import os
import signal as signals
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bulkhead.boundary.failures import DIED, EXEC, STEP, launch_failure
from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.errors import LaunchFailed, NotFound
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd
from bulkhead.runtime import parent

_SPAWNED = struct.Struct("=IIiiIII228si")
"""struct spawned of native/child.h."""
_FAILED, _EXEC, _EXEC_FAILED = 1, 2, 3

PTY = "pty"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a child has said about itself in the memory that it shares."""

    state: int
    step: int
    error: int
    forked: int
    no_interpreter: int
    text: bytes
    pid: int

    @property
    def executed(self) -> bool:
        """Whether it became its program, or was about to."""
        return self.state == _EXEC

    def failure(self, steps: Sequence[str], status: int) -> LaunchFailed:
        """Why it did not; `status` is its wait status."""
        kind = {_EXEC_FAILED: EXEC, _FAILED: STEP}.get(self.state, DIED)
        return launch_failure(
            kind,
            self.step,
            status if kind == DIED else self.error,
            self.text,
            steps,
            no_interpreter=bool(self.no_interpreter),
        )


def read_progress(data: bytes) -> Progress:
    """The shared memory's bytes as `Progress`."""
    state, step, error, forked, no_interpreter, _, _, text, pid = _SPAWNED.unpack_from(data)
    return Progress(state, step, error, forked, no_interpreter, text.split(b"\0")[0], pid)


class Spawner:
    """`notes` are called with what comes along when the child reports their name.

    After a note the child waits, if the name is a gate's: whoever is called opens it. A note that
    returns True ends `launch` there: the child goes on without us.
    """

    def __init__(self, progress: str = "") -> None:
        """`progress` is a file to keep the child's shared memory in, made here."""
        self.notes: dict[str, Callable[[int, OwnedFd], bool]] = {}
        self.pid = parent.current().pid
        self.steps: list[str] = []
        """The names of the last program's steps."""
        self._progress = progress

    async def launch(self, request: LaunchRequest) -> Launched:
        """Run the program up to its exec, or to a note that says it is enough; LaunchFailed."""
        self.steps = [*request.steps]
        with ExitStack() as undo:
            shared = undo.enter_context(self._shared())
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(ours)
            with theirs:
                started = time.time_ns()
                program = undo.enter_context(OwnedFd(os.memfd_create("program")))
                os.write(int(program), request.program)
                parent.current().clone(request, int(program), int(shared), theirs.fileno())
            memory = undo.enter_context(mmap.mmap(int(shared), _SPAWNED.size))
            pid = read_progress(memory[:]).pid
            if request.uid_map or request.gid_map:
                _write_maps(pid, request, ours)
            try:
                done = self._listen(ours, memory)
            except BaseException:
                _end(read_progress(memory[:]))
                raise
            progress = read_progress(memory[:])
            if progress.forked:
                parent.current().reap(pid)
                pid = progress.forked
            if not done and not progress.executed:
                os.kill(pid, signals.SIGKILL)
                status = parent.current().reap(pid)
                raise progress.failure(request.steps, status)
            return Launched(pid, started, pidfd.open_process(pid))

    async def signal(self, identity: str, signal: int) -> None:
        """Not used: a runtime signals by the pid that its record holds."""
        raise NotFound(f"process {identity} was not launched here")

    async def forget(self, identity: str) -> None:
        """Nothing is remembered."""

    def _shared(self) -> OwnedFd:
        if self._progress:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = OwnedFd(os.open(self._progress, flags, 0o600))
        else:
            fd = OwnedFd(os.memfd_create("progress"))
        os.ftruncate(int(fd), _SPAWNED.size)
        return fd

    def _listen(self, channel: socket.socket, memory: mmap.mmap) -> bool:
        """Answer what the child reports; True if a note ended that, False at the end."""
        while True:
            name, fds, _, _ = socket.recv_fds(channel, 64, 4)
            if not name:
                return False
            progress = read_progress(memory[:])
            with OwnedFd(fds[0]) as fd:
                note = self.notes.get(name.decode())
                if note is not None and note(progress.forked or progress.pid, fd):
                    return True


def _end(progress: Progress) -> None:
    """Kill the child, and the one that it has made in its place."""
    for pid in (progress.pid, progress.forked):
        if pid:
            os.kill(pid, signals.SIGKILL)
            parent.current().reap(pid)


def _write_maps(pid: int, request: LaunchRequest, channel: socket.socket) -> None:
    """The child's id maps, then the byte it waits for; user_namespaces(7)."""
    if request.uid_map:
        _write_map(pid, "uid_map", request.uid_map)
    if request.gid_map:
        try:
            _write_map(pid, "gid_map", request.gid_map)
        except PermissionError:
            _write_map(pid, "setgroups", "deny")
            _write_map(pid, "gid_map", request.gid_map)
    channel.send(b"g", socket.MSG_NOSIGNAL)


def _write_map(pid: int, file: str, text: str) -> None:
    try:
        fd = os.open(f"/proc/{pid}/{file}", os.O_WRONLY | os.O_CLOEXEC)
        with OwnedFd(fd):
            os.write(fd, text.encode())
    except OSError as error:
        if error.errno == errno.EPERM and file == "gid_map":
            raise
        os.kill(pid, signals.SIGKILL)
        parent.current().reap(pid)
        step = f"write {file}"
        raise LaunchFailed(
            f"{step}: {error.strerror}", step=step, errno=error.errno or 0
        ) from error
