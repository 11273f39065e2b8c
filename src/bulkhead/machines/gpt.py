"""A GUID partition table: UEFI specification 2.10, chapter 5.

sector 0       protective MBR
1              header           2–33 entries
… partitions …
last 33        entries again, header again
"""

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

SECTOR = 512
ALIGNMENT = 1 << 20
TAIL = ALIGNMENT
"""Bytes after the last partition; the table's copy is in there."""
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_ROOT = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
"""x86-64, as the Discoverable Partitions Specification has it."""
_ENTRIES = 128


@dataclass(frozen=True, slots=True)
class Partition:
    """From byte `first` on, `size` bytes, both multiples of SECTOR."""

    kind: uuid.UUID
    identity: uuid.UUID
    name: str
    first: int
    size: int


def write(out: BinaryIO, size: int, identity: uuid.UUID, partitions: Sequence[Partition]) -> None:
    """Write both tables on a disk of `size` bytes."""
    entries = b"".join(_entry(one) for one in partitions).ljust(_ENTRIES * 128, b"\0")
    last = size // SECTOR - 1
    out.seek(0)
    out.write(_protective(last) + _header(1, last, 2, last, identity, entries) + entries)
    out.seek((last - 32) * SECTOR)
    out.write(entries + _header(last, 1, last - 32, last, identity, entries))


def _entry(one: Partition) -> bytes:
    name = one.name.encode("utf-16-le")[:72].ljust(72, b"\0")
    first = one.first // SECTOR
    last = first + one.size // SECTOR - 1
    return one.kind.bytes_le + one.identity.bytes_le + struct.pack("<QQQ", first, last, 0) + name


def _protective(last: int) -> bytes:
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    return b"\0" * 446 + entry + b"\0" * 48 + b"\x55\xaa"


def _header(
    own: int, other: int, table: int, last: int, identity: uuid.UUID, entries: bytes
) -> bytes:
    def packed(check: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, check, 0, own, other, 34, last - 33,
            identity.bytes_le, table, _ENTRIES, 128, zlib.crc32(entries),
        )  # fmt: skip

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")
