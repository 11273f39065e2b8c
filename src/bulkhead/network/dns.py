"""DNS messages, as far as a resolver for local names needs them: RFC 1035, 3596, 6891.

Pure functions over bytes from untrusted peers: whatever does not parse raises `Malformed`.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from socket import AF_INET6, inet_ntop

A, PTR, AAAA, OPT, ANY = 1, 12, 28, 41, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
TTL_S = 5
"""Short, since a workload's address changes with its restart."""
UDP_PLAIN = 512
UDP_OURS = 1232
_HEAD = struct.Struct(">HHHHHH")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080


class Malformed(ValueError):
    """Not a message we understand; `identity` is its id if there was one, else -1."""

    def __init__(self, why: str, identity: int = -1) -> None:
        super().__init__(why)
        self.identity = identity


@dataclass(frozen=True, slots=True)
class Query:
    """A question: `name` in lower case without the final dot, `raw` the question's own bytes."""

    identity: int
    flags: int
    opcode: int
    name: str
    kind: int
    klass: int
    raw: bytes
    udp_size: int
    """What the asker can take in one datagram."""
    extended: bool


def parse_query(message: bytes) -> Query:
    """The query in a message with exactly one question."""
    if len(message) < 12:
        raise Malformed("shorter than a header")
    identity, flags, questions, answers, _authorities, extras = _HEAD.unpack_from(message)
    if flags & _QR:
        raise Malformed("an answer, not a question")
    if questions != 1 or answers:
        raise Malformed(f"{questions} questions, {answers} answers", identity)
    name, end = _question_name(message, identity)
    if end + 4 > len(message):
        raise Malformed("cut off in the question", identity)
    kind, klass = struct.unpack_from(">HH", message, end)
    end += 4
    size, extended = UDP_PLAIN, False
    # Only the usual form: OPT right after the question. Others just get small answers.
    if extras and len(message) >= end + 11 and message[end : end + 3] == b"\0\0\x29":
        extended = True
        size = max(UDP_PLAIN, min(UDP_OURS, int.from_bytes(message[end + 3 : end + 5], "big")))
    opcode = flags >> 11 & 15
    return Query(identity, flags, opcode, name, kind, klass, bytes(message[12:end]), size, extended)


def _question_name(message: bytes, identity: int) -> tuple[str, int]:
    labels = []
    offset = 12
    while True:
        if offset >= len(message):
            raise Malformed("cut off in a name", identity)
        size = message[offset]
        offset += 1
        if size == 0:
            break
        if size > 63:
            raise Malformed("a compressed or unknown label in a question", identity)
        if offset + size > len(message) or offset + size - 12 > 254:
            raise Malformed("a name that is cut off or too long", identity)
        labels.append(message[offset : offset + size])
        offset += size
    return b".".join(labels).decode("latin-1").lower(), offset


def encode_name(name: str) -> bytes:
    """A name's labels; ValueError if one is empty or too long."""
    made = bytearray()
    for label in name.encode("latin-1").split(b"."):
        if not 0 < len(label) < 64:
            raise ValueError(f"bad label in {name}")
        made.append(len(label))
        made += label
    if len(made) > 254:
        raise ValueError(f"name too long: {name}")
    return bytes(made) + b"\0"


def answer(
    query: Query,
    records: Iterable[tuple[int, bytes]] = (),
    *,
    code: int = NOERROR,
    stream: bool = False,
) -> bytes:
    """An answer to `query` with (type, data) records for its name; truncated to what fits."""
    flags = _QR | _RA | (query.flags & (_RD | 0x7800)) | code
    limit = 65535 if stream else query.udp_size
    opt = b"\0" + struct.pack(">HHIH", OPT, UDP_OURS, 0, 0) if query.extended else b""
    body = bytearray()
    count = 0
    room = limit - 12 - len(query.raw) - len(opt)
    for kind, data in records:
        # 0xC00C: the name of the question, which stands at offset 12.
        one = struct.pack(">HHHIH", 0xC00C, kind, IN, TTL_S, len(data)) + data
        if len(body) + len(one) > room:
            flags |= _TC
            break
        body += one
        count += 1
    head = _HEAD.pack(query.identity, flags, 1, count, 0, 1 if opt else 0)
    return head + query.raw + bytes(body) + opt


def refusal(identity: int, code: int) -> bytes:
    """An answer without question, for messages that did not parse."""
    return _HEAD.pack(identity, _QR | _RA | code, 0, 0, 0, 0)


def fits(response: bytes, query: Query, identity: int) -> bool:
    """Whether a server's response belongs to the query we sent it as `identity`."""
    if len(response) < 12:
        return False
    got, flags, questions, *_ = _HEAD.unpack_from(response)
    if got != identity or not flags & _QR:
        return False
    if questions == 0:
        # Errors may come without the question.
        return bool(flags & 15 != NOERROR)
    raw = query.raw
    return bool(questions == 1) and response[12 : 12 + len(raw)].lower() == raw.lower()


def with_identity(message: bytes, identity: int) -> bytes:
    """The message under another id."""
    return identity.to_bytes(2, "big") + message[2:]


def reverse_address(name: str) -> str | None:
    """The address that a name under in-addr.arpa or ip6.arpa stands for."""
    if name.endswith(".in-addr.arpa"):
        parts = name[:-13].split(".")
        if len(parts) == 4 and all(p.isascii() and p.isdigit() and len(p) < 4 for p in parts):
            return ".".join(str(int(part)) for part in reversed(parts))
    if name.endswith(".ip6.arpa"):
        digits = name[:-9].split(".")
        if len(digits) == 32 and all(len(d) == 1 and d in "0123456789abcdef" for d in digits):
            packed = bytes.fromhex("".join(reversed(digits)))
            return inet_ntop(AF_INET6, packed)
    return None
