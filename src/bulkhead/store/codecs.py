"""Compression: streaming decompressors behind one face, and our own reproducible compressors."""

import bz2
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from isal import igzip_lib, isal_zlib

from bulkhead.errors import Corrupt, Invalid

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["COMPRESSORS", "compress", "decompress", "detect", "zstd"]

_OUT = 1 << 20
_WHOLE = 1 << 18
_WINDOW_LOG_MAX = 27
"""zstd windows above 128 MiB are refused, as other clients do: they are memory we would hold."""


class _Member(Protocol):
    """One member (frame) of a compressed stream, in the manner of bz2.BZ2Decompressor."""

    @property
    def eof(self) -> bool:
        """Whether its end was reached."""

    @property
    def needs_input(self) -> bool:
        """Whether no more output is to be had from what was fed."""

    @property
    def unused_data(self) -> bytes:
        """What followed its end."""

    def decompress(self, data: "Buffer", max_length: int = -1) -> bytes:
        """Feed and take."""


def _gzip() -> _Member:
    member: _Member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return member


def _zstd() -> _Member:
    parameter: Any = zstd.DecompressionParameter.window_log_max
    member: _Member = zstd.ZstdDecompressor(options={parameter: _WINDOW_LOG_MAX})
    return member


_MEMBERS: dict[str, Callable[[], _Member]] = {
    "gzip": _gzip,
    "zstd": _zstd,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=256 << 20),
}
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
)
_ISAL_ERROR: Any = isal_zlib.error
_ERRORS: tuple[type[Exception], ...] = (
    _ISAL_ERROR,
    zstd.ZstdError,
    lzma.LZMAError,
    OSError,
    EOFError,
    ValueError,
)


def detect(start: bytes) -> str:
    """The compression a stream with these first bytes (6 or more) has; "" for none we know."""
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    if len(start) >= 4 and start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F:
        return "zstd"
    return ""


def decompress(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """What `chunks` hold, in pieces of at most 1 MiB; every member of multi-member streams.

    Corrupt if the stream is damaged, ends early or is followed by something else.
    """
    if not compression:
        yield from (chunk for chunk in chunks if chunk)
        return
    try:
        make = _MEMBERS[compression]
    except KeyError:
        raise Invalid(f"unknown compression {compression!r}") from None
    member: _Member | None = None
    for chunk in chunks:
        data = bytes(chunk)
        while data:
            if member is None:
                member = make()
            piece = _feed(member, data, compression)
            if piece:
                yield piece
            while not member.eof and not member.needs_input:
                if piece := _feed(member, b"", compression):
                    yield piece
            data = b""
            if member.eof:
                data = member.unused_data
                member = None
    if member is not None:
        raise Corrupt(f"the {compression} stream ends early")


def _feed(member: _Member, data: bytes, compression: str) -> bytes:
    try:
        return member.decompress(data, _OUT)
    except _ERRORS as error:
        raise Corrupt(f"the {compression} stream is damaged: {error}") from error


def _compress_gzip(level: int) -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    def run(chunks: Iterable[bytes]) -> Iterator[bytes]:
        # wbits 31: a gzip wrapper without name or time, so equal input gives equal bytes.
        packer = isal_zlib.compressobj(level, isal_zlib.DEFLATED, 31)
        for chunk in chunks:
            if piece := packer.compress(chunk):
                yield piece
        yield packer.flush()

    return run


def _compress_zstd(level: int) -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    def run(chunks: Iterable[bytes]) -> Iterator[bytes]:
        packer = zstd.ZstdCompressor(level=level)
        for chunk in chunks:
            if piece := packer.compress(chunk):
                yield piece
        yield packer.flush()

    return run


COMPRESSORS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    "isal-gzip-1": _compress_gzip(1),
    "isal-gzip-2": _compress_gzip(2),
    "zstd-3": _compress_zstd(3),
}
"""By the name that provenance records; a name's output must never change, so levels are frozen."""

DEFAULT_COMPRESSOR = {"gzip": "isal-gzip-2", "zstd": "zstd-3"}


def compress(chunks: Iterable[bytes], compressor: str) -> Iterator[bytes]:
    """`chunks` compressed by one of COMPRESSORS; the result depends on the joined bytes only."""
    return COMPRESSORS[compressor](_whole(chunks))


def _whole(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of one fixed size: deflate's output may depend on how its input was cut."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while len(pending) >= _WHOLE:
            yield bytes(pending[:_WHOLE])
            del pending[:_WHOLE]
    if pending:
        yield bytes(pending)
