"""What a workload changed: lists and archives of its writable layer, and of whole trees.

Directories are walked by descriptors, names never followed: the files belong to a workload that may
be running and hostile.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from bulkhead.store import tar_write

MODIFIED, ADDED, DELETED = 0, 1, 2
"""Docker's change kinds."""

_OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_OPAQUE_NAMES = ("trusted.overlay.opaque", "user.overlay.opaque")
_PIECE = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Found:
    """One file met in a walk; `fd` is its directory's descriptor, valid until the next one."""

    path: bytes
    name: bytes
    fd: int
    info: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)

    @property
    def opaque(self) -> bool:
        return self.is_directory and _is_opaque(_xattr_path(self))

    @property
    def is_whiteout(self) -> bool:
        return stat.S_ISCHR(self.info.st_mode) and self.info.st_rdev == 0


def _walk(root: int, skip: Callable[[_Found], bool] | None = None) -> Iterator[_Found]:
    """Everything below directory `root`, sorted, parents before children; what vanishes is skipped.

    `skip` says of a directory that it is not to be entered.
    """
    stack: list[tuple[int, bytes, list[bytes]]] = []

    def enter(fd: int, path: bytes) -> None:
        stack.append((fd, path, sorted((os.fsencode(n) for n in os.listdir(fd)), reverse=True)))

    try:
        enter(os.dup(root), b"")
        while stack:
            fd, path, names = stack[-1]
            if not names:
                os.close(fd)
                stack.pop()
                continue
            name = names.pop()
            try:
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            found = _Found(path + name, name, fd, info)
            yield found
            if found.is_directory and not (skip and skip(found)):
                with suppress(FileNotFoundError, NotADirectoryError):
                    enter(os.open(name, _DIRECTORY, dir_fd=fd), path + name + b"/")
    finally:
        for fd, _, _ in stack:
            os.close(fd)


def _xattr_path(found: _Found) -> bytes:
    return b"/proc/self/fd/%d/%s" % (found.fd, found.name)


def _xattrs(found: _Found) -> dict[bytes, bytes]:
    """The attributes that belong to the file and not to overlayfs, sorted by name."""
    path = _xattr_path(found)
    result: dict[bytes, bytes] = {}
    with suppress(OSError):
        for name in sorted(os.fsencode(n) for n in os.listxattr(path, follow_symlinks=False)):
            if not name.startswith(_OVERLAY):
                with suppress(OSError):
                    result[name] = os.getxattr(path, name, follow_symlinks=False)
    return result


def _is_opaque(path: bytes) -> bool:
    for name in _OPAQUE_NAMES:
        with suppress(OSError):
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
    return False


class _Lowers:
    """The layers below, as one merged view that can be asked for single names."""

    def __init__(self, lowers: Sequence[str]) -> None:
        self._lowers = [os.fsencode(lower) for lower in lowers]

    def stat(self, path: bytes) -> os.stat_result | None:
        """What `path` is in the topmost layer that has it, or None if none has or it is hidden."""
        for lower in self._lowers:
            here = lower
            parts = path.split(b"/")
            for index, part in enumerate(parts):
                last = index == len(parts) - 1
                try:
                    info = os.lstat(here + b"/" + part)
                except FileNotFoundError:
                    if _is_opaque(here):
                        return None
                    break
                here += b"/" + part
                if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                    return None
                if last:
                    return info
                if not stat.S_ISDIR(info.st_mode):
                    return None
        return None

    def names(self, path: bytes) -> set[bytes]:
        """The names in directory `path` of the merged view."""
        found: set[bytes] = set()
        for lower in self._lowers:
            with suppress(FileNotFoundError, NotADirectoryError):
                found.update(os.listdir(lower + b"/" + path))
        return {name for name in found if self.stat(path + b"/" + name) is not None}


class Upper(Protocol):
    """One file of a writable layer."""

    @property
    def path(self) -> bytes:
        """Relative to the layer's root."""
        ...

    @property
    def is_whiteout(self) -> bool:
        """Whether it hides what lower layers have there."""
        ...

    @property
    def opaque(self) -> bool:
        """Whether it is a directory that hides what lower layers have in it."""
        ...


def changes(upper: str, lowers: Sequence[str]) -> list[tuple[int, str]]:
    """Docker's `diff`: (kind, absolute path) sorted by path; `lowers` topmost first.

    A directory that is in both and unchanged but for what is inside counts as modified.
    """
    root = os.open(upper, _DIRECTORY)
    try:
        return changes_of(_walk(root), lowers)
    finally:
        os.close(root)


def changes_of(files: Iterable[Upper], lowers: Sequence[str]) -> list[tuple[int, str]]:
    """Likewise of the files of a writable layer."""
    below = _Lowers(lowers)
    found: list[tuple[int, bytes]] = []
    present: dict[bytes, set[bytes]] = {}
    for item in files:
        directory, _, name = item.path.rpartition(b"/")
        if directory in present:
            present[directory].add(name)
        old = below.stat(item.path)
        if item.is_whiteout:
            if old is not None:
                found.append((DELETED, item.path))
            continue
        found.append((ADDED if old is None else MODIFIED, item.path))
        if old is not None and item.opaque:
            present[item.path] = set()
    for directory, names in present.items():
        gone = below.names(directory) - names
        found.extend((DELETED, directory + b"/" + name) for name in gone)
    return [(kind, "/" + os.fsdecode(path)) for kind, path in sorted(found, key=lambda c: c[1])]


def _open_regular(found: _Found) -> int:
    """The file for reading, or -1 if it is no longer the regular file that was met.

    Looked at before it is opened: opening what a workload has put there meanwhile, say a device,
    could act on the host.
    """
    try:
        path_fd = os.open(found.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.fd)
    except FileNotFoundError:
        return -1
    try:
        info = os.fstat(path_fd)
        if not stat.S_ISREG(info.st_mode) or info.st_ino != found.info.st_ino:
            return -1
        return os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(path_fd)


def _body(found: _Found, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of the file: cut if it grew, filled with zeros if it shrank."""
    left = size
    fd = _open_regular(found)
    try:
        while left and fd >= 0:
            piece = os.read(fd, min(left, _PIECE))
            if not piece:
                break
            left -= len(piece)
            yield piece
    finally:
        if fd >= 0:
            os.close(fd)
    while left:
        count = min(left, _PIECE)
        left -= count
        yield bytes(count)
    yield tar_write.padding(size)


class _Archiver:
    def __init__(self, *, layer: bool) -> None:
        self._layer = layer
        self._first: dict[tuple[int, int], bytes] = {}

    def archive(self, root: int) -> Iterator[bytes]:
        for found in _walk(root):
            yield from self._one(found)
        yield tar_write.END

    def path(self, directory: int, name: bytes, shown: bytes) -> Iterator[bytes]:
        """One file of `directory`, with all below it, under the name `shown`."""
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        top = _Found(shown, name, directory, info)
        yield from self._one(top)
        if top.is_directory:
            below = os.open(name, _DIRECTORY, dir_fd=directory)
            try:
                for found in _walk(below):
                    found.path = shown.rstrip(b"/") + b"/" + found.path
                    yield from self._one(found)
            finally:
                os.close(below)
        yield tar_write.END

    def _one(self, found: _Found) -> Iterator[bytes]:
        info = found.info
        if self._layer and found.is_whiteout:
            parent = found.path[: -len(found.name)]
            yield from tar_write.member(parent + b".wh." + found.name, b"")
            return
        if stat.S_ISSOCK(info.st_mode):
            return  # as docker: a socket without its process means nothing
        link = b""
        hard = False
        if not found.is_directory and info.st_nlink > 1:
            key = (info.st_dev, info.st_ino)
            link = self._first.setdefault(key, found.path)
            hard = link != found.path
        if not hard:
            link = b""
            if stat.S_ISLNK(info.st_mode):
                try:
                    link = os.fsencode(os.readlink(found.name, dir_fd=found.fd))
                except OSError:
                    return
        size = info.st_size if stat.S_ISREG(info.st_mode) and not hard else 0
        yield tar_write.header(
            found.path + (b"/" if found.is_directory else b""),
            info.st_mode,
            info.st_uid,
            info.st_gid,
            size,
            info.st_mtime_ns,
            link=link,
            hard=hard,
            device=_device(info),
            xattrs={} if hard else _xattrs(found),
        )
        if size:
            yield from _body(found, size)
        if self._layer and found.is_directory and _is_opaque(_xattr_path(found)):
            yield from tar_write.member(found.path + b"/.wh..wh..opq", b"")


def _device(info: os.stat_result) -> tuple[int, int]:
    if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        return os.major(info.st_rdev), os.minor(info.st_rdev)
    return 0, 0


def tar_upper(upper: str) -> Iterator[bytes]:
    """An overlay's upper directory as an OCI layer tar: sorted, whiteouts as ".wh." names."""
    yield from _archive(upper, layer=True)


def tar_tree(directory: str) -> Iterator[bytes]:
    """A whole directory as a tar (`export`), other file systems mounted in it included."""
    yield from _archive(directory, layer=False)


def tar_path(directory: int, name: str, shown: str) -> Iterator[bytes]:
    """File or directory `name` of directory `directory` (a descriptor), not followed, as a tar in
    which it is called `shown` (`cp` out of a workload). FileNotFoundError.
    """
    yield from _Archiver(layer=False).path(directory, os.fsencode(name), os.fsencode(shown))


def _archive(directory: str, *, layer: bool) -> Iterator[bytes]:
    root = os.open(directory, _DIRECTORY)
    try:
        yield from _Archiver(layer=layer).archive(root)
    finally:
        os.close(root)
