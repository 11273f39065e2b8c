"""The kernel inside a Linux x86 bzImage: what PVH boot needs is the ELF image, uncompressed.

The layout is that of Documentation/arch/x86/boot.rst: a real-mode part of `setup_sects` sectors,
then the protected-mode part, in which `payload_offset` and `payload_length` say where the
compressed ELF image lies; its last four bytes are its uncompressed size.
"""

import lzma
import struct
import sys
import zlib
from collections.abc import Callable

from bulkhead.errors import Invalid, Unsupported

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_SIZE = 512 << 20
"""Bytes of an uncompressed kernel, at most."""

_SETUP_SECTS = 0x1F1
_MAGIC = 0x202
_PAYLOAD = 0x248
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0"
"""XEN_ELFNOTE_PHYS32_ENTRY with a 32-bit entry: where a PVH loader jumps."""
_PVH_NOTE_64 = struct.pack("<III", 4, 8, 18) + b"Xen\0"

_DAMAGED = (
    ValueError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zstd.ZstdError,
)


def extract(image: bytes) -> bytes:
    """The ELF image inside bzImage `image`; an ELF image is given back as it is.

    Invalid if it is neither, or damaged; Unsupported for a compression without a decoder here.
    """
    if image[:4] == b"\x7fELF":
        return image
    if len(image) < 0x260 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise Invalid("the kernel is neither a bzImage nor an ELF image")
    sectors = image[_SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if length < 8 or len(payload) != length:
        raise Invalid("the bzImage is cut short")
    (size,) = struct.unpack("<I", payload[-4:])
    if size > MAX_SIZE:
        raise Invalid(f"the kernel inside the bzImage claims {size} bytes")
    return _decompress(payload[:-4], size)


def has_pvh_entry(elf: bytes) -> bool:
    """Whether QEMU can enter `elf` directly (CONFIG_PVH)."""
    return _PVH_NOTE in elf or _PVH_NOTE_64 in elf


def _decompress(payload: bytes, size: int) -> bytes:
    decode = next((d for magic, d in _DECODERS if payload.startswith(magic)), None)
    if decode is None:
        raise Unsupported(
            f"the kernel is compressed in an unknown way (it begins {payload[:4].hex()}); "
            "give the uncompressed vmlinux"
        )
    try:
        elf = decode(payload, size + 1)
    except _DAMAGED as error:
        raise Invalid(f"the kernel inside the bzImage is damaged: {error}") from error
    if len(elf) != size or elf[:4] != b"\x7fELF":
        raise Invalid(f"the kernel inside the bzImage has {len(elf)} bytes instead of {size}")
    return elf


def _gzip(payload: bytes, size: int) -> bytes:
    return zlib.decompressobj(31).decompress(payload, size)


def _lzma(payload: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, size)


def _zstd(payload: bytes, size: int) -> bytes:
    return zstd.ZstdDecompressor().decompress(payload, size)


def _lz4(payload: bytes, size: int) -> bytes:
    """The legacy frame format of lz4(1): the magic, then blocks led by their compressed size."""
    out = bytearray()
    at = len(_LZ4_LEGACY)
    while at < len(payload) and len(out) < size:
        (length,) = struct.unpack_from("<I", payload, at)
        block = payload[at + 4 : at + 4 + length]
        if len(block) != length:
            raise ValueError("an lz4 block is cut short")
        out += _lz4_block(block)
        if len(out) > size:
            raise ValueError("it is larger than it says")
        at += 4 + length
    return bytes(out)


def _lz4_block(block: bytes) -> bytearray:
    """One block (lz4_Block_format.md): literals and a copy from behind, again and again."""
    out = bytearray()
    at, end = 0, len(block)
    while at < end:
        token = block[at]
        at += 1
        count = token >> 4
        if count == 15:
            more = 255
            while more == 255:
                more = block[at]
                at += 1
                count += more
        if count:
            out += block[at : at + count]
            at += count
        if at >= end:
            break
        back = block[at] | block[at + 1] << 8
        at += 2
        count = (token & 15) + 4
        if count == 19:
            more = 255
            while more == 255:
                more = block[at]
                at += 1
                count += more
        start = len(out) - back
        if not back or start < 0:
            raise ValueError("an lz4 block copies from before its start")
        if back >= count:
            out += out[start : start + count]
        else:
            out += (out[start:] * (count // back + 1))[:count]
    return out


_DECODERS: tuple[tuple[bytes, Callable[[bytes, int], bytes]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _lzma),
    (b"\x5d\0\0", _lzma),
    (_LZ4_LEGACY, _lz4),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
