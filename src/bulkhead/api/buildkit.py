"""BuildKit's ways in, `/grpc` and `/session`: whoever asks is told, in one line, what to do.

Refusing the upgrade is not enough: buildx and Compose would then start a BuildKit of their own in
a container. So `/grpc` speaks as much HTTP/2 (RFC 9113) as it takes to answer every call with
gRPC's "unimplemented" and a message; `/session`, in which the client is the server, stays silent:
the request to build that comes beside it is refused in words.
"""

import struct

from bulkhead.api.answers import Failed
from bulkhead.api.exchange import Exchange, Stream
from bulkhead.api.routes import ROUTES, SENT

NO_BUILDKIT = (
    "BuildKit's session protocol is not served here: build with DOCKER_BUILDKIT=0, or with "
    "'bulkhead build', which takes the same Dockerfiles"
)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = struct.Struct(">HBBBI")
"""Length (upper 16 and lower 8 bits), type, flags, stream; RFC 9113, 4.1."""
_MAX_FRAME = 16384
_HEADERS, _SETTINGS, _PING, _GOAWAY = 1, 4, 6, 7
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_STATUS_200 = b"\x88"
"""Entry 8 of HPACK's static table; RFC 7541, appendix A."""
_UNIMPLEMENTED = "12"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 255, kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field that no table knows; RFC 7541, 6.2.2. Both are shorter than 256 bytes."""
    parts = b"\x00"
    for text in (name, value):
        data = text.encode("ascii")
        size = len(data)
        parts += bytes((size,)) if size < 127 else bytes((127, size - 127))
        parts += data
    return parts


REFUSAL = (
    _STATUS_200
    + _literal("content-type", "application/grpc")
    + _literal("grpc-status", _UNIMPLEMENTED)
    + _literal("grpc-message", NO_BUILDKIT)
)


def replies(buffer: bytearray) -> bytes | None:
    """What to say to the whole frames in `buffer`, which are taken out; None: hang up."""
    said = b""
    while len(buffer) >= _HEAD.size:
        upper, lower, kind, flags, stream = _HEAD.unpack_from(buffer)
        size = upper << 8 | lower
        if size > _MAX_FRAME or kind == _GOAWAY:
            return None
        if len(buffer) < _HEAD.size + size:
            break
        payload = bytes(buffer[_HEAD.size : _HEAD.size + size])
        del buffer[: _HEAD.size + size]
        if kind == _SETTINGS and not flags & _ACK:
            said += frame(_SETTINGS, _ACK, 0)
        elif kind == _PING and not flags & _ACK:
            said += frame(_PING, _ACK, 0, payload)
        elif kind == _HEADERS:
            said += frame(_HEADERS, _END_STREAM | _END_HEADERS, stream & 0x7FFFFFFF, REFUSAL)
    return said


@ROUTES.add("POST", "/grpc")
async def grpc(x: Exchange) -> object:
    """Every call is answered with the one line."""
    stream = _upgraded(x)
    buffer = bytearray()
    greeted = False
    while data := await x.connection.received():
        buffer += data
        if not greeted:
            if len(buffer) < len(_PREFACE):
                continue
            if not buffer.startswith(_PREFACE):
                break
            del buffer[: len(_PREFACE)]
            stream.write(frame(_SETTINGS, 0, 0))
            greeted = True
        said = replies(buffer)
        if said is None:
            break
        stream.write(said)
        await stream.drained()
    return SENT


@ROUTES.add("POST", "/session")
async def session(x: Exchange) -> object:
    """Silence, until the client leaves."""
    _upgraded(x)
    while await x.connection.received():
        pass
    return SENT


def _upgraded(x: Exchange) -> Stream:
    if not x.head.upgrade or x.header("upgrade").lower() != "h2c":
        raise Failed(501, NO_BUILDKIT)
    return x.hijack("application/grpc", "h2c")


def refuse(x: Exchange) -> None:
    """Failed (501), for a build that wants what comes over a session."""
    if x.text("version") == "2" or x.text("session"):
        raise Failed(501, NO_BUILDKIT)
