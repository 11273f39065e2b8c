"""A guest played by the test: the monitor's VMM hands its channel over and waits.

with HostileGuest(tmp_path, script) as guest:
    guest.greet()                       # the conversation up to the script's frames
    guest.say(Type.OUT, MAIN, 1, b"x")
    assert guest.monitor.wait()[0] == 125
"""

import contextlib
import select
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, Frame, Type
from tests.helpers.monitor_rig import Monitor
from tests.helpers.waiting import DEADLINE_S

_VMM = """
import _socket, array
s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
s.connect(PATH)
s.sendmsg([b"c"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [9]))])
import posix
posix.close(9)
s.recv(1)
"""


class HostileGuest:
    """A monitor, and the other end of its channel."""

    def __init__(
        self,
        folder: Path,
        script: bytes,
        *,
        native: str | None = None,
        options: Sequence[str] = (),
        **more: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(folder / "vmm.sock"))
            listener.listen()
            listener.settimeout(DEADLINE_S)
            code = _VMM.replace("PATH", repr(str(folder / "vmm.sock")))
            vmm = [sys.executable, "-I", "-S", "-c", code]
            self.monitor = Monitor(folder, script, vmm=vmm, native=native, options=options, **more)
            try:
                self.vmm, _ = listener.accept()
                _, fds, _, _ = socket.recv_fds(self.vmm, 1, 1)
            except BaseException:
                self.monitor.__exit__(None, None, None)
                raise
        self.channel = socket.socket(fileno=fds[0])
        self.channel.setblocking(False)
        self.decoder = Decoder()
        self.frames: list[Frame] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hang_up()
        self.monitor.__exit__(kind, error, trace)

    def hang_up(self) -> None:
        """The machine is gone."""
        self.channel.close()
        self.vmm.close()

    def say(self, kind: Type, identity: int = 0, arg: int = 0, payload: bytes = b"") -> None:
        """Send a message."""
        self.send(frames.encode(kind, identity, arg, payload))

    def send(self, data: bytes, most_s: float = DEADLINE_S) -> int:
        """Send bytes; how many were taken, less than all when the monitor ends or stops reading."""
        view = memoryview(data)
        deadline = time.monotonic() + most_s
        while view and time.monotonic() < deadline:
            _, writable, _ = select.select([], [self.channel], [], deadline - time.monotonic())
            if not writable:
                break
            try:
                view = view[self.channel.send(view) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        return len(data) - len(view)

    def expect(self, kind: Type, identity: int = 0) -> Frame:
        """The next frame of that kind from the monitor."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for frame in self.frames:
                if frame.type == kind and frame.id == identity:
                    self.frames.remove(frame)
                    return frame
            assert time.monotonic() < deadline, f"no {kind.name}"
            if select.select([self.channel], [], [], 1.0)[0]:
                with contextlib.suppress(BlockingIOError):
                    data = self.channel.recv(1 << 16)
                    assert data, f"the monitor hung up before {kind.name}"
                    self.frames += self.decoder.feed(data)

    def greet(self) -> None:
        """Say hello and answer the monitor's."""
        self.say(Type.GUEST_HELLO, 0, frames.VERSION, bytes(16))
        hello = self.expect(Type.HELLO)
        self.say(Type.GUEST_HELLO, 0, frames.VERSION, hello.payload[:16] + b"6.1\0v\0m")
