"""`bulkhead-monitor` with a guest that is only a namespace (guest_rig), in a folder of its own.

with Monitor(tmp_path, frames) as monitor:
    monitor.report()                  # the STARTED or FAILED frame
    assert monitor.wait() == 0
"""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, Frame, Mode
from bulkhead.keeper.holder import program_path
from tests.helpers.guest_rig import guest_command
from tests.helpers.waiting import DEADLINE_S

MAIN = 1
SHUTDOWN = frames.shutdown(0, [])


def main_frames(program: bytes, mode: Mode = Mode.PIPES, **options: int) -> bytes:
    """A script of one main program."""
    return frames.run(MAIN, program, mode, **options) + SHUTDOWN


class Monitor:
    """A running monitor; leaving the block kills it."""

    def __init__(
        self,
        folder: Path,
        script: bytes,
        *,
        vmm: Sequence[str] = (),
        native: str | None = None,
        options: Sequence[str] = (),
        streams: "tuple[Any, Any, Any] | None" = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.folder = folder
        self.native = native
        folder.mkdir(exist_ok=True)
        (folder / "frames").write_bytes(script)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(folder / "report.sock"))
        self.listener.listen()
        pipe = subprocess.PIPE
        stdin, stdout, stderr = streams or (pipe, pipe, pipe)
        self.process = subprocess.Popen(
            [
                program_path("bulkhead-monitor", native), "run",
                "--frames", str(folder / "frames"), "--socket", str(folder / "guest.sock"),
                "--report", str(folder / "report.sock"), "--detail", str(folder / "detail"),
                *options, "--", *(vmm or vmm_command(native)),
            ],
            stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.listener.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def report(self) -> Frame:
        """What the monitor reports: STARTED or FAILED."""
        self.listener.settimeout(DEADLINE_S)
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            (frame,) = Decoder().feed(connection.recv(1 << 17))
        if frame.type == frames.Type.FAILED:
            self.process.wait(DEADLINE_S)
            print("the monitor's detail:", self.detail())
        return frame

    def wait(self, stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
        """Its exit code and what came out."""
        out, err = self.process.communicate(stdin, timeout=DEADLINE_S)
        return self.process.returncode, out, err

    def detail(self) -> dict[str, Any]:
        """What it wrote about its end."""
        found: dict[str, Any] = json.loads((self.folder / "detail").read_text())
        return found

    def client(self) -> "Client":
        """A connection to its socket."""
        return Client(self.folder / "guest.sock")

    def exec(self, script: bytes, **options: Any) -> "subprocess.Popen[bytes]":
        """`bulkhead-monitor exec` with pipes."""
        path = self.folder / f"exec-{os.urandom(4).hex()}"
        path.write_bytes(script)
        pipe = subprocess.PIPE
        given: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe} | options
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [
                program_path("bulkhead-monitor", self.native), "exec",
                "--socket", str(self.folder / "guest.sock"), "--frames", str(path),
            ],
            **given,
        )  # fmt: skip
        return process


def vmm_command(native: str | None = None) -> list[str]:
    """A "VMM" whose guest is a namespace."""
    command = guest_command(9, native)
    return ["/usr/bin/env", *command]


class Client:
    """A client of the monitor's socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.sock.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()

    def send(self, kind: int, identity: int = 0, arg: int = 0, payload: bytes = b"") -> None:
        """One message."""
        for packet in frames.frames(kind, identity, arg, payload):
            self.sock.send(packet)

    def receive(self) -> Frame:
        """The next packet."""
        assert select.select([self.sock], [], [], DEADLINE_S)[0], "the monitor says nothing"
        data = self.sock.recv(1 << 17)
        assert data, "the monitor has closed the connection"
        (frame,) = Decoder().feed(data)
        return frame
