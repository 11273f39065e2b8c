"""Files of a guest as a sequence of entries: what `native/guest_tool.c` writes and reads.

What comes from a guest is hostile: every length is bounded before it is read, names are relative
and cannot lead anywhere, and nothing of it is kept but what the caller keeps.

    entry   u32 mode uid gid major minor nlink flags, lengths of name, link, attributes;
            u64 size, i64 seconds, u64 inode device; u32 nanoseconds, 1 if no contents follow
            name, link, attributes (u16 and u32 lengths, name, value), contents of regular files
    end     mode 0; size is an errno, flags a kind of failure, link what it is about
"""

import errno
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from bulkhead.errors import BulkheadError, Invalid, NotFound, Unavailable

OPAQUE, HARD = 1, 2
_HEAD = struct.Struct("<10IQqQQII")
_ATTRIBUTE = struct.Struct("<HI")
_NAME_MAX = 4096
_ATTRIBUTES_MAX = 256 << 10
_SIZE_MAX = 1 << 50
_CHUNK = 1 << 20
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_KINDS = frozenset(
    {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO,
     stat.S_IFSOCK}
)  # fmt: skip


@dataclass(slots=True)
class Entry:
    """One file; `path` is relative to what was asked for, b"" for that itself."""

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    nlink: int = 1
    inode: tuple[int, int] = (0, 0)
    """(device, inode): the same for names of the same file."""
    opaque: bool = False
    """A directory that hides what is below it in lower layers."""
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_whiteout(self) -> bool:
        """Whether it hides the file of that name in lower layers."""
        return stat.S_ISCHR(self.mode) and self.device == (0, 0)


class Failure(BulkheadError):
    """The tool in the guest could not do it: an errno and what it is about."""

    def __init__(self, number: int, about: str) -> None:
        super().__init__(f"{about}: {os.strerror(number)}")
        self.errno = number
        self.about = about


class Reader:
    """Reads the entries of a stream, and the contents of each before the next."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = 0

    def __iter__(self) -> Iterator[Entry]:
        """Entries up to the end; its failure is raised: NotFound, Invalid, or Failure."""
        while True:
            for _ in self.contents():
                pass  # what the caller did not want
            head = _HEAD.unpack(self._exactly(_HEAD.size))
            if head[0] == 0:
                self._end(head)
                return
            yield self._entry(head)

    def contents(self) -> Iterator[bytes]:
        """The contents of the entry that came last, as far as they were not read yet."""
        while self._left:
            piece = self._exactly(min(self._left, _CHUNK))
            self._left -= len(piece)
            yield piece

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise Unavailable("the guest ended while its files were read")
        return data

    def _end(self, head: tuple[int, ...]) -> None:
        number, kind, size = head[10], head[6], head[8]
        if size > _NAME_MAX or number > 4095 or head[7] or head[9]:
            raise Unavailable("the guest sent files that make no sense")
        about = self._exactly(size).decode("utf-8", "replace")
        raise_for(kind, number, about)

    def _entry(self, head: tuple[int, ...]) -> Entry:
        mode, uid, gid, major, minor, nlink, flags, name, link, xattrs = head[:10]
        size, seconds, inode, device, nanoseconds, empty = head[10:]
        if (
            max(name, link) > _NAME_MAX
            or xattrs > _ATTRIBUTES_MAX
            or size > _SIZE_MAX
            or nanoseconds >= 10**9
            or abs(seconds) > 1 << 40
            or stat.S_IFMT(mode) not in _KINDS
            or mode > 0xFFFF
        ):
            raise Unavailable("the guest sent files that make no sense")
        entry = Entry(
            path=self._exactly(name),
            mode=mode,
            uid=uid,
            gid=gid,
            size=size if stat.S_ISREG(mode) else 0,
            mtime_ns=seconds * 10**9 + nanoseconds,
            link=self._exactly(link),
            device=(major, minor) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else (0, 0),
            nlink=nlink,
            inode=(device, inode),
            opaque=bool(flags & OPAQUE),
            xattrs=_attributes(self._exactly(xattrs)),
        )
        self._left = 0 if empty else entry.size
        return entry


def check(path: bytes) -> None:
    """Unavailable for a path that does not lie below where it is used."""
    if path and any(part in {b"", b".", b".."} for part in path.split(b"/")):
        raise Unavailable(f"the guest sent a file with the name {path[:100]!r}")
    if b"\0" in path:
        raise Unavailable("the guest sent a file with a NUL in its name")


def raise_for(kind: int, number: int, about: str) -> None:
    """The failure of an end, if it is one."""
    if kind == 1:
        raise Invalid(f'cannot overwrite directory "{about}" with non-directory')
    if kind == 2:
        raise Invalid(f'cannot overwrite non-directory "{about}" with directory')
    if kind == 3:
        raise Invalid(f"the archive's member {about!r} leads out of its place")
    if number in {errno.ENOENT, errno.ENOTDIR}:
        raise NotFound(f"{about}: {os.strerror(number)}")
    if number or kind:
        raise Failure(number or errno.EPROTO, about)


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """Those that belong to the file and not to overlayfs."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, value = _ATTRIBUTE.unpack_from(data, at)
        at += _ATTRIBUTE.size
        if not 0 < length < 256 or at + length + value > len(data):
            raise Unavailable("the guest sent attributes that make no sense")
        name = data[at : at + length]
        if not name.startswith(_OVERLAY):
            found[name] = data[at + length : at + length + value]
        at += length + value
    return found


def encode(entry: Entry, *, hard: bool = False) -> bytes:
    """The entry for the tool's `put`; the contents of a regular file are to follow.

    `hard`: another name of the file that `link` names.
    """
    attributes = b"".join(
        _ATTRIBUTE.pack(len(name), len(value)) + name + value
        for name, value in entry.xattrs.items()
    )
    seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
    head = _HEAD.pack(
        entry.mode, entry.uid, entry.gid, *entry.device, entry.nlink, HARD if hard else 0,
        len(entry.path), len(entry.link), len(attributes), entry.size, seconds, entry.inode[1],
        entry.inode[0], nanoseconds, 0,
    )  # fmt: skip
    return head + entry.path + entry.link + attributes


END = bytes(_HEAD.size)
"""The end of what `put` reads."""
