"""As much of a VNC client as shows that a screen is there (RFB 3.8, RFC 6143)."""

import socket
import struct

_NO_SECURITY = 1
_RAW = 0


class Rfb:
    """A connected client; sizes in pixels."""

    def __init__(self, sock: socket.socket) -> None:
        """Shake hands over a connected socket; AssertionError for a server that is none."""
        self.sock = sock
        self.version = self._take(12)
        assert self.version.startswith(b"RFB 003."), self.version
        sock.sendall(b"RFB 003.008\n")
        kinds = self._take(self._take(1)[0])
        assert _NO_SECURITY in kinds, kinds
        sock.sendall(bytes([_NO_SECURITY]))
        assert self._take(4) == bytes(4)
        sock.sendall(b"\1")  # others may look too
        self.width, self.height = struct.unpack(">HH", self._take(4))
        self.bits = self._take(16)[0]
        self.name = self._take(struct.unpack(">I", self._take(4))[0]).decode()

    def picture(self) -> bytes:
        """The whole screen's pixels; those of the last rectangle if its size has changed."""
        self.sock.sendall(struct.pack(">BxHi", 2, 1, _RAW))
        self.sock.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, self.width, self.height))
        while True:
            kind = self._take(1)[0]
            if kind == 0:
                break
            assert kind in (2, 3), kind
            if kind == 3:  # text cut in the machine
                self._take(struct.unpack(">3xI", self._take(7))[0])
        pixels = b""
        for _ in range(struct.unpack(">xH", self._take(3))[0]):
            _, _, width, height, encoding = struct.unpack(">HHHHi", self._take(12))
            assert encoding == _RAW, encoding
            pixels += self._take(width * height * self.bits // 8)
        return pixels

    def _take(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, f"the screen hung up after {len(data)} of {size} bytes"
            data += piece
        return bytes(data)
