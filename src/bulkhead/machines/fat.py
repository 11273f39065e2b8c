"""A FAT16 file system written in one go: boot partitions and cloud-init seeds.

    boot sector · table · table again · root directory (512 entries) · clusters

Long names as in Microsoft's fatgen103; every short name is made up ("F1", "F2", …), unless the
name is a short one already. Nothing depends on the clock: all times are the one given.
"""

import struct
import time
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from bulkhead.errors import Invalid

_SECTOR = 512
_ROOT_ENTRIES = 512
_MOST_CLUSTERS = 65_524
_LEAST_CLUSTERS = 4_085
LEAST_BYTES = 4 << 20
"""Below this it would be FAT12, which firmware need not read."""
_SHORT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


class _Folder:
    """A directory being filled."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.folders: dict[str, _Folder] = {}

    def put(self, parts: list[str], data: bytes) -> None:
        """Add a file and the directories above it."""
        if len(parts) == 1:
            self.files[parts[0]] = data
        else:
            self.folders.setdefault(parts[0], _Folder()).put(parts[1:], data)


class _Volume:
    """Geometry, the allocation table and where the next cluster is."""

    def __init__(self, out: BinaryIO, offset: int, size: int, label: str, moment: int) -> None:
        self.out, self.offset, self.label = out, offset, label
        self.stamp = _stamp(moment)
        self.sectors = size // _SECTOR
        self.per_cluster = 1
        while self._clusters() > _MOST_CLUSTERS:
            self.per_cluster *= 2
        if self.per_cluster > 128 or self._clusters() < _LEAST_CLUSTERS:
            raise Invalid(f"a FAT16 file system cannot have {size} bytes")
        self.table_sectors = (self._clusters() + 2) * 2 // _SECTOR + 1
        self.root_sector = 1 + 2 * self.table_sectors
        self.first_sector = self.root_sector + _ROOT_ENTRIES * 32 // _SECTOR
        self.clusters = (self.sectors - self.first_sector) // self.per_cluster
        self.table = [0xFFF8, 0xFFFF]

    def _clusters(self) -> int:
        return self.sectors // self.per_cluster

    @property
    def cluster_bytes(self) -> int:
        """Bytes of one cluster."""
        return self.per_cluster * _SECTOR

    def rounded(self, size: int) -> int:
        """Bytes of the clusters that `size` bytes need."""
        return -(-size // self.cluster_bytes) * self.cluster_bytes

    def reserve(self, size: int) -> int:
        """The first of as many consecutive clusters as `size` bytes need; 0 for none."""
        count = -(-size // self.cluster_bytes)
        if count == 0:
            return 0
        first = len(self.table)
        if first + count > self.clusters + 2:
            raise Invalid("the files do not fit on the boot partition")
        self.table.extend(range(first + 1, first + count))
        self.table.append(0xFFFF)
        return first

    def write(self, cluster: int, data: bytes) -> None:
        """Fill clusters from `cluster` on."""
        if data:
            sector = self.first_sector + (cluster - 2) * self.per_cluster
            self.at(sector, data)

    def at(self, sector: int, data: bytes) -> None:
        """Write at a sector of the file system."""
        self.out.seek(self.offset + sector * _SECTOR)
        self.out.write(data)


def write(
    out: BinaryIO,
    files: Mapping[str, bytes],
    *,
    size: int,
    label: str,
    serial: int,
    moment: int,
    offset: int = 0,
) -> None:
    """Write a file system of `size` bytes at `offset` of `out`, with `files` by path.

    `moment` in seconds since 1970 dates them all. What is not written stays as it is, so `out` is
    to be a fresh file. Invalid if they do not fit or a name cannot be.
    """
    volume = _Volume(out, offset, size, label, moment)
    root = _Folder()
    for path, data in files.items():
        root.put(path.strip("/").split("/"), data)
    entries = _entry(_label(label), 0x08, 0, 0, volume.stamp) + _contents(volume, root, 0)
    if len(entries) > _ROOT_ENTRIES * 32:
        raise Invalid("too many files in the root of a FAT16 file system")
    volume.at(0, _boot_sector(volume, serial))
    table = struct.pack(f"<{len(volume.table)}H", *volume.table)
    table = table.ljust(volume.table_sectors * _SECTOR, b"\0")
    volume.at(1, table + table + entries.ljust(_ROOT_ENTRIES * 32, b"\0"))
    end = offset + volume.sectors * _SECTOR
    if out.seek(0, 2) < end:
        out.seek(end - 1)
        out.write(b"\0")


def _boot_sector(volume: _Volume, serial: int) -> bytes:
    small = volume.sectors if volume.sectors < 65536 else 0
    sector = b"\xeb\x3c\x90BULKHEAD" + struct.pack(
        "<HBHBHHBHHHII", _SECTOR, volume.per_cluster, 1, 2, _ROOT_ENTRIES, small, 0xF8,
        volume.table_sectors, 63, 255, volume.offset // _SECTOR, 0 if small else volume.sectors,
    )  # fmt: skip
    sector += struct.pack("<BBBI", 0x80, 0, 0x29, serial) + _label(volume.label) + b"FAT16   "
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def _contents(volume: _Volume, folder: _Folder, parent: int) -> bytes:
    """The entries of a directory whose children are written first."""
    used: set[bytes] = set()
    entries = b""
    for name, data in folder.files.items():
        first = volume.reserve(len(data))
        volume.write(first, data)
        entries += _named(name, used, 0x20, first, len(data), volume.stamp)
    for name, inner in folder.folders.items():
        size = 64 + 32 * sum(_room(one) for one in (*inner.files, *inner.folders))
        own = volume.reserve(size)
        data = _entry(b".          ", 0x10, own, 0, volume.stamp)
        data += _entry(b"..         ", 0x10, parent, 0, volume.stamp)
        data += _contents(volume, inner, own)
        volume.write(own, data.ljust(volume.rounded(size), b"\0"))
        entries += _named(name, used, 0x10, own, 0, volume.stamp)
    return entries


def _room(name: str) -> int:
    return 1 + (0 if _short(name) else -(-len(name) // 13))


def _short(name: str) -> bytes | None:
    """The name as 8.3, if it is one."""
    base, _, suffix = name.partition(".")
    if not base or len(base) > 8 or len(suffix) > 3 or not set(base + suffix) <= _SHORT:
        return None
    return base.ljust(8).encode() + suffix.ljust(3).encode()


def _named(
    name: str, used: set[bytes], kind: int, first: int, size: int, stamp: tuple[int, int]
) -> bytes:
    if not name or len(name) > 255 or any(c in '"*/:<>?\\|' or ord(c) < 32 for c in name):
        raise Invalid(f"{name!r} cannot be a name in a FAT file system")
    short = _short(name)
    if short is not None and short not in used:
        used.add(short)
        return _entry(short, kind, first, size, stamp)
    number = 1
    while (made := f"F{number}".ljust(11).encode()) in used:
        number += 1
    used.add(made)
    return b"".join(_long(name, made)) + _entry(made, kind, first, size, stamp)


def _long(name: str, short: bytes) -> Iterator[bytes]:
    """Entries with the long name, the last part first."""
    check = 0
    for byte in short:
        check = ((check >> 1) | (check & 1) << 7) + byte & 0xFF
    units = name.encode("utf-16-le")
    count = -(-len(name) // 13)
    if len(units) % 26:
        units = (units + b"\0\0").ljust(count * 26, b"\xff")
    for number in range(count, 0, -1):
        part = units[(number - 1) * 26 : number * 26]
        order = number | (0x40 if number == count else 0)
        yield (
            bytes([order]) + part[:10] + bytes([0x0F, 0, check]) + part[10:22] + b"\0\0" + part[22:]
        )


def _entry(name: bytes, kind: int, first: int, size: int, stamp: tuple[int, int]) -> bytes:
    day, clock = stamp
    return name + struct.pack(
        "<BBBHHHHHHHI", kind, 0, 0, clock, day, day, 0, clock, day, first, size
    )


def _label(text: str) -> bytes:
    return text.encode("ascii", "replace")[:11].ljust(11)


def _stamp(moment: int) -> tuple[int, int]:
    """Date and time as FAT has them; it begins in 1980."""
    at = time.gmtime(max(moment, 315_532_800))
    return (
        (min(at.tm_year, 2107) - 1980) << 9 | at.tm_mon << 5 | at.tm_mday,
        at.tm_hour << 11 | at.tm_min << 5 | at.tm_sec // 2,
    )
