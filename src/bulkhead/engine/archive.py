"""Copying files into and out of workloads as tar streams.

Every path that comes from outside, be it the request's or an archive member's, is opened with
RESOLVE_IN_ROOT from a descriptor of the root, and what is found there is used by descriptor: no
path is looked up twice, so a symbolic link swapped meanwhile changes where inside the root we land,
never that it is inside.
"""

import contextlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from bulkhead.engine.health import moment
from bulkhead.errors import Denied, Invalid, NotFound
from bulkhead.linux import openat2
from bulkhead.linux.fds import OwnedFd

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_XATTR = "SCHILY.xattr."
_GO_BITS = (
    (stat.S_IFDIR, 1 << 31),
    (stat.S_IFLNK, 1 << 27),
    (stat.S_IFBLK, 1 << 26),
    (stat.S_IFIFO, 1 << 25),
    (stat.S_IFSOCK, 1 << 24),
    (stat.S_IFCHR, 1 << 26 | 1 << 21),
)


def go_mode(mode: int) -> int:
    """A mode as Go's os.FileMode, which Docker's API speaks."""
    found = mode & 0o777
    for kind, bits in _GO_BITS:
        if stat.S_IFMT(mode) == kind:
            found |= bits
    for bit, value in ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20)):
        if mode & bit:
            found |= value
    return found


def split(path: str) -> tuple[str, str]:
    """(directory, last name); the name is "" when the path itself is to be followed."""
    if "\0" in path:
        raise Invalid("a path contains a NUL byte")
    following = path.endswith(("/", "/.")) or path in {"", ".", "/"}
    clean = posixpath.normpath("/" + path)
    clean = "/" + clean.lstrip("/")
    if following or clean == "/":
        return clean, ""
    return posixpath.dirname(clean), posixpath.basename(clean)


def missing(name: str, path: str) -> NotFound:
    """What a path that is not there is answered with."""
    return NotFound(f"Could not find the file {path} in container {name}")


def _open_directory(root: int, path: str) -> OwnedFd:
    return openat2.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, openat2.IN_ROOT)


def describe(root: int, path: str, workload: str) -> dict[str, Any]:
    """Docker's ContainerPathStat of `path`; a link at its end is not followed."""
    directory, name = split(path)
    try:
        with openat2.openat2(root, directory, os.O_PATH, openat2.IN_ROOT) as parent:
            if name == "":
                status = os.fstat(int(parent))
                return _described(posixpath.basename(directory) or "/", status, "")
            status = os.lstat(name, dir_fd=int(parent))
            link = ""
            if stat.S_ISLNK(status.st_mode):
                link = os.readlink(name, dir_fd=int(parent))
                link = posixpath.normpath(posixpath.join(directory, link))
            return _described(name, status, link)
    except (FileNotFoundError, NotADirectoryError):
        raise missing(workload, path) from None
    except OSError as error:
        raise Invalid(f"cannot look at {path} in container {workload}: {error.strerror}") from error


def _described(name: str, status: os.stat_result, link: str) -> dict[str, Any]:
    return {
        "name": name,
        "size": status.st_size,
        "mode": go_mode(status.st_mode),
        "mtime": moment(status.st_mtime_ns),
        "linkTarget": link,
    }


# --- out


def write(root: int, path: str, out: BinaryIO, workload: str) -> None:
    """The tar of `path`, its members below its own last name, to `out`."""
    directory, name = split(path)
    try:
        with (
            openat2.openat2(
                root, directory, os.O_RDONLY | os.O_DIRECTORY, openat2.IN_ROOT
            ) as parent,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            links: dict[tuple[int, int], str] = {}
            if name == "":
                top = posixpath.basename(directory) or "."
                _add_directory(tar, int(parent), top)
                _add_children(tar, int(parent), "" if top == "." else f"{top}/", links)
            else:
                _add(tar, int(parent), name, name, links)
    except (FileNotFoundError, NotADirectoryError):
        raise missing(workload, path) from None
    except BrokenPipeError:
        return  # the client has seen enough
    except OSError as error:
        raise Invalid(f"cannot read {path} in container {workload}: {error.strerror}") from error


def _info(name: str, status: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.mtime = status.st_mtime_ns // 10**9
    if status.st_mtime_ns % 10**9:
        seconds, rest = divmod(status.st_mtime_ns, 10**9)
        info.pax_headers = {"mtime": f"{seconds}.{rest:09d}"}
    return info


def _xattrs(info: tarfile.TarInfo, place: str) -> None:
    with contextlib.suppress(OSError):
        for key in os.listxattr(place, follow_symlinks=False):
            if key.startswith(("trusted.overlay.", "user.overlay.", "system.posix_acl")):
                continue
            value = os.getxattr(place, key, follow_symlinks=False)
            text = value.decode("utf-8", "surrogateescape")
            info.pax_headers = {**info.pax_headers, _XATTR + key: text}


def _add_directory(tar: tarfile.TarFile, fd: int, name: str) -> None:
    info = _info(name, os.fstat(fd))
    info.type = tarfile.DIRTYPE
    _xattrs(info, f"/proc/self/fd/{fd}/.")
    tar.addfile(info)


def _add_children(
    tar: tarfile.TarFile, fd: int, prefix: str, links: dict[tuple[int, int], str]
) -> None:
    for name in sorted(os.listdir(fd)):
        with contextlib.suppress(FileNotFoundError):
            _add(tar, fd, name, prefix + name, links)


def _add(
    tar: tarfile.TarFile, parent: int, name: str, shown: str, links: dict[tuple[int, int], str]
) -> None:
    status = os.lstat(name, dir_fd=parent)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            _add_directory(tar, fd, shown)
            _add_children(tar, fd, f"{shown}/", links)
        finally:
            os.close(fd)
        return
    info = _info(shown, status)
    _xattrs(info, f"/proc/self/fd/{parent}/{name}")
    key = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and key in links:
        info.type, info.linkname = tarfile.LNKTYPE, links[key]
        tar.addfile(info)
    elif kind == stat.S_IFREG:
        _add_file(tar, parent, name, info)
    elif kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=parent)
        tar.addfile(info)
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        tar.addfile(info)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
        tar.addfile(info)
    else:
        return  # sockets have no place in a tar
    if status.st_nlink > 1:
        links.setdefault(key, shown)


class _Exactly:
    """Reads exactly `size` bytes of a file that may change: cut, or filled with zeros."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        if len(data) < wanted:
            data += bytes(wanted - len(data))
        self._left -= wanted
        return data


def _add_file(tar: tarfile.TarFile, parent: int, name: str, info: tarfile.TarInfo) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=parent), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return
        info.size = status.st_size
        tar.addfile(info, _Exactly(file, info.size))


# --- in


class Options:
    """How members are written."""

    def __init__(
        self, *, keep_kinds: bool, owner: tuple[int, int] | None, readonly: bool = False
    ) -> None:
        self.keep_kinds = keep_kinds
        """A directory is not replaced by something else, nor the other way round."""
        self.owner = owner
        """Everything belongs to it; None: as the archive says."""
        self.readonly = readonly


def extract(root: int, path: str, stream: BinaryIO, options: Options, workload: str) -> None:
    """Write the members of the tar `stream` below the directory `path`."""
    if options.readonly:
        raise Denied("container rootfs is marked read-only")
    directory = posixpath.normpath("/" + path)
    try:
        top = _open_directory(root, directory)
    except FileNotFoundError:
        raise missing(workload, path) from None
    except NotADirectoryError:
        raise Invalid("extraction point is not a directory") from None
    except OSError as error:
        raise Invalid(f"cannot open {path} in container {workload}: {error.strerror}") from error
    with top:
        try:
            for member, tar in members(stream):
                _place(root, directory, tar, member, options)
        except tarfile.TarError as error:
            raise Invalid(f"the archive cannot be read: {error}") from error
        except OSError as error:
            raise Invalid(
                f"cannot write to {path} in container {workload}: {error.strerror}"
            ) from error


def members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of an archive, compressed or not, with it; tarfile.TarError."""
    with tarfile.open(fileobj=stream, mode="r|*", errorlevel=2) as tar:
        for member in tar:
            yield member, tar


def _place(
    root: int, top: str, tar: tarfile.TarFile, member: tarfile.TarInfo, options: Options
) -> None:
    parts = [part for part in member.name.split("/") if part not in {"", "."}]
    if ".." in parts or "\0" in member.name:
        raise Invalid(f"the archive's member {member.name!r} leads out of its place")
    if not parts:
        return
    parent = _directories(root, top, parts[:-1])
    with parent:
        _write(root, top, int(parent), parts[-1], tar, member, options)


def _directories(root: int, top: str, parts: list[str]) -> OwnedFd:
    """The directory `parts` below `top`, made if it is not there."""
    path = top
    current = _open_directory(root, path)
    try:
        for part in parts:
            path = posixpath.join(path, part)
            try:
                deeper = _open_directory(root, path)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=int(current))
                deeper = OwnedFd(os.open(part, _DIRECTORY, dir_fd=int(current)))
            current.close()
            current = deeper
    except BaseException:
        current.close()
        raise
    return current


def _clear(parent: int, name: str, member: tarfile.TarInfo, options: Options) -> None:
    """Make room for the member; a directory for a directory stays."""
    try:
        status = os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        if member.isdir():
            return
        if options.keep_kinds:
            raise Invalid(f'cannot overwrite directory "{name}" with non-directory')
        raise Invalid(f"cannot replace the directory {name!r} by something else")
    if member.isdir() and options.keep_kinds:
        raise Invalid(f'cannot overwrite non-directory "{name}" with directory')
    os.unlink(name, dir_fd=parent)


def _write(
    root: int,
    top: str,
    parent: int,
    name: str,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    options: Options,
) -> None:
    _clear(parent, name, member, options)
    if member.isdir():
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    elif member.isreg():
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            _copy(tar, member, fd)
        except BaseException:
            os.close(fd)
            raise
    elif member.islnk():
        _link(root, top, parent, name, member)
        return
    else:
        _special(parent, name, member, options)
        return
    try:
        _finish(fd, member, options)
    finally:
        os.close(fd)


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, fd: int) -> None:
    source = tar.extractfile(member)
    assert source is not None
    while data := source.read(_CHUNK):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


def _owner(member: tarfile.TarInfo, options: Options) -> tuple[int, int]:
    return options.owner if options.owner is not None else (member.uid, member.gid)


def _times(member: tarfile.TarInfo) -> tuple[int, int]:
    moment_ns = int(float(member.mtime) * 10**9)
    return moment_ns, moment_ns


def attributes(member: tarfile.TarInfo) -> dict[bytes, bytes]:
    """The extended attributes of a member that may be set from outside."""
    return {
        os.fsencode(key.removeprefix(_XATTR)): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
        and not key.removeprefix(_XATTR).startswith(("trusted.", "user.overlay."))
    }


def _finish(fd: int, member: tarfile.TarInfo, options: Options) -> None:
    os.fchown(fd, *_owner(member, options))
    os.fchmod(fd, member.mode & 0o7777)  # after chown, which clears set-id bits
    for attribute, value in attributes(member).items():
        with contextlib.suppress(OSError):
            os.setxattr(fd, attribute, value)
    os.utime(fd, ns=_times(member))


def _link(root: int, top: str, parent: int, name: str, member: tarfile.TarInfo) -> None:
    """A hard link to another member, found below the same place."""
    parts = [part for part in member.linkname.split("/") if part not in {"", "."}]
    if ".." in parts or not parts:
        raise Invalid(f"the archive's link {member.name!r} leads out of its place")
    with _directories(root, top, parts[:-1]) as holder:
        os.link(parts[-1], name, src_dir_fd=int(holder), dst_dir_fd=parent, follow_symlinks=False)


def _special(parent: int, name: str, member: tarfile.TarInfo, options: Options) -> None:
    if member.issym():
        os.symlink(member.linkname, name, dir_fd=parent)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        device = os.makedev(member.devmajor, member.devminor)
        os.mknod(name, kind | 0o600, device, dir_fd=parent)
    elif member.isfifo():
        os.mkfifo(name, 0o600, dir_fd=parent)
    else:
        raise Invalid(f"the archive's member {member.name!r} is of a kind that cannot be written")
    os.chown(name, *_owner(member, options), dir_fd=parent, follow_symlinks=False)
    if not member.issym():
        os.chmod(name, member.mode & 0o7777, dir_fd=parent)
    os.utime(name, ns=_times(member), dir_fd=parent, follow_symlinks=False)
