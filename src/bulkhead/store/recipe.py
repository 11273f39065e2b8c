"""A layer's recipe: how to give back the exact bytes of the archive it came from.

A zstd stream of records: "L" length bytes (headers, padding, the trailer) and "C" offset length
(a body, which lies in the layer's EROFS image), closed by "E" with the total. Integers are
little-endian u64. Bodies are named by place, so entries that were replaced later are still there.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from bulkhead.errors import Corrupt
from bulkhead.store.codecs import zstd

MAGIC = b"bulkhead recipe 1\n"
_LITERAL = struct.Struct("<cQ")
_COPY = struct.Struct("<cQQ")
_PIECE = 1 << 20


class RecipeWriter:
    """Records literals and copies in stream order into `out`; close() completes it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._zstd = zstd.ZstdCompressor(level=3)
        self._literals: list[bytes] = []
        self._size = 0
        self._records: list[bytes] = [MAGIC]
        self._records_size = len(MAGIC)
        self._copy_at = self._copy_end = 0
        self.total = 0

    def literal(self, data: bytes) -> None:
        """Bytes that are in the archive but in no file's body."""
        if self._copy_end != self._copy_at:
            self._flush_copy()
        self._literals.append(data)
        self._size += len(data)
        if self._size > _PIECE:
            self._flush_literals()

    def copy(self, offset: int, length: int) -> None:
        """`length` bytes that were stored at `offset` of the image."""
        if not length:
            return
        if self._copy_end != self._copy_at:
            if offset == self._copy_end:
                self._copy_end += length
                return
            self._flush_copy()
        self._copy_at, self._copy_end = offset, offset + length

    def _record(self, data: bytes) -> None:
        self._records.append(data)
        self._records_size += len(data)
        if self._records_size > _PIECE:
            self._out.write(self._zstd.compress(b"".join(self._records)))
            self._records.clear()
            self._records_size = 0

    def _flush_literals(self) -> None:
        data = b"".join(self._literals)
        self._literals.clear()
        self._size = 0
        if data:
            self.total += len(data)
            self._record(_LITERAL.pack(b"L", len(data)) + data)

    def _flush_copy(self) -> None:
        self._flush_literals()
        length = self._copy_end - self._copy_at
        self.total += length
        self._record(_COPY.pack(b"C", self._copy_at, length))
        self._copy_end = self._copy_at

    def close(self) -> None:
        """Write what is pending and the closing record."""
        if self._copy_end != self._copy_at:
            self._flush_copy()
        self._flush_literals()
        self._record(_LITERAL.pack(b"E", self.total))
        self._out.write(self._zstd.compress(b"".join(self._records)))
        self._out.write(self._zstd.flush())


class _Stream:
    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._zstd = zstd.ZstdDecompressor()

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, at least one; Corrupt at the end of the stream."""
        while True:
            if self._zstd.eof:
                raise Corrupt("a layer's recipe ends early")
            data = b""
            if self._zstd.needs_input:
                data = self._source.read(1 << 16)
                if not data:
                    raise Corrupt("a layer's recipe ends early")
            try:
                piece = self._zstd.decompress(data, count)
            except zstd.ZstdError as error:
                raise Corrupt(f"a layer's recipe is damaged: {error}") from error
            if piece:
                return piece

    def exactly(self, count: int) -> bytes:
        """`count` bytes; Corrupt if the stream ends first."""
        pieces = []
        while count:
            piece = self.read(count)
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def replay(recipe: BinaryIO, image: int) -> Iterator[bytes]:
    """The archive's bytes, from its recipe and the image open as descriptor `image`.

    Corrupt if either is damaged in structure; the caller compares the digest.
    """
    stream = _Stream(recipe)
    if stream.exactly(len(MAGIC)) != MAGIC:
        raise Corrupt("a layer's recipe has an unknown format")
    total = 0
    while True:
        kind, first = _LITERAL.unpack(stream.exactly(_LITERAL.size))
        if kind == b"E":
            if first != total:
                raise Corrupt("a layer's recipe has a wrong total")
            return
        if kind == b"L":
            total += first
            while first:
                piece = stream.read(min(first, _PIECE))
                first -= len(piece)
                yield piece
            continue
        if kind != b"C":
            raise Corrupt("a layer's recipe has an unknown record")
        left = int.from_bytes(stream.exactly(8), "little")
        total += left
        while left:
            piece = os.pread(image, min(left, _PIECE), first)
            if not piece:
                raise Corrupt("a layer's image is shorter than its recipe says")
            first += len(piece)
            left -= len(piece)
            yield piece
