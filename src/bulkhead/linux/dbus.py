"""As much of D-Bus as talking to systemd needs: one connection, calls, signals that we wait for.

Values are given with their signature (D-Bus specification, "Marshaling"): y byte, b boolean, i u
x t numbers, s o g texts, a arrays, ( ) tuples, v a (signature, value) pair.
"""

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead.errors import Unavailable

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_TO, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_FIELDS = {_PATH: "o", _INTERFACE: "s", _MEMBER: "s", _DESTINATION: "s", _SIGNATURE: "g"}
_NUMBERS = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q",
            "d": "d", "h": "I"}  # fmt: skip
_ALIGNMENTS = {"y": 1, "g": 1, "v": 1, "n": 2, "q": 2, "x": 8, "t": 8, "d": 8, "(": 8, "{": 8}
_MOST = 1 << 27


class CallFailed(Unavailable):
    """The other side answered with an error; `name` is D-Bus's."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Message:
    """What came in; `body` are its values."""

    kind: int
    member: str
    error: str
    reply_to: int
    body: tuple[Any, ...]


def split(signature: str) -> list[str]:
    """The complete types that a signature consists of."""
    found, start = [], 0
    while start < len(signature):
        end = _end(signature, start)
        found.append(signature[start:end])
        start = end
    return found


def _end(signature: str, start: int) -> int:
    if signature[start] == "a":
        return _end(signature, start + 1)
    if signature[start] in "({":
        depth = 0
        for position in range(start, len(signature)):
            depth += (signature[position] in "({") - (signature[position] in ")}")
            if depth == 0:
                return position + 1
        raise ValueError(f"unbalanced signature {signature!r}")
    return start + 1


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()

    def align(self, size: int) -> None:
        self.data += bytes(-len(self.data) % size)

    def put(self, kind: str, value: Any) -> None:
        first = kind[0]
        self.align(_ALIGNMENTS.get(first, 4))
        if first in _NUMBERS:
            self.data += struct.pack("<" + _NUMBERS[first], value)
        elif first in "sog":
            text = value.encode()
            self.data += bytes([len(text)]) if first == "g" else struct.pack("<I", len(text))
            self.data += text + b"\0"
        elif first == "v":
            self.put("g", value[0])
            self.put(value[0], value[1])
        elif first == "a":
            place = len(self.data)
            self.data += bytes(4)
            self.align(_ALIGNMENTS.get(kind[1], 4))
            start = len(self.data)
            for one in value:
                self.put(kind[1:], one)
            struct.pack_into("<I", self.data, place, len(self.data) - start)
        else:
            for inner, one in zip(split(kind[1:-1]), value, strict=True):
                self.put(inner, one)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def align(self, size: int) -> None:
        self.position += -self.position % size

    def take(self, kind: str) -> Any:
        first = kind[0]
        self.align(_ALIGNMENTS.get(first, 4))
        if first in _NUMBERS:
            form = "<" + _NUMBERS[first]
            (value,) = struct.unpack_from(form, self.data, self.position)
            self.position += struct.calcsize(form)
            return bool(value) if first == "b" else value
        if first in "sog":
            size = self.take("y") if first == "g" else self.take("u")
            text = self.data[self.position : self.position + size]
            self.position += size + 1
            return text.decode()
        if first == "v":
            inner = self.take("g")
            return inner, self.take(inner)
        if first == "a":
            size = self.take("u")
            self.align(_ALIGNMENTS.get(kind[1], 4))
            end = self.position + size
            found = []
            while self.position < end:
                found.append(self.take(kind[1:]))
            return found
        return tuple(self.take(inner) for inner in split(kind[1:-1]))


def marshal(signature: str, values: Sequence[Any]) -> bytes:
    """A body."""
    writer = _Writer()
    for kind, value in zip(split(signature), values, strict=True):
        writer.put(kind, value)
    return bytes(writer.data)


def unmarshal(signature: str, data: bytes) -> tuple[Any, ...]:
    """Likewise back; ValueError for what is no such body."""
    reader = _Reader(data)
    try:
        return tuple(reader.take(kind) for kind in split(signature))
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"no body of type {signature}: {error}") from error


class Connection:
    """A connection to a peer that needs no bus in between, authenticated as this process's user."""

    def __init__(self, path: str, *, timeout_s: float = 30.0) -> None:
        """Connect to the socket `path`; Unavailable if nobody listens or we are not wanted."""
        self._serial = 0
        self._kept: list[Message] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout_s)
        self._path = path
        try:
            self._sock.connect(path)
            identity = str(os.geteuid()).encode().hex()
            self._sock.sendall(b"\0AUTH EXTERNAL " + identity.encode() + b"\r\n")
            answer = b""
            while not answer.endswith(b"\r\n"):
                answer += self._sock.recv(1) or b"\r\n"
            if not answer.startswith(b"OK"):
                raise Unavailable(f"{path} refuses this user: {answer.decode().strip()}")
            self._sock.sendall(b"BEGIN\r\n")
        except OSError as error:
            self._sock.close()
            raise Unavailable(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "",
        *values: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Call a method; its answer's values. CallFailed if that is an error."""
        self._serial += 1
        body = marshal(signature, values)
        given = {_PATH: path, _INTERFACE: interface, _MEMBER: member, _DESTINATION: destination}
        if signature:
            given[_SIGNATURE] = signature
        fields = [(number, (_FIELDS[number], text)) for number, text in given.items()]
        head = (ord("l"), METHOD_CALL, 0, 1, len(body), self._serial, fields)
        data = marshal("yyyyuua(yv)", head)
        try:
            self._sock.sendall(data + bytes(-len(data) % 8) + body)
        except OSError as error:
            raise Unavailable(f"{self._path}: {error.strerror or error}") from error
        while True:
            message = self._receive()
            if message.reply_to != self._serial:
                self._kept.append(message)
            elif message.kind == ERROR:
                raise CallFailed(message.error, str(message.body[0]) if message.body else "")
            else:
                return message.body

    def signal(self) -> Message:
        """The next signal; Unavailable if none comes in time."""
        while True:
            message = self._kept.pop(0) if self._kept else self._receive()
            if message.kind == SIGNAL:
                return message

    def _receive(self) -> Message:
        try:
            head = self._exactly(16)
            length, fields = struct.unpack_from("<I", head, 4)[0], struct.unpack("<I", head[12:])[0]
            if head[:1] != b"l" or length > _MOST or fields > _MOST:
                raise Unavailable(f"{self._path} does not speak D-Bus as we do")
            rest = self._exactly(fields + -fields % 8 + length)
        except OSError as error:
            raise Unavailable(f"{self._path}: {error.strerror or error}") from error
        try:
            found = unmarshal("yyyyuua(yv)", head + rest[:fields])[-1]
            known = {number: value for number, (_, value) in found}
            body = unmarshal(str(known.get(_SIGNATURE, "")), rest[len(rest) - length :])
        except ValueError as error:
            raise Unavailable(f"{self._path}: {error}") from error
        return Message(
            head[1], str(known.get(_MEMBER, "")), str(known.get(_ERROR_NAME, "")),
            int(known.get(_REPLY_TO, 0)), body,
        )  # fmt: skip

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                raise Unavailable(f"{self._path} hung up")
            data += piece
        return bytes(data)
