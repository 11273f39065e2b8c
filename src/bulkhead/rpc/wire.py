"""Frames between clients and the engine, on a Unix stream socket.

A frame is a little-endian u32 length, then so many bytes of MessagePack: one `Message`. File
descriptors travel as SCM_RIGHTS with the first byte of their frame; `fds` says how many. A client
numbers its requests; answers carry the number, so many requests share one connection.

    request   {id, method, params, fds}     client → engine
    cancel    {id, method: "cancel"}        client → engine: stop that request
    item      {id, item}                    engine → client: one element of a stream
    result    {id, result, done: true}      engine → client: the end; `fds` may be > 0
    error     {id, error: {category, message, details}, done: true}

The peer is not trusted: frames above MAX_FRAME or with more than MAX_FDS descriptors end the
connection. Bytes are MessagePack `bin`, so stream output needs no encoding.
"""

import struct
from typing import Any

import msgspec

MAX_FRAME = 16 << 20
MAX_FDS = 16
HEADER = struct.Struct("<I")
VERSION = 1


class Failure(msgspec.Struct, omit_defaults=True):
    """An error on the wire (`errors.rebuild` makes an exception of it again)."""

    category: str
    message: str
    details: dict[str, Any] = {}


class Message(msgspec.Struct, omit_defaults=True):
    """Any frame in either direction; absent members are not sent."""

    id: int
    method: str = ""
    params: msgspec.Raw = msgspec.Raw()
    fds: int = 0
    item: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    error: Failure | None = None
    done: bool = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def pack(value: object) -> msgspec.Raw:
    """`value` as raw MessagePack, to be put into a Message's params, item or result."""
    return msgspec.Raw(_encoder.encode(value))


def frame(message: Message) -> bytes:
    """The bytes of one frame; ValueError if it would exceed MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


class Splitter:
    """Cuts received bytes into messages; `feed` then iterate `messages()`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes; ValueError on a frame too long or not ours."""
        buffer = self._buffer
        buffer += data
        found: list[Message] = []
        while len(buffer) >= 4:
            (length,) = HEADER.unpack_from(buffer)
            if length > MAX_FRAME:
                raise ValueError(f"frame of {length} bytes is larger than {MAX_FRAME}")
            if len(buffer) < 4 + length:
                break
            try:
                found.append(_decoder.decode(bytes(buffer[4 : 4 + length])))
            except msgspec.MsgspecError as error:
                raise ValueError(f"not a message: {error}") from error
            del buffer[: 4 + length]
        return found
