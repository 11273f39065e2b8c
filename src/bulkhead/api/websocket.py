"""`/containers/{id}/attach/ws`: attach over a WebSocket (RFC 6455), binary frames, no extensions.

Standard output and error go to the client as they come, what it sends goes to standard input.
"""

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator

from bulkhead.api import message
from bulkhead.api.connection import Connection, Gone
from bulkhead.api.exchange import Exchange, Stream, common
from bulkhead.api.message import BadRequest
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.api.streams import Session, attachable, connected
from bulkhead.errors import Invalid

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MAX_FRAME = 1 << 20
_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10


class Socket(Stream):
    """The stream to the client: every piece is a frame."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, chunked=False)

    def write(self, data: bytes) -> None:
        """Send a binary frame."""
        if data:
            super().write(frame(_BINARY, data))

    def close(self) -> None:
        """Say that no more comes."""
        super().write(frame(_CLOSE, (1000).to_bytes(2, "big")))
        self.flush()


def frame(kind: int, data: bytes) -> bytes:
    """One whole frame, as servers send it: not masked."""
    head = bytes((0x80 | kind,))
    if len(data) < 126:
        return head + bytes((len(data),)) + data
    if len(data) < 1 << 16:
        return head + b"\x7e" + len(data).to_bytes(2, "big") + data
    return head + b"\x7f" + len(data).to_bytes(8, "big") + data


def take(buffer: bytearray) -> tuple[int, bytes] | None:
    """(opcode, payload) of the first frame in `buffer`, which is removed; None if not complete."""
    if len(buffer) < 2:
        return None
    kind, size, at = buffer[0] & 0x0F, buffer[1] & 0x7F, 2
    if not buffer[1] & 0x80 or buffer[0] & 0x70:
        raise BadRequest("a WebSocket frame is not masked, or of an unknown extension")
    for mark, width in ((126, 2), (127, 8)):
        if size == mark:
            if len(buffer) < 2 + width:
                return None
            size, at = int.from_bytes(buffer[2 : 2 + width], "big"), 2 + width
            break
    if size > MAX_FRAME or (kind >= _CLOSE and size > 125):
        raise BadRequest("a WebSocket frame is too long")
    if len(buffer) < at + 4 + size:
        return None
    mask = bytes(buffer[at : at + 4]) * (size // 4 + 1)
    payload = bytes(buffer[at + 4 : at + 4 + size])
    del buffer[: at + 4 + size]
    plain = int.from_bytes(payload, "big") ^ int.from_bytes(mask[:size], "big")
    return kind, plain.to_bytes(size, "big")


async def _received(x: Exchange, stream: Socket) -> AsyncIterator[bytes]:
    buffer = bytearray()
    with contextlib.suppress(BadRequest):
        while data := await x.connection.received():
            buffer += data
            while (found := take(buffer)) is not None:
                kind, payload = found
                if kind == _CLOSE:
                    return
                if kind == _PING:
                    Stream.write(stream, frame(_PONG, payload))
                elif kind in {0, _TEXT, _BINARY} and payload:
                    yield payload


def _handshake(x: Exchange) -> Socket:
    key = x.header("sec-websocket-key")
    if x.header("upgrade").lower() != "websocket" or not key or x.head.method != "GET":
        raise Invalid("this is for WebSocket clients: the headers of the handshake are missing")
    if x.header("sec-websocket-version") != "13":
        raise Invalid("unsupported version of the WebSocket protocol: it has to be 13")
    accept = hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()
    headers = common(x.version) | {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": base64.b64encode(accept).decode(),
    }
    protocol = x.header("sec-websocket-protocol").partition(",")[0].strip()
    if protocol:
        headers["Sec-WebSocket-Protocol"] = protocol
    x.connection.began = x.connection.hijacked = True
    x.connection.write(message.head(101, headers))
    return Socket(x.connection)


@ROUTES.add("GET", "/containers/{id}/attach/ws")
async def attach(x: Exchange) -> object:
    """Connect to its streams, of this run or the next."""
    workload, keys = attachable(x)
    wanted = {name: x.flag(name) for name in ("stdin", "stdout", "stderr")}
    if not any(wanted.values()):
        wanted = dict.fromkeys(wanted, True)
    wanted["stdin"] = wanted["stdin"] and workload.record.config.open_stdin
    stream = _handshake(x)
    wanted["stderr"] = wanted["stderr"] and not workload.record.config.tty
    session = Session(x, raw=True, source=_received(x, stream), **wanted)
    with contextlib.suppress(Gone, asyncio.CancelledError):
        await connected(x, workload, session, keys, lambda: stream)
    stream.close()
    return SENT
