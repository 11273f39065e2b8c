"""Netlink sockets: messages, attributes, batches, dumps and errors with the kernel's own words.

netlink(7); the layout of extended acknowledgements is in linux/netlink.h. rtnetlink and nfnetlink
build on this in `linux/rtnetlink.py` and `linux/nftables.py`.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

F_REQUEST = 0x1
F_MULTI = 0x2
F_ACK = 0x4
F_ROOT = 0x100
F_MATCH = 0x200
F_DUMP = F_ROOT | F_MATCH
F_REPLACE = 0x100
F_EXCL = 0x200
F_CREATE = 0x400
F_APPEND = 0x800
F_CAPPED = 0x100
F_ACK_TLVS = 0x200
F_DUMP_INTR = 0x10

_ERROR = 2
_DONE = 3
_SOL_NETLINK = 270
_CAP_ACK = 10
_EXT_ACK = 11
_STRICT_CHECK = 12
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_INT = struct.Struct("=i")
_RECEIVE = 1 << 16
_PATIENCE_S = 30


class NetlinkError(OSError):
    """The kernel refused a message; `extack` is its own explanation if it gave one.

    `index` is the position of the refused message in the batch.
    """

    def __init__(self, errno: int, what: str, extack: str, index: int) -> None:
        text = os.strerror(errno) + (f" ({extack})" if extack else "")
        super().__init__(errno, f"{what}: {text}" if what else text)
        self.extack = extack
        self.index = index


@dataclass(frozen=True, slots=True)
class Message:
    """One request: type, flags beside F_REQUEST, family header plus attributes, and a name."""

    kind: int
    flags: int
    payload: bytes
    what: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One message that came back: its type, flags and payload without the netlink header."""

    kind: int
    flags: int
    payload: bytes


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    size = len(value) + 4
    return _ATTRIBUTE.pack(size, kind) + value + b"\0" * (-size & 3)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes, marked as such (NLA_F_NESTED)."""
    return attribute(kind | _NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A string attribute, NUL-terminated."""
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host order."""
    return attribute(kind, struct.pack("=I", value))


def be32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network order."""
    return attribute(kind, struct.pack(">I", value))


def u8(kind: int, value: int) -> bytes:
    """An 8-bit attribute."""
    return attribute(kind, bytes((value,)))


def u16(kind: int, value: int) -> bytes:
    """A 16-bit attribute in host order."""
    return attribute(kind, struct.pack("=H", value))


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data` from `offset` on, as (type without flags, value)."""
    end = len(data)
    while offset + 4 <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4 or offset + size > end:
            raise OSError(74, "malformed netlink attribute")
        yield kind & _TYPE_MASK, data[offset + 4 : offset + size]
        offset += (size + 3) & ~3


def table(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` by type; of repeated ones the last."""
    return dict(attributes(data, offset))


def string(value: bytes) -> str:
    """The text of a string attribute's value."""
    return value.split(b"\0", 1)[0].decode(errors="surrogateescape")


class Netlink:
    """A netlink socket of the network namespace in which the creating thread is.

    Not safe for concurrent use. It stays in its namespace wherever the process goes later, and
    keeps that namespace alive.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        try:
            self._socket.bind((0, 0))
            for option in (_CAP_ACK, _EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            # A dump or a burst of errors must not overflow: requests are answered within sendmsg.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            # Not settimeout(): that costs a poll(2) before each call.
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _PATIENCE_S, 0)
            )
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def fileno(self) -> int:
        """The socket's descriptor, still owned by this object."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def transact(self, messages: Sequence[Message]) -> None:
        """Send `messages` in one system call; NetlinkError for the first the kernel refused.

        The kernel carries out the others nevertheless (except nfnetlink batches, which are all or
        nothing): the caller undoes.
        """
        if not messages:
            return
        first = self._sequence + 1
        last = first + len(messages) - 1
        self._sequence = last
        parts = []
        for number, message in enumerate(messages, first):
            flags = message.flags | F_REQUEST | (F_ACK if number == last else 0)
            size = len(message.payload) + 16
            parts.append(_HEADER.pack(size, message.kind, flags, number, 0))
            parts.append(message.payload)
            parts.append(b"\0" * (-size & 3))
        self._socket.sendall(b"".join(parts))
        failure: NetlinkError | None = None
        while True:
            acknowledged = False
            for kind, flags, sequence, payload in self._receive():
                if not first <= sequence <= last or kind != _ERROR:
                    continue
                index = sequence - first
                error = _error(payload, flags, messages[index].what, index)
                if error is not None and (failure is None or index < failure.index):
                    failure = error
                acknowledged = acknowledged or sequence == last
            if acknowledged:
                break
        if failure is not None:
            raise failure

    def batch(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """An nfnetlink batch: all of `messages` happen or none; NetlinkError for the first bad one.

        The acknowledgement is asked of the last message, not of `end`, since older kernels do not
        give one for that.
        """
        if not messages:
            return
        everything = (begin, *messages, end)
        first = self._sequence + 1
        last = first + len(messages)
        self._sequence = last + 1
        parts = []
        for number, message in enumerate(everything, first):
            flags = message.flags | F_REQUEST | (F_ACK if number == last else 0)
            size = len(message.payload) + 16
            parts.append(_HEADER.pack(size, message.kind, flags, number, 0))
            parts.append(message.payload)
            parts.append(b"\0" * (-size & 3))
        self._socket.sendall(b"".join(parts))
        failure: NetlinkError | None = None
        waiting = True
        while waiting:
            for kind, flags, sequence, payload in self._receive():
                if not first <= sequence <= last + 1 or kind != _ERROR:
                    continue
                index = sequence - first - 1
                what = everything[index + 1].what
                error = _error(payload, flags, what, index)
                if error is not None and (failure is None or index < failure.index):
                    failure = error
                # An error for the begin message speaks for the whole batch: nothing else comes.
                waiting = waiting and sequence not in (first, last)
        self._drain()
        if failure is not None:
            raise failure

    def request(self, message: Message) -> Reply:
        """Send one message that is answered by one; NetlinkError if by an error."""
        for reply in self._ask(message, 0):
            return reply
        raise OSError(74, f"{message.what}: no answer")

    def dump(self, message: Message) -> list[Reply]:
        """Every answer to a dump request; retried while the kernel says it was interrupted."""
        replies: list[Reply] = []
        for _ in range(16):
            replies = list(self._ask(message, F_DUMP))
            if not any(reply.flags & F_DUMP_INTR for reply in replies):
                break
        return replies

    def _ask(self, message: Message, flags: int) -> Iterator[Reply]:
        self._sequence += 1
        own = self._sequence
        self._socket.sendall(
            _HEADER.pack(
                len(message.payload) + 16, message.kind, message.flags | F_REQUEST | flags, own, 0
            )
            + message.payload
        )
        found: list[Reply] = []
        while True:
            for kind, answer_flags, sequence, payload in self._receive():
                if sequence != own:
                    continue
                if kind == _DONE:
                    return iter(found)
                if kind == _ERROR:
                    error = _error(payload, answer_flags, message.what, 0)
                    if error is not None:
                        raise error
                    return iter(found)
                found.append(Reply(kind, answer_flags, payload))
                if not flags:
                    return iter(found)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """The messages of one datagram: type, flags, sequence, payload."""
        try:
            data = self._socket.recv(_RECEIVE)
        except BlockingIOError:
            raise TimeoutError(110, f"netlink did not answer within {_PATIENCE_S} s") from None
        offset = 0
        while offset + 16 <= len(data):
            size, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
            if size < 16 or offset + size > len(data):
                raise OSError(74, "malformed netlink message")
            yield kind, flags, sequence, data[offset + 16 : offset + size]
            offset += (size + 3) & ~3

    def _drain(self) -> None:
        """Throw away what is still queued: answers of a batch that was already judged."""
        while True:
            try:
                self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return


def _error(payload: bytes, flags: int, what: str, index: int) -> NetlinkError | None:
    """The error in an NLMSG_ERROR payload, None for an acknowledgement."""
    (negative,) = _INT.unpack_from(payload)
    if negative == 0:
        return None
    explanation = ""
    if flags & F_ACK_TLVS:
        (original,) = struct.unpack_from("=I", payload, 4)
        offset = 4 + (16 if flags & F_CAPPED else (original + 3) & ~3)
        explanation = string(table(payload, offset).get(1, b""))
    return NetlinkError(-negative, what, explanation, index)
