"""A guest without a machine: `bulkhead-guest` as process 1 of a plain PID and mount namespace.

with Guest() as guest:
    guest.run(1, program, Mode.PIPES)
    assert guest.wait_for(Type.EXITED, 1).arg == 0
"""

import os
import select
import socket
import subprocess
import time
from types import TracebackType
from typing import Self

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, Frame, Mode, Type
from bulkhead.keeper.holder import program_path
from bulkhead.linux.program import Fd, Program
from tests.helpers.waiting import DEADLINE_S

ENV = ["PATH=/usr/bin:/bin", "LC_ALL=C"]
CLONE_NEWPID, CLONE_NEWNS = 0x20000000, 0x00020000


def guest_command(fd: int, native: str | None = None) -> list[str]:
    """What starts the init on the inherited socket `fd`."""
    return [
        "unshare", "--fork", "--pid", "--mount", "--mount-proc", "--kill-child",
        "--propagation", "private",
        "env", f"BULKHEAD_GUEST_CHANNEL=fd:{fd}", program_path("bulkhead-guest", native),
    ]  # fmt: skip


def simple(*argv: str, stdio: bool = True) -> bytes:
    """A program that only sets its streams and executes `argv` (found in /usr/bin or /bin)."""
    program = Program()
    if stdio:
        for number in range(3):
            program.call(f"set stream {number}", "dup3", Fd(number), number, 0)
    program.call("new session", "setsid")
    program.close("close the rest")
    program.exec("execute", [f"/usr/bin/{argv[0]}", f"/bin/{argv[0]}", argv[0]], argv, ENV)
    return program.compile().data


class Guest:
    """One init and the host's end of its channel; leaving the block kills it."""

    def __init__(self, native: str | None = None) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.process = subprocess.Popen(
                guest_command(theirs.fileno(), native),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.decoder = Decoder()
        self.frames: list[Frame] = []
        self.ended = False

    def __enter__(self) -> Self:
        first = self.wait_for(Type.GUEST_HELLO)
        assert first.arg == frames.VERSION and first.payload == bytes(16)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()

    def send(self, data: bytes) -> None:
        """Send, reading meanwhile what comes."""
        self.sock.setblocking(False)
        view = memoryview(data)
        deadline = time.monotonic() + DEADLINE_S
        while view:
            readable, writable, _ = select.select([self.sock], [self.sock], [], 1.0)
            if readable:
                self.receive()
            if writable:
                view = view[self.sock.send(view) :]
            assert time.monotonic() < deadline, "the guest does not read"
        self.sock.setblocking(True)

    def receive(self) -> None:
        """Read what comes next from the channel."""
        data = self.sock.recv(1 << 16)
        self.ended |= not data
        self.frames += self.decoder.feed(data)

    def run(self, identity: int, program: bytes, mode: Mode, **options: int) -> None:
        """Send a RUN."""
        self.send(frames.run(identity, program, mode, **options))

    def hello(self, nonce: bytes = b"n" * 16) -> Frame:
        """Begin anew; the answer."""
        self.frames.clear()
        self.send(frames.hello(nonce, time.time_ns(), os.urandom(32)))
        return self.wait_for(Type.GUEST_HELLO)

    def find(self, kind: Type, identity: int = 0) -> list[Frame]:
        """The frames of that type and id that have come."""
        return [f for f in self.frames if f.type == kind and f.id == identity]

    def seen(self) -> list[tuple[int, int, int, bytes]]:
        """What has come, in short."""
        return [(f.type, f.id, f.arg, f.payload[:40]) for f in self.frames[-50:]]

    def wait_for(self, kind: Type, identity: int = 0, arg: int | None = None) -> Frame:
        """The first frame of that type and id (and argument), read from the channel if need be."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for frame in self.find(kind, identity):
                if arg is None or frame.arg == arg:
                    return frame
            assert not self.ended, f"the guest ended; it sent {self.seen()}"
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.name} of {identity}; there came {self.seen()}"
            if select.select([self.sock], [], [], left)[0]:
                self.receive()

    def output(self, identity: int, stream: int = 1) -> bytes:
        """What has come of an output stream."""
        return b"".join(f.payload for f in self.find(Type.OUT, identity) if f.arg == stream)

    def finish(self, identity: int) -> int:
        """Wait for the end of a process and of its streams; its wait status."""
        status = self.wait_for(Type.EXITED, identity).arg
        for stream in (1, 2):
            self.wait_for(Type.EOF, identity, stream)
        return status
