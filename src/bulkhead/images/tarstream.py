"""Reading an image archive, a tar with few big members, in one pass from any stream.

Only what image archives hold is understood: files, links, directories; long names by GNU or pax
headers; sizes in octal or base 256 (tar(5)). Names are never used as paths on disk.
"""

import bz2
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

from isal import igzip_lib

from bulkhead.errors import Corrupt, Invalid

try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from backports import zstd

BLOCK = 512
_CHUNK = 256 << 10
_LONGEST_HEADER = 1 << 20
_MOST_MEMBERS = 200_000


class Source(Protocol):
    """Anything bytes can be read from in order."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; b"" at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `kind` is the tar type flag ("0" file, "1" hard, "2" symbolic link, "5" …)."""

    name: str
    kind: str
    size: int
    target: str


class _Engine(Protocol):
    """What bz2, lzma, zstd and igzip decompressors have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Inflating:
    """Presents a decompressor's output as a readable stream, holding at most a chunk of it."""

    def __init__(self, source: Source, kind: str) -> None:
        self._source = source
        self._kind = kind
        self._engine = _decompressor(kind)
        self._next = b""

    def read(self, size: int, /) -> bytes:
        try:
            while True:
                if self._engine.eof and not self._restart():
                    return b""
                data, self._next = self._next, b""
                if not data and self._engine.needs_input:
                    data = self._source.read(_CHUNK)
                    if not data:
                        raise Corrupt(f"the archive ends in the middle of its {self._kind} data")
                if piece := self._engine.decompress(data, size):
                    return piece
        except _DAMAGED as error:
            raise Corrupt(f"the archive's {self._kind} data is damaged: {error}") from error

    def _restart(self) -> bool:
        """Begin a further compressed stream behind the ended one, if there is one."""
        rest = self._engine.unused_data.lstrip(b"\0")
        while not rest:
            data = self._source.read(_CHUNK)
            if not data:
                return False
            rest = data.lstrip(b"\0")
        self._engine, self._next = _decompressor(self._kind), rest
        return True


_IGZIP_ERROR = cast("type[Exception]", igzip_lib.error)  # its stub calls it an instance
_DAMAGED: tuple[type[Exception], ...] = (_IGZIP_ERROR, lzma.LZMAError, zstd.ZstdError, OSError)


def _decompressor(kind: str) -> _Engine:
    engine: _Engine
    if kind == "gzip":
        engine = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    elif kind == "zstd":
        engine = zstd.ZstdDecompressor()
    elif kind == "xz":
        engine = lzma.LZMADecompressor(memlimit=512 << 20)
    else:
        engine = bz2.BZ2Decompressor()
    return engine


_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
)


def compression_of(head: bytes) -> str:
    """Which compression `head`, the first bytes of a file, announces; "" if none."""
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")


class _Pushed:
    """A source with its first bytes put back."""

    def __init__(self, head: bytes, source: Source) -> None:
        self._head, self._source = head, source

    def read(self, size: int, /) -> bytes:
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
            return piece
        return self._source.read(size)


def opened(file: BinaryIO | Source) -> tuple[Source, str]:
    """The plain tar stream within `file`, and the compression that was found around it."""
    head = b""
    while len(head) < 6 and (piece := file.read(6 - len(head))):
        head += piece
    kind = compression_of(head)
    source: Source = _Pushed(head, file)
    return (_Inflating(source, kind) if kind else source), kind


def looks_like_tar(block: bytes) -> bool:
    """Whether a file starting with `block` is a tar: its header's sum is right, or it is empty."""
    if len(block) < BLOCK:
        return False
    head = block[:BLOCK]
    if not head.strip(b"\0"):
        return True
    try:
        return _number(head[148:156]) == sum(head) - sum(head[148:156]) + 8 * 32
    except Corrupt:
        return False


def _number(data: bytes) -> int:
    if data[0] & 0x80:
        return int.from_bytes(data, "big") & ((1 << (8 * len(data) - 1)) - 1)
    text = data.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise Corrupt("the archive has a damaged member header") from None


class TarReader:
    """Iterates members; between two steps `chunks()` or `read()` give the current one's content."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._padding = 0
        self._overrides: dict[str, str] = {}

    def _exactly(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size and (piece := self._source.read(size)):
            pieces.append(piece)
            size -= len(piece)
        if size:
            raise Corrupt("the archive is cut short")
        return b"".join(pieces)

    def chunks(self) -> Iterator[bytes]:
        """The current member's remaining content."""
        while self._left:
            piece = self._source.read(min(_CHUNK, self._left))
            if not piece:
                raise Corrupt("the archive is cut short")
            self._left -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        """Exactly the next `size` bytes of the current member, or all that it still has."""
        data = self._exactly(min(size, self._left))
        self._left -= len(data)
        return data

    def _skip(self) -> None:
        for _ in self.chunks():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        for _ in range(_MOST_MEMBERS):
            member = self._next()
            if member is None:
                return
            yield member
        raise Invalid(f"the archive has more than {_MOST_MEMBERS} members: not an image archive")

    def _next(self) -> Member | None:
        long: dict[str, str] = {}
        while True:
            self._skip()
            first = self._source.read(BLOCK)
            if not first:
                return None
            head = first + self._exactly(BLOCK - len(first))
            if not head.strip(b"\0"):
                return None
            if not looks_like_tar(head):
                raise Invalid("the file is not a tar archive (or is damaged)")
            kind = chr(head[156]) if head[156] else "0"
            size = int(long.get("size") or 0) if "size" in long else _number(head[124:136])
            self._left = 0 if kind in "12345" else size
            self._padding = -self._left % BLOCK
            if kind not in "LKxg":
                return _member(head, kind, size, long)
            if size > _LONGEST_HEADER:
                raise Corrupt("the archive has an extended header of impossible size")
            data = self.read(size)
            if kind == "x":
                long.update(_pax(data))
            elif kind in "LK":
                long["path" if kind == "L" else "linkpath"] = _text(data)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """The records of a pax extended header (pax(1), "%d %s=%s\\n")."""
    records: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            raise Corrupt("the archive has a damaged pax header")
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    if not records.get("size", "0").isdigit():
        raise Corrupt("the archive has a damaged pax header")
    return records


def _member(head: bytes, kind: str, size: int, long: dict[str, str]) -> Member:
    name = _text(head[:100])
    if head[257:263] == b"ustar\0" and head[345]:
        name = _text(head[345:500]) + "/" + name
    return Member(long.get("path", name), kind, size, long.get("linkpath", _text(head[157:257])))
