"""Unpacks an archive into a directory of a file system that somebody else may be changing.

For `cp` into a workload and for filling volumes. Every path is resolved by openat2(2) inside the
given root (RESOLVE_IN_ROOT, no magic links), every last component is used without following it, so
neither the archive nor a workload that swaps links meanwhile can reach anything outside.
"""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from bulkhead.errors import Conflict, Invalid, NotFound, Unsupported
from bulkhead.linux import openat2
from bulkhead.linux.fds import OwnedFd
from bulkhead.store import codecs, files
from bulkhead.store import tar_read as tar
from bulkhead.store.limits import DEFAULT, Limits
from bulkhead.store.tar_read import ByteSource, Entry, TarReader, show

_RESOLVE = openat2.IN_ROOT | openat2.NO_MAGICLINKS
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def unpack(
    chunks: Iterable[bytes],
    root: int,
    path: str = "/",
    *,
    owner: tuple[int, int] | None = None,
    keep_kind: bool = False,
    limits: Limits = DEFAULT,
) -> None:
    """Unpack the (compressed or plain) tar in `chunks` below `path` of the root directory `root`.

    `path` must be a directory there: NotFound, Invalid otherwise. `owner` replaces all owners. With
    `keep_kind` a directory is never replaced by something else nor the reverse (Conflict), as
    docker's noOverwriteDirNonDir. Invalid for members that are absolute or lead upwards; what came
    before them stays.
    """
    iterator = iter(chunks)
    first = b""
    while len(first) < 6 and (chunk := next(iterator, b"")):
        first += chunk

    def whole() -> Iterable[bytes]:
        yield first
        yield from iterator

    source = ByteSource(iter(codecs.decompress(whole(), codecs.detect(first))))
    with _Target(root, path, owner, keep_kind) as target:
        for entry in TarReader(source, lambda _: None, limits):
            target.member(entry, source)
        target.finish()


def open_inside(root: int, path: str, flags: int = os.O_PATH) -> OwnedFd:
    """Open `path` as a process with that root would; NotFound names the path."""
    try:
        return openat2.openat2(root, path.lstrip("/") or ".", flags, _RESOLVE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: {error.strerror}") from error


class _Target:
    def __init__(
        self, root: int, path: str, owner: tuple[int, int] | None, keep_kind: bool
    ) -> None:
        self._root = root
        self._base = path.strip("/")
        self._owner = owner
        self._keep_kind = keep_kind
        self._times: dict[bytes, Entry] = {}
        with open_inside(root, path, os.O_PATH) as fd:
            if not stat.S_ISDIR(os.fstat(int(fd)).st_mode):
                raise Invalid(f"{path} is not a directory")

    def __enter__(self) -> "_Target":
        return self

    def __exit__(self, *_: object) -> None:
        self._times.clear()

    def _open(self, path: bytes, *, make: bool = False) -> OwnedFd:
        """Directory `path` below the base."""
        full = os.path.join(self._base, os.fsdecode(path)) or "."
        try:
            return openat2.openat2(self._root, full, _DIRECTORY, _RESOLVE)
        except FileNotFoundError:
            if not make or not path:
                raise
        parent, _, name = path.rpartition(b"/")
        with self._open(parent, make=True) as above, suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=int(above))
        return openat2.openat2(self._root, full, _DIRECTORY, _RESOLVE)

    @staticmethod
    def _normal(raw: bytes, owner: bytes) -> bytes:
        if raw.startswith(b"/"):
            raise Invalid(f"archive member {show(owner)}: an absolute path")
        parts = [part for part in raw.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise Invalid(f"archive member {show(owner)}: a path leads upwards by '..'")
        return b"/".join(parts)

    def member(self, entry: Entry, source: ByteSource) -> None:
        """Make one member, replacing what is there."""
        path = self._normal(entry.name, entry.name)
        if not path:
            if entry.kind != tar.DIRECTORY:
                raise Invalid(f"archive member {show(entry.name)}: the root must be a directory")
            return
        if self._owner is not None:
            entry.uid, entry.gid = self._owner
        parent, _, name = path.rpartition(b"/")
        try:
            with self._open(parent, make=True) as directory:
                self._place(int(directory), name, path, entry, source)
        except OSError as error:
            raise _explained(entry, error) from error

    def _place(
        self, directory: int, name: bytes, path: bytes, entry: Entry, source: ByteSource
    ) -> None:
        exists = self._clear(directory, name, entry)
        if entry.kind == tar.DIRECTORY:
            if not exists:
                os.mkdir(name, 0o700, dir_fd=directory)
            self._times[path] = entry
            return
        if entry.kind == tar.LINK:
            target = self._normal(entry.link, entry.name)
            above, _, target_name = target.rpartition(b"/")
            with self._open(above) as there:
                os.link(
                    target_name, name, src_dir_fd=int(there), dst_dir_fd=directory,
                    follow_symlinks=False,
                )  # fmt: skip
            return
        if entry.kind == tar.REGULAR:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with OwnedFd(os.open(name, flags, 0o600, dir_fd=directory)) as fd:
                self._body(int(fd), entry, source)
                self._attributes(int(fd), entry)
            return
        if entry.kind == tar.SYMLINK:
            os.symlink(entry.link, name, dir_fd=directory)
        else:
            self._special(directory, name, entry)
        os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        if entry.kind != tar.SYMLINK:
            with OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)) as fd:
                os.chmod(f"/proc/self/fd/{int(fd)}", entry.mode)
        time = entry.mtime * 10**9 + entry.mtime_ns
        os.utime(name, ns=(time, time), dir_fd=directory, follow_symlinks=False)

    def _clear(self, directory: int, name: bytes, entry: Entry) -> bool:
        """Make room for the member; True if a directory is there and stays."""
        try:
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        is_directory = stat.S_ISDIR(info.st_mode)
        if is_directory and entry.kind == tar.DIRECTORY:
            return True
        if self._keep_kind and is_directory != (entry.kind == tar.DIRECTORY):
            kinds = ("directory", "non-directory")
            raise Conflict(
                f"cannot overwrite {kinds[not is_directory]} {show(entry.name)} with "
                f"{kinds[is_directory]}"
            )
        if is_directory:
            files.remove_tree_at(directory, name)
        else:
            os.unlink(name, dir_fd=directory)
        return False

    @staticmethod
    def _special(directory: int, name: bytes, entry: Entry) -> None:
        kind = {tar.CHAR: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK, tar.FIFO: stat.S_IFIFO}
        device = os.makedev(entry.major, entry.minor) if entry.kind != tar.FIFO else 0
        os.mknod(name, kind[entry.kind] | 0o600, device, dir_fd=directory)

    @staticmethod
    def _body(fd: int, entry: Entry, source: ByteSource) -> None:
        for offset, length in entry.sparse if entry.sparse is not None else [(0, entry.size)]:
            os.lseek(fd, offset, os.SEEK_SET)
            before = source.consumed
            for view in source.views(length):
                files.write_all(fd, view)
            if source.consumed - before != length:
                raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
        os.ftruncate(fd, entry.size)

    @staticmethod
    def _attributes(fd: int, entry: Entry) -> None:
        os.fchown(fd, entry.uid, entry.gid)
        for key, value in (entry.xattrs or {}).items():
            if not key.startswith(_OVERLAY):
                try:
                    os.setxattr(fd, key, value)
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
        os.fchmod(fd, entry.mode)
        time = entry.mtime * 10**9 + entry.mtime_ns
        os.utime(fd, ns=(time, time))

    def finish(self) -> None:
        """Attributes of directories, deepest first: making entries would change their times."""
        for path in sorted(self._times, key=lambda p: p.count(b"/"), reverse=True):
            entry = self._times[path]
            try:
                with self._open(path) as fd:
                    self._attributes(int(fd), entry)
            except FileNotFoundError:
                continue  # the workload removed it meanwhile
            except OSError as error:
                raise _explained(entry, error) from error


def _explained(entry: Entry, error: OSError) -> Exception:
    """The error for people; a full disk and the like stay what they are."""
    text = f"archive member {show(entry.name)}: {error.strerror}"
    if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENOENT, errno.EINVAL):
        return Invalid(text)
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS, errno.EOPNOTSUPP):
        return Unsupported(text)
    return OSError(error.errno, text)
