"""Writes one EROFS image in a single streaming pass over the members of an archive.

Bodies go straight to the file, block-aligned, the last partial block into the inode's block. Inodes
gather in clusters that are written when full; in memory remain only directory entries (a name and a
number each), the current cluster and the shared attributes. Directories, the root inode and the
superblock come last: until then the file is not a file system.

Layout: store/erofs_format.py.
"""

import os
from collections.abc import Callable, Iterable

from bulkhead.errors import Corrupt
from bulkhead.store import erofs_format as fmt
from bulkhead.store.erofs_format import BLOCK_SIZE, INODE_SIZE

_FLUSH_BYTES = 2 << 20
_FLUSH_VIEWS = 500
_SHARED_MAX = 16 << 20
_ZERO = bytes(BLOCK_SIZE)


def up(value: int) -> int:
    """`value` rounded up to whole blocks."""
    return -(-value // BLOCK_SIZE) * BLOCK_SIZE


class Directory:
    """A directory being gathered: children are `Directory` or a packed int, nid << 3 | type."""

    __slots__ = (
        "children", "gid", "mode", "mtime", "mtime_ns", "names", "opaque", "parent", "place",
        "uid", "whiteouts", "xattrs",
    )  # fmt: skip

    def __init__(self, parent: "Directory | None") -> None:
        self.parent = parent or self
        self.children: dict[bytes, Directory | int] = {}
        self.whiteouts: set[bytes] | None = None
        self.opaque = False
        self.mode, self.uid, self.gid, self.mtime, self.mtime_ns = 0o755, 0, 0, 0, 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.names: list[bytes] = []
        self.place = 0


class ImageWriter:
    """Appends bodies and inodes to `fd` (empty, opened for writing), then finishes the image."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = BLOCK_SIZE
        self._pending: list[bytes | memoryview] = []
        self._pending_bytes = 0
        self._pending_at = BLOCK_SIZE
        self._cluster = bytearray()
        self._cluster_at = 0
        self._cluster_used = 0
        self._cluster_next = 4 * BLOCK_SIZE
        self._gaps: list[tuple[int, int]] = []
        self._links: dict[int, int] = {}
        self._inodes = 0
        self._seen: dict[bytes, int] = {}
        self._shared = bytearray()

    # -- bodies -------------------------------------------------------------------------------

    def _flush(self) -> None:
        views, at = self._pending, self._pending_at
        while views:
            done = os.pwritev(self._fd, views, at)
            at += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = memoryview(views[0])[done:]
        self._pending = []
        self._pending_bytes = 0
        self._pending_at = self._position

    def _append(self, view: bytes | memoryview) -> None:
        self._pending.append(view)
        self._position += len(view)
        self._pending_bytes += len(view)
        if self._pending_bytes >= _FLUSH_BYTES or len(self._pending) >= _FLUSH_VIEWS:
            self._flush()

    def data(self, views: Iterable[memoryview], size: int) -> int:
        """Append `size` bytes (whole blocks, or padded to one); returns their offset.

        That `views` are `size` bytes is for the caller to check.
        """
        start = self._position
        for view in views:
            self._append(view)
        if padding := -size % BLOCK_SIZE:
            self._append(_ZERO[:padding])
        return start

    def sparse(self, size: int) -> int:
        """Reserve `size` bytes of zeros without writing them; returns their offset."""
        self._flush()
        start = self._position
        self._position += up(size)
        self._pending_at = self._position
        return start

    def patch(self, at: int, view: bytes | memoryview) -> None:
        """Write into an area reserved by `sparse`."""
        while view:
            done = os.pwrite(self._fd, view, at)
            at += done
            view = view[done:]

    # -- inodes -------------------------------------------------------------------------------

    def _allocate(self, head: int, tail: int) -> int:
        """An offset for `head` bytes (may span blocks) ending in one block with `tail` bytes."""
        need = -(-(head + tail) // INODE_SIZE) * INODE_SIZE
        for index, (at, room) in enumerate(self._gaps):
            if need <= room:
                if room - need >= 2 * INODE_SIZE:
                    self._gaps[index] = (at + need, room - need)
                else:
                    del self._gaps[index]
                return at
        used = self._cluster_used
        room = -used % BLOCK_SIZE
        if need > room and room:
            if room >= INODE_SIZE:
                self._gaps.append((self._cluster_at + used, room))
                del self._gaps[:-8]
            used += room
        if used + need > len(self._cluster):
            self._close_cluster()
            size = max(self._cluster_next, up(need))
            self._cluster_next = min(4 * self._cluster_next, 32 * BLOCK_SIZE)
            self._flush()
            self._cluster_at = self._position
            self._cluster = bytearray(size)
            self._position += size
            self._pending_at = self._position
            used = 0
        self._cluster_used = used + need
        return self._cluster_at + used

    def _close_cluster(self) -> None:
        used = up(self._cluster_used)
        if used:
            self.patch(self._cluster_at, memoryview(self._cluster)[:used])
        self._cluster, self._cluster_used = bytearray(), 0
        self._gaps.clear()

    def _xattr_area(self, xattrs: dict[bytes, bytes] | None, room: int = 1 << 18) -> bytes:
        """The attribute area after an inode; those seen before, or beyond `room`, are shared."""
        if not xattrs:
            return b""
        shared: list[int] = []
        inline = b""
        for name in sorted(xattrs):
            entry = fmt.xattr_entry(name, xattrs[name])
            if entry is None:
                continue
            where = self._seen.get(entry)
            if where is None and len(self._shared) < _SHARED_MAX:
                self._seen[entry] = -1
            full = 12 + 4 * len(xattrs) + len(inline) + len(entry) > room
            if full or (where is not None and len(self._shared) < _SHARED_MAX):
                if where is None or where < 0:
                    where = self._seen[entry] = len(self._shared) // 4
                    self._shared += entry
                shared.append(where)
            else:
                inline += entry
        if not shared and not inline:
            return b""
        header = fmt.XATTR_HEADER.pack(0, len(shared))
        return header + b"".join(n.to_bytes(4, "little") for n in shared) + inline

    def _inode(
        self,
        at: int,
        mode: int,
        size: int,
        union: int,
        owner: tuple[int, int],
        time: tuple[int, int],
        nlink: int,
        area: bytes,
        tail: bytes,
        inline: bool,
    ) -> bytes:
        count = (len(area) - 12) // 4 + 1 if area else 0
        self._inodes += 1
        layout = fmt.FLAT_INLINE if inline else fmt.FLAT_PLAIN
        return (
            fmt.INODE.pack(
                1 | layout << 1, count, mode, 0, size, union, self._inodes, owner[0], owner[1],
                time[0], time[1], nlink,
            )
            + area
            + tail
        )  # fmt: skip

    def node(
        self,
        kind: int,
        mode: int,
        owner: tuple[int, int],
        time: tuple[int, int],
        xattrs: dict[bytes, bytes] | None,
        *,
        device: int = 0,
        size: int = 0,
        start: int = 0,
        tail: bytes = b"",
    ) -> tuple[int, int]:
        """Write one inode that is not a directory.

        A body is `size` bytes: whole blocks at offset `start`, then `tail` (under one block).
        Returns (packed child value, offset of the tail in the file).
        """
        area = self._xattr_area(xattrs) if xattrs else b""
        head = INODE_SIZE + len(area)
        full = fmt.S_IFMT_OF[kind] | mode
        union = device if kind in (fmt.FT_CHAR, fmt.FT_BLOCK) else fmt.NO_BLOCK
        inline = bool(tail) and head + len(tail) <= BLOCK_SIZE
        tail_at = 0
        if tail and not inline:
            # The tail must follow the whole blocks directly; only a body below one block can move.
            if size != len(tail):
                raise Corrupt("a tail that cannot be inlined was split off")
            tail_at = start = self.data((memoryview(tail),), len(tail))
            tail = b""
        if size > len(tail):
            union = start // BLOCK_SIZE
        at = self._allocate(head, len(tail))
        data = self._inode(at, full, size, union, owner, time, 1, area, tail, inline)
        offset = at - self._cluster_at
        self._cluster[offset : offset + len(data)] = data
        if inline:
            tail_at = at + head
        return at // fmt.SLOT << 3 | kind, tail_at

    def inlinable(self, tail: int, xattrs: dict[bytes, bytes] | None) -> bool:
        """Whether a tail of `tail` bytes surely fits beside an inode with these attributes."""
        extra = sum(len(k) + len(v) + 8 for k, v in xattrs.items()) + 12 if xattrs else 0
        return INODE_SIZE + extra + tail <= BLOCK_SIZE

    def link(self, child: int) -> None:
        """One more name for `child`."""
        self._links[child >> 3] = self._links.get(child >> 3, 1) + 1

    def unlink(self, child: int) -> None:
        """One name fewer for `child`, if it ever had several."""
        if child >> 3 in self._links:
            self._links[child >> 3] -= 1

    # -- the end ------------------------------------------------------------------------------

    def finish(self, root: Directory, uuid: Callable[[], bytes]) -> int:
        """Write directories, shared attributes, root and superblock; returns the file's size.

        `uuid` (16 bytes) is asked for last, so that a digest can become it.
        """
        directories = self._ordered(root)
        whiteout = 0
        for directory in directories:
            whiteout = self._settle_whiteouts(directory, whiteout)
        areas = []
        for directory in directories:
            directory.names = sorted((*directory.children, b".", b".."))
            areas.append(self._place(directory, directory is root))
        for directory, plan in zip(directories, areas, strict=True):
            self._write_directory(directory, directory is root, *plan)
        self._close_clusters_and_trim()
        for nid, count in self._links.items():
            self.patch(nid * fmt.SLOT + fmt.NLINK_AT, count.to_bytes(4, "little"))
        shared_at = self._position
        if self._shared:
            self.data((memoryview(bytes(self._shared)),), len(self._shared))
        self._flush()
        os.ftruncate(self._fd, self._position)
        self._superblock(uuid(), shared_at // BLOCK_SIZE if self._shared else 0)
        return self._position

    @staticmethod
    def _ordered(root: Directory) -> list[Directory]:
        found = [root]
        for directory in found:
            found.extend(c for c in directory.children.values() if isinstance(c, Directory))
        return found

    def _settle_whiteouts(self, directory: Directory, whiteout: int) -> int:
        """A whiteout hides only what lower layers have: beside a new directory it is opacity."""
        for name in sorted(directory.whiteouts or ()):
            child = directory.children.get(name)
            if isinstance(child, Directory):
                child.opaque = True
            elif child is None:
                if whiteout:
                    self.link(whiteout)
                else:
                    whiteout, _ = self.node(fmt.FT_CHAR, 0, (0, 0), (0, 0), None)
                directory.children[name] = whiteout
        return whiteout

    def _place(self, directory: Directory, is_root: bool) -> tuple[bytes, list[int], int, int]:
        """Reserve the inode: (attribute area, entries per block, size of the last, tail's place).

        The tail's place is 0 when the last block is inlined.
        """
        xattrs = dict(directory.xattrs or {})
        if directory.opaque:
            xattrs[b"trusted.overlay.opaque"] = b"y"
        room = BLOCK_SIZE - fmt.ROOT_OFFSET if is_root else BLOCK_SIZE
        area = self._xattr_area(xattrs, room - INODE_SIZE if is_root else 1 << 18)
        counts: list[int] = []
        count = used = 0
        for name in directory.names:
            if used + 12 + len(name) > BLOCK_SIZE:
                counts.append(count)
                count = used = 0
            count += 1
            used += 12 + len(name)
        counts.append(count)
        head = INODE_SIZE + len(area)
        inline = head + used <= room
        if is_root:
            directory.place = fmt.ROOT_OFFSET
        else:
            directory.place = self._allocate(head, used if inline else 0)
        return area, counts, used, int(not inline)

    def _write_directory(
        self, directory: Directory, is_root: bool, area: bytes, counts: list[int], last: int,
        plain: int,
    ) -> None:  # fmt: skip
        names = directory.names
        blocks: list[bytes] = []
        at = subdirectories = 0
        for count in counts:
            offset = 12 * count
            chosen = names[at : at + count]
            packed = []
            for name in chosen:
                kind = fmt.FT_DIRECTORY
                if name == b".":
                    place = directory.place
                elif name == b"..":
                    place = directory.parent.place
                else:
                    child = directory.children[name]
                    if isinstance(child, Directory):
                        place = child.place
                        subdirectories += 1
                    else:
                        place, kind = (child >> 3) * fmt.SLOT, child & 7
                packed.append(fmt.DIRENT.pack(place // fmt.SLOT, offset, kind, 0))
                offset += len(name)
            blocks.append(b"".join(packed) + b"".join(chosen))
            at += count
        size = (len(blocks) - 1) * BLOCK_SIZE + last
        tail = b"" if plain else blocks.pop()
        union = fmt.NO_BLOCK
        if blocks:
            body = b"".join(block.ljust(BLOCK_SIZE, b"\0") for block in blocks)
            union = self.data((memoryview(body),), len(body)) // BLOCK_SIZE
        mode = fmt.S_IFMT_OF[fmt.FT_DIRECTORY] | directory.mode
        data = self._inode(
            directory.place, mode, size, union, (directory.uid, directory.gid),
            (directory.mtime, directory.mtime_ns), 2 + subdirectories, area, tail, not plain,
        )  # fmt: skip
        self._store_inode(directory.place, data)

    def _store_inode(self, at: int, data: bytes) -> None:
        offset = at - self._cluster_at
        if 0 <= offset < len(self._cluster):
            self._cluster[offset : offset + len(data)] = data
        else:
            self.patch(at, data)

    def _close_clusters_and_trim(self) -> None:
        end = self._cluster_at + len(self._cluster)
        used = up(self._cluster_used)
        at = self._cluster_at
        self._flush()
        self._close_cluster()
        if end == self._position and used:
            self._position = at + used
            self._pending_at = self._position

    def _superblock(self, uuid: bytes, xattr_block: int) -> None:
        block = bytearray(os.pread(self._fd, BLOCK_SIZE, 0).ljust(BLOCK_SIZE, b"\0"))
        fields = [
            fmt.MAGIC, 0, fmt.COMPAT_CHECKSUM | fmt.COMPAT_MTIME, fmt.BLOCK_BITS, 0,
            fmt.ROOT_OFFSET // fmt.SLOT, self._inodes, 0, 0, self._position // BLOCK_SIZE, 0,
            xattr_block, uuid, bytes(16), 0, 0, 0, 0, 0, 0, 0, 0, bytes(24),
        ]  # fmt: skip
        block[fmt.SUPER_OFFSET : fmt.ROOT_OFFSET] = fmt.SUPER.pack(*fields)
        fields[1] = fmt.super_checksum(bytes(block))
        block[fmt.SUPER_OFFSET : fmt.ROOT_OFFSET] = fmt.SUPER.pack(*fields)
        self.patch(0, bytes(block))
