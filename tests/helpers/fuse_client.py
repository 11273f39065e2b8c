"""A hostile guest's view of the file server: FUSE requests of any shape, straight to its socket."""

import errno
import socket
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Decoder, Frame, Type
from tests.helpers.files_rig import FIRST, server
from tests.helpers.waiting import DEADLINE_S

ROOT = 1
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR = 1, 2, 3, 4, 5, 6, 8, 9
UNLINK, RENAME, LINK, OPEN, READ, WRITE, RELEASE = 10, 12, 13, 14, 15, 16, 18
SETXATTR, GETXATTR, INIT, OPENDIR, READDIR, CREATE, READDIRPLUS = 21, 22, 26, 27, 28, 35, 44
BATCH_FORGET, RENAME2 = 42, 45
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")


class Fuse:
    """One share of a server; leaving the block ends it."""

    def __init__(self, source: Path, native: str | None = None, *, greet: bool = True) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.server: subprocess.Popen[bytes] = server(
                theirs, [source], valid="250", native=native
            )
        self.sock.settimeout(DEADLINE_S)
        self.decoder = Decoder()
        self._ready: list[Frame] = []
        self._unique = 0
        if greet:
            assert self.ask(INIT, 0, struct.pack("<IIII", 7, 36, 1 << 17, 0xFFFFFFFF))[0] == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()
        try:
            self.server.wait(DEADLINE_S)
        finally:
            self.server.kill()
            self.server.wait()

    def request(self, opcode: int, node: int, payload: bytes) -> bytes:
        """The bytes of a request, with a number of its own."""
        self._unique += 1
        size = _IN.size + len(payload)
        return _IN.pack(size, opcode, self._unique, node, 1000, 1000, 77, 0, 0) + payload

    def send(self, data: bytes, *, share: int = FIRST) -> None:
        """Send what is, or is not, a request."""
        self.sock.sendall(frames.encode(Type.FUSE, share, 0, data))

    def receive(self) -> tuple[int, int, bytes]:
        """The next answer: (number, errno, bytes); ConnectionError at the server's end."""
        while not self._ready:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the server has ended")
            self._ready += self.decoder.feed(data)
        frame = self._ready.pop(0)
        assert frame.type == Type.FUSE_REPLY and frame.id == FIRST
        size, error, unique = _OUT.unpack_from(frame.payload)
        assert size == len(frame.payload)
        return unique, -error, frame.payload[_OUT.size :]

    def ask(self, opcode: int, node: int, payload: bytes = b"") -> tuple[int, bytes]:
        """The answer to a request: (errno, bytes)."""
        self.send(self.request(opcode, node, payload))
        unique, error, data = self.receive()
        assert unique == self._unique
        return error, data

    def look_up(self, name: bytes, node: int = ROOT) -> int:
        """The node of a name; OSError."""
        error, data = self.ask(LOOKUP, node, name + b"\0")
        found: int = struct.unpack_from("<Q", data)[0] if not error else 0
        if error or not found:
            raise OSError(error or errno.ENOENT, "no such name")
        return found

    def open(self, node: int, flags: int = 0) -> int:
        """A handle; OSError."""
        error, data = self.ask(OPEN, node, struct.pack("<II", flags, 0))
        if error:
            raise OSError(error, "cannot be opened")
        handle: int = struct.unpack_from("<Q", data)[0]
        return handle

    def read(self, handle: int, size: int, offset: int = 0) -> tuple[int, bytes]:
        """What is there."""
        return self.ask(READ, ROOT, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))
