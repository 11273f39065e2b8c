"""HTTP/1.1 messages as bytes: parsing request heads and chunked bodies, writing response heads.

Pure and strict (RFC 9112): what is ambiguous is refused, since a proxy in front may read it
otherwise. No line folding, no body with two lengths, no other transfer coding than `chunked`, no
control character in a header. All sizes are bounded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote

from bulkhead.errors import BulkheadError

MAX_HEAD = 64 << 10
"""Bytes of request line and headers; `X-Registry-Config` is the longest there is."""
MAX_HEADERS = 128
MAX_FIELDS = 256
"""Parameters in a query."""
_MAX_CHUNK_LINE = 4096
_TRAILER = 8 << 10

_REQUEST = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\x20-\x7e\t\x80-\xff]*?)[ \t]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\x20-\x7e\t]*)?")
_REASONS = {status.value: status.phrase for status in HTTPStatus} | {101: "UPGRADED"}


class BadRequest(BulkheadError):
    """Bytes that are no request; the connection ends after the answer `status`."""

    category = "invalid"

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Head:
    """A request without its body."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    """By lower-case name; one that came several times is joined by commas."""
    minor: int = 1
    length: int = 0
    """Bytes of the body; -1: chunked."""
    keep_alive: bool = True
    expects: bool = False
    """Whether the client waits for "100 Continue"."""
    upgrade: bool = False
    raw_query: str = ""
    version: tuple[int, int] = field(default=(0, 0))
    """The API version that its path asked for."""


def parse_head(data: bytes) -> Head:
    """The request whose head is `data`, without the empty line at its end."""
    lines = data.split(b"\r\n")
    match = _REQUEST.fullmatch(lines[0])
    if match is None:
        raise BadRequest("malformed request line")
    method, target, minor = match[1].decode(), match[2].decode(), int(match[3])
    if len(lines) > MAX_HEADERS:
        raise BadRequest("too many header lines", 431)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise BadRequest("malformed header line")
        name, value = header[1].decode().lower(), header[2].decode("latin-1")
        if name in headers:
            if name in {"host", "content-length", "transfer-encoding", "content-type"}:
                raise BadRequest(f"more than one header {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    path, query = _target(target, method)
    connection = headers.get("connection", "").lower()
    return Head(
        method=method,
        path=path,
        query=_query(query),
        headers=headers,
        minor=minor,
        length=_length(headers, minor),
        keep_alive="close" not in connection if minor else "keep-alive" in connection,
        expects=minor == 1 and headers.get("expect", "").lower() == "100-continue",
        upgrade="upgrade" in connection and "upgrade" in headers,
        raw_query=query,
    )


def _target(target: str, method: str) -> tuple[str, str]:
    """(decoded path, query) of a request target; absolute forms lose scheme and host."""
    if target.startswith(("http://", "https://")):
        target = "/" + target.partition("://")[2].partition("/")[2]
    if target == "*" and method == "OPTIONS":
        target = "/"
    if not target.startswith("/"):
        raise BadRequest("malformed request target")
    raw, _, query = target.partition("#")[0].partition("?")
    path = unquote(raw, errors="surrogateescape")
    if "\0" in path or not path.isprintable():
        raise BadRequest("malformed path")
    return path, query


def _query(text: str) -> dict[str, list[str]]:
    if not text:
        return {}
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
    except ValueError:
        raise BadRequest("malformed query") from None


def _length(headers: Mapping[str, str], minor: int) -> int:
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None or minor == 0:
            raise BadRequest("unsupported transfer encoding", 501 if length is None else 400)
        return -1
    if length is None:
        return 0
    if not length.isascii() or not length.isdigit() or len(length) > 18:
        raise BadRequest("malformed content length")
    return int(length)


class Body:
    """Takes a body out of a buffer of received bytes: of known length or chunked."""

    __slots__ = ("_left", "_state", "done")

    def __init__(self, length: int) -> None:
        self._left = max(length, 0)
        self._state = "size" if length < 0 else "plain"
        self.done = length == 0

    def take(self, buffer: bytearray) -> bytes:
        """The next part of the body, removed from `buffer`; b"" if more bytes are needed."""
        if self._state == "plain":
            part = bytes(buffer[: self._left])
            del buffer[: len(part)]
            self._left -= len(part)
            self.done = not self._left
            return part
        found = bytearray()
        while not self.done and self._step(buffer, found):
            pass
        return bytes(found)

    def _step(self, buffer: bytearray, found: bytearray) -> bool:
        """One step of the chunked coding; False if bytes are missing."""
        if self._state == "data":
            part = buffer[: self._left]
            del buffer[: len(part)]
            found += part
            self._left -= len(part)
            if self._left:
                return False
            self._state = "end"
        if self._state == "end":
            if len(buffer) < 2:
                return False
            if buffer[:2] != b"\r\n":
                raise BadRequest("malformed chunk")
            del buffer[:2]
            self._state = "size"
        line = self._line(buffer, _TRAILER if self._state == "trailer" else _MAX_CHUNK_LINE)
        if line is None:
            return False
        if self._state == "trailer":
            self.done = not line
            return True
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise BadRequest("malformed chunk size")
        self._left = int(match[1], 16)
        self._state = "data" if self._left else "trailer"
        return True

    @staticmethod
    def _line(buffer: bytearray, limit: int) -> bytes | None:
        end = buffer.find(b"\r\n", 0, limit + 2)
        if end < 0:
            if len(buffer) > limit:
                raise BadRequest("a line of the chunked body is too long")
            return None
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line


def head(status: int, headers: Mapping[str, str]) -> bytes:
    """A response's head with its empty line."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    text = "\r\n".join(lines)
    return text.replace("\0", "").encode("latin-1", "replace") + b"\r\n\r\n"
