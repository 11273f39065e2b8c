"""The engine's own conversations with a running guest: it is a client of the monitor.

    /proc/PID/root/run/guest.sock    PID is the monitor's; opened in its root, as what lies in the
                                     jail may have been put there by a hostile VMM

Everything here blocks, for at most the time given: it is for threads.
"""

import contextlib
import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from bulkhead.boundaries.guest import frames
from bulkhead.errors import Unavailable
from bulkhead.linux import openat2
from bulkhead.linux.fds import OwnedFd, readable
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Compiled, Fd, Program

PLACE = "run/guest.sock"
_PACKET = frames.HEADER.size + frames.FRAME_MAX
_ONE = 1
"""The id of the only request of a connection."""
_FAREWELL = 2
_MAIN_FD = 100
"""Where the tool finds the main process (native/guest_tool.c)."""
_TOOL = "/initramfs/init"
ANSWER_S = 30.0


class Link:
    """One connection; one request at a time."""

    def __init__(self, pid: int, timeout_s: float = ANSWER_S, place: str = PLACE) -> None:
        """Connect to the monitor that is process `pid`; Unavailable if it does not listen."""
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(timeout_s)
            flags = os.O_PATH | os.O_NOFOLLOW
            with (
                OwnedFd(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)) as root,
                openat2.openat2(int(root), place, flags, openat2.IN_ROOT) as found,
            ):
                if not stat.S_ISSOCK(os.fstat(int(found)).st_mode):
                    raise Unavailable("the guest's monitor has no socket")
                self._socket.connect(f"/proc/self/fd/{int(found)}")
        except OSError as error:
            self._socket.close()
            raise Unavailable(f"the guest's monitor does not answer: {error.strerror}") from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; what was run for this connection is killed."""
        self._socket.close()

    def read(self, path: str) -> bytes:
        """A small file of the guest, as its init sees it: at most 64 KiB. OSError."""
        self._send(frames.encode(frames.Type.READ, _ONE, 0, path.encode()))
        frame = self._receive(self._timeout_s)
        if frame.type != frames.Type.DATA:
            raise frames.GuestProtocolError(f"the monitor answered {frame.type} to READ")
        if frame.arg:
            raise OSError(frame.arg, os.strerror(frame.arg), path)
        return frame.payload

    def set_up(self, program: Program, *, context: int = 0) -> None:
        """Run steps in the init's own namespaces; LaunchFailed names the one that failed."""
        compiled = program.compile()
        packets = frames.run_packets(_ONE, compiled.data, frames.Mode.SETUP, context=context)
        self._send(*packets)
        self._done("a set-up", compiled.steps)

    def _done(self, what: str, steps: Sequence[str]) -> None:
        frame = self._receive(self._timeout_s)
        if frame.type == frames.Type.FAILED:
            raise frames.failure(frame, steps)
        if frame.type != frames.Type.DONE:
            raise frames.GuestProtocolError(f"the monitor answered {frame.type} to {what}")

    def become_member(self, farewell: Compiled, fds: Sequence[int]) -> None:
        """Be a workload's connection: `farewell` is run when all that it runs has ended, or it has.

        `fds`: one that is open until then, and the socket of a file server, if there is one.
        """
        mode, kind = frames.Mode.SETUP, frames.Type.MEMBER
        self._send(*frames.run_packets(_FAREWELL, farewell.data, mode, kind=kind), fds=fds)
        self._done("a member", ())

    def mount(self, number: int, target: str, options: str) -> None:
        """Mount what this member's file server calls `number`; LaunchFailed."""
        self._send(frames.fuse_mount(number, target, options))
        self._done("a mount", ())

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def tool(
        self,
        arguments: Sequence[str],
        stdin: int,
        stdout: int,
        *,
        context: int,
        environment: Sequence[str] = (),
    ) -> None:
        """Begin the tool with these descriptors; `context`: the process that it needs, or 0.

        LaunchFailed if it cannot be run. `ended` waits for its end.
        """
        program = _tool(arguments, environment, main=bool(context))
        packets = frames.run_packets(_ONE, program.data, frames.Mode.PIPES, context=context)
        with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as null:
            self._send(*packets, fds=(stdin, stdout, int(null)))
        frame = self._receive(self._timeout_s)
        if frame.type == frames.Type.FAILED:
            raise frames.failure(frame, program.steps)
        if frame.type != frames.Type.STARTED:
            raise frames.GuestProtocolError(f"the monitor answered {frame.type} to a program")

    def ended(self) -> int:
        """Wait for the tool's end: its wait status."""
        frame = self._receive(self._timeout_s)
        if frame.type != frames.Type.EXITED:
            raise frames.GuestProtocolError(f"the monitor said {frame.type} instead of EXITED")
        return frame.arg

    def _send(self, *packets: bytes, fds: Sequence[int] = ()) -> None:
        try:
            for packet in packets:
                if fds:
                    rights = struct.pack(f"{len(fds)}i", *fds)
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    self._socket.sendmsg([packet], ancillary)
                    fds = ()
                else:
                    self._socket.send(packet)
        except OSError as error:
            raise Unavailable(f"the guest's monitor does not answer: {error}") from error

    def _receive(self, timeout_s: float) -> frames.Frame:
        self._socket.settimeout(timeout_s)
        try:
            packet = self._socket.recv(_PACKET)
        except OSError as error:
            raise Unavailable(f"the guest's monitor does not answer: {error}") from error
        found = frames.Decoder().feed(packet)
        if len(found) != 1:
            raise Unavailable("the guest's monitor has ended")
        return found[0]


class _Compiled:
    __slots__ = ("data", "steps")

    def __init__(self, data: bytes, steps: list[str]) -> None:
        self.data, self.steps = data, steps


def _tool(arguments: Sequence[str], environment: Sequence[str], *, main: bool) -> _Compiled:
    program = Program()
    for number, name in enumerate(frames.STREAMS):
        program.call(f"{name} of the tool", "dup3", Fd(number), number, 0)
    if main:
        program.call("the workload", "dup3", Fd(frames.CONTEXT), _MAIN_FD, 0)
    program.call("go to the root", "chdir", "/")
    argv = ["bulkhead-guest", *arguments]
    program.exec("execute the tool", [_TOOL, "/proc/1/exe"], argv, environment)
    compiled = program.compile()
    return _Compiled(compiled.data, compiled.steps)


def pipe() -> tuple[OwnedFd, OwnedFd]:
    """A pipe's ends, for reading and for writing."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    return OwnedFd(reading), OwnedFd(writing)


class Patient:
    """A pipe's reading end as a file whose reads fail if nothing comes for `timeout_s`.

    While `excused` says so, nothing need come: the other side has something to wait for.
    """

    def __init__(
        self, fd: int, timeout_s: float, excused: Callable[[], bool] = lambda: False
    ) -> None:
        self._fd, self._timeout_s, self._excused = fd, timeout_s, excused
        self._data = bytearray()
        os.set_blocking(fd, False)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or what there is before the end."""
        while len(self._data) < size:
            piece = self._more(max(65536, min(size - len(self._data), 1 << 20)))
            if not piece:
                break
            self._data += piece
        found = bytes(self._data[:size])
        del self._data[:size]
        return found

    def _more(self, size: int) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._fd, size)
            if self._excused():
                deadline = time.monotonic() + self._timeout_s
            left = deadline - time.monotonic()
            if readable(self._fd, min(left, 1.0)):
                continue
            if left <= 0:
                raise Unavailable(f"the guest sent nothing for {self._timeout_s:.0f} s")


def clock(realtime_ns: int) -> Program:
    """Set the guest's clock; clock_settime(2)."""
    program = Program()
    value = struct.pack("<qq", *divmod(realtime_ns, 10**9))
    program.call("set the clock", "clock_settime", time.CLOCK_REALTIME, value)
    return program


def settings(values: Sequence[tuple[str, str]], *, absent: bool = False) -> Program:
    """Write these values to these files, in order; `absent`: they may name what is not there."""
    program = Program()
    for path, value in values:
        missing = (errno.ENOENT, errno.ENODEV) if absent else ()
        program.write(f"set {path}", AT_FDCWD, path, value, ok=missing)
    return program
