"""Reads EROFS images of the subset in erofs_format.py without mounting them.

Every offset is checked: a damaged image raises `Corrupt`, it never loops or reads elsewhere.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from bulkhead.errors import Corrupt, NotFound
from bulkhead.store import erofs_format as fmt
from bulkhead.store.erofs_format import BLOCK_SIZE, INODE_SIZE, NO_BLOCK

_PIECE = 1 << 20


@dataclass(slots=True)
class Inode:
    """One inode. `mode` includes the type; `device` is (major, minor) of a device node."""

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_ns: int
    nlink: int
    device: tuple[int, int]
    extents: list[tuple[int, int]]
    """(offset in the image, length) of the body, in order."""
    xattr_at: int
    xattr_size: int

    @property
    def kind(self) -> int:
        """The type bits, stat.S_IFMT(mode)."""
        return self.mode & 0o170000


class Image:
    """An image open as descriptor `fd`, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        block = os.pread(fd, BLOCK_SIZE, 0)
        if len(block) < BLOCK_SIZE:
            raise Corrupt("not an EROFS image: too short")
        fields = fmt.SUPER.unpack(block[fmt.SUPER_OFFSET : fmt.ROOT_OFFSET])
        if fields[0] != fmt.MAGIC or fields[3] != fmt.BLOCK_BITS or fields[14]:
            raise Corrupt("not an EROFS image that bulkhead writes")
        if fields[2] & fmt.COMPAT_CHECKSUM and fields[1] != fmt.super_checksum(block):
            raise Corrupt("the EROFS superblock's checksum is wrong")
        self._end = os.fstat(fd).st_size
        if fields[9] * BLOCK_SIZE > self._end:
            raise Corrupt("the EROFS image is shorter than its superblock says")
        self._xattrs_at = fields[11] * BLOCK_SIZE
        self.root_nid: int = fields[5]
        self.uuid: bytes = fields[12]
        self.inodes: int = fields[6]

    def _read(self, at: int, size: int) -> bytes:
        data = os.pread(self._fd, size, at) if 0 <= at <= self._end else b""
        if len(data) != size:
            raise Corrupt("the EROFS image refers beyond its end")
        return data

    def inode(self, nid: int) -> Inode:
        """The inode numbered `nid`."""
        at = nid * fmt.SLOT
        (
            form, count, mode, _, size, union, _, uid, gid, mtime, mtime_ns, nlink,
        ) = fmt.INODE.unpack(self._read(at, INODE_SIZE))  # fmt: skip
        layout = form >> 1
        if not form & 1 or layout not in (fmt.FLAT_PLAIN, fmt.FLAT_INLINE):
            raise Corrupt("an EROFS inode has an unknown format")
        xattr_size = 12 + 4 * (count - 1) if count else 0
        device = (0, 0)
        extents: list[tuple[int, int]] = []
        if mode & 0o170000 in (0o020000, 0o060000):
            device = fmt.unpack_device(union)
        else:
            tail = size % BLOCK_SIZE if layout == fmt.FLAT_INLINE else 0
            if size > tail:
                if union == NO_BLOCK:
                    raise Corrupt("an EROFS inode has a size but no blocks")
                extents.append((union * BLOCK_SIZE, size - tail))
            if tail:
                extents.append((at + INODE_SIZE + xattr_size, tail))
            if any(start + length > self._end for start, length in extents):
                raise Corrupt("an EROFS inode refers beyond the image's end")
        return Inode(
            nid, mode, uid, gid, size, mtime, mtime_ns, nlink, device, extents,
            at + INODE_SIZE, xattr_size,
        )  # fmt: skip

    def read(self, inode: Inode) -> Iterator[bytes]:
        """The body, in pieces of at most 1 MiB."""
        for start, length in inode.extents:
            end = start + length
            while start < end:
                piece = self._read(start, min(_PIECE, end - start))
                start += len(piece)
                yield piece

    def link_target(self, inode: Inode) -> bytes:
        """Where a symbolic link points."""
        return b"".join(self.read(inode))

    def entries(self, inode: Inode) -> list[tuple[bytes, int, int]]:
        """(name, nid, type) of a directory's entries, sorted, without "." and ".."."""
        found: list[tuple[bytes, int, int]] = []
        if inode.kind != 0o040000:
            raise Corrupt("an EROFS entry that should be a directory is none")
        data = b"".join(self.read(inode))
        for start in range(0, len(data), BLOCK_SIZE):
            block = data[start : start + BLOCK_SIZE]
            found.extend(self._block_entries(block))
        return found

    @staticmethod
    def _block_entries(block: bytes) -> Iterator[tuple[bytes, int, int]]:
        if len(block) < 12:
            raise Corrupt("an EROFS directory block is damaged")
        first = fmt.DIRENT.unpack_from(block, 0)[1]
        count = first // 12
        if not count or first % 12 or first > len(block):
            raise Corrupt("an EROFS directory block is damaged")
        offsets = [fmt.DIRENT.unpack_from(block, 12 * n) for n in range(count)]
        for index, (nid, offset, kind, _) in enumerate(offsets):
            end = offsets[index + 1][1] if index + 1 < count else len(block)
            if not first <= offset <= end <= len(block):
                raise Corrupt("an EROFS directory block is damaged")
            name = block[offset:end]
            if index + 1 == count:
                name = name.partition(b"\0")[0]
            if not name or b"/" in name or b"\0" in name:
                raise Corrupt("an EROFS directory block is damaged")
            if name not in (b".", b".."):
                yield name, nid, kind

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """All extended attributes by full name."""
        if not inode.xattr_size:
            return {}
        area = self._read(inode.xattr_at, inode.xattr_size)
        _, shared = fmt.XATTR_HEADER.unpack_from(area, 0)
        at = 12 + 4 * shared
        if at > len(area):
            raise Corrupt("an EROFS attribute area is damaged")
        found: dict[bytes, bytes] = {}
        for index in range(shared):
            place = int.from_bytes(area[12 + 4 * index : 16 + 4 * index], "little")
            where = self._xattrs_at + 4 * place
            head = self._read(where, 4)
            length, _, size = fmt.XATTR_ENTRY.unpack(head)
            name, value, _ = self._xattr(head + self._read(where + 4, length + size), 0)
            found[name] = value
        while at < len(area):
            name, value, at = self._xattr(area, at)
            found[name] = value
        return found

    @staticmethod
    def _xattr(area: bytes, at: int) -> tuple[bytes, bytes, int]:
        if at + 4 > len(area):
            raise Corrupt("an EROFS attribute area is damaged")
        length, index, size = fmt.XATTR_ENTRY.unpack_from(area, at)
        at += 4
        end = at + length + size
        prefix = fmt.XATTR_NAMES.get(index)
        if end > len(area) or prefix is None:
            raise Corrupt("an EROFS attribute area is damaged")
        return prefix + area[at : at + length], area[at + length : end], -(-end // 4) * 4

    def lookup(self, path: str | bytes) -> Inode:
        """The inode at `path` from the root, symbolic links not followed; NotFound."""
        raw = os.fsencode(path)
        inode = self.inode(self.root_nid)
        for part in raw.split(b"/"):
            if part in (b"", b"."):
                continue
            if inode.kind != 0o040000:
                raise NotFound(f"{os.fsdecode(raw)}: not in the layer")
            nid = next((n for name, n, _ in self.entries(inode) if name == part), None)
            if nid is None:
                raise NotFound(f"{os.fsdecode(raw)}: not in the layer")
            inode = self.inode(nid)
        return inode

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """(path, inode) of everything, parents first, the root as b""; Corrupt on a cycle."""
        pending: list[tuple[bytes, int]] = [(b"", self.root_nid)]
        seen: set[int] = set()
        while pending:
            path, nid = pending.pop()
            inode = self.inode(nid)
            yield path, inode
            if inode.kind == 0o040000:
                if nid in seen:
                    raise Corrupt("an EROFS directory is reached twice")
                seen.add(nid)
                prefix = path + b"/" if path else b""
                listed = self.entries(inode)
                pending.extend((prefix + name, child) for name, child, _ in reversed(listed))
