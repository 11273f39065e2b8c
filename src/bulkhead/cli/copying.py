"""The local end of a copy: where it goes, and tar in and out of the file system.

Members of an archive come from a container and are not trusted: names with `..`, absolute names,
and anything below a symbolic link that the archive itself made are refused.
"""

import os
import stat
import tarfile
from typing import IO, NamedTuple

from bulkhead.errors import Invalid, NotFound


class Place(NamedTuple):
    """Where members go: into `folder`, the first component of their names replaced by `name`."""

    folder: str
    name: str | None
    """None: the first component is dropped (the contents of a directory)."""
    shown: str
    whole: bool = False
    """Every component of the names is kept."""


def resolve_local(target: str, name: str, *, directory: bool, contents: bool) -> Place:
    """The Place for copying container file `name` to local `target`, by cp(1)'s rules."""
    if os.path.isdir(target):
        return Place(target, None if contents and directory else name, target)
    if os.path.lexists(target):
        if directory:
            raise Invalid(f"cannot copy a directory to a file: {target}")
        return Place(os.path.dirname(os.path.abspath(target)), os.path.basename(target), target)
    parent = os.path.dirname(os.path.abspath(target.rstrip("/")))
    if not os.path.isdir(parent):
        raise NotFound(f'invalid output path: directory "{parent}" does not exist')
    if target.endswith("/") and not directory:
        raise NotFound(f'invalid output path: directory "{target}" does not exist')
    return Place(parent, os.path.basename(target.rstrip("/")), target)


def _renamed(name: str, place: Place) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Invalid(f"the archive names {name!r}, which is outside")
    rest = parts if place.whole else parts[1:]
    return "/".join([*([place.name] if place.name else []), *rest])


def extract(stream: IO[bytes], place: Place, *, keep_owner: bool) -> None:
    """Unpack a tar stream; Invalid for a member that would leave the place."""
    root = os.path.realpath(place.folder)
    folders: list[tuple[str, tarfile.TarInfo]] = []
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            inner = _renamed(member.name, place)
            if not inner:
                continue
            path = f"{root}/{inner}"
            _check_parent(path, member, root)
            _member(archive, member, path, place, root)
            if member.isdir():
                folders.append((path, member))
            elif not member.islnk():  # which has those of what it is; a link's would be its aim's
                _attributes(path, member, keep_owner=keep_owner)
    for path, member in reversed(folders):
        _attributes(path, member, keep_owner=keep_owner)


def _check_parent(path: str, member: tarfile.TarInfo, root: str) -> None:
    parent = os.path.realpath(os.path.dirname(path))
    if parent != root and not parent.startswith(root.rstrip("/") + "/"):
        raise Invalid(f"the archive's {member.name!r} goes through a link to outside")


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, place: Place, root: str
) -> None:
    if member.isdir():
        if not os.path.isdir(path) or os.path.islink(path):
            if os.path.lexists(path):
                raise Invalid(f"cannot overwrite non-directory {path} with directory")
            os.mkdir(path)
        return
    if os.path.isdir(path) and not os.path.islink(path):
        raise Invalid(f"cannot overwrite directory {path} with non-directory")
    if os.path.lexists(path):
        os.unlink(path)
    if member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        known = f"{root}/{_renamed(member.linkname, place)}"
        _check_parent(known, member, root)
        os.link(known, path, follow_symlinks=False)
    elif member.isreg():
        data = archive.extractfile(member)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "wb") as file:
            while data is not None and (chunk := data.read(1 << 20)):
                file.write(chunk)
    elif member.isfifo():
        os.mkfifo(path)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind | member.mode, os.makedev(member.devmajor, member.devminor))


def _attributes(path: str, member: tarfile.TarInfo, *, keep_owner: bool) -> None:
    if keep_owner:
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        mode = member.mode
        if not keep_owner and (member.uid, member.gid) != (os.geteuid(), os.getegid()):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)  # it would lend the rights of somebody else
        os.chmod(path, mode)
    os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)


def add_local(stream: IO[bytes], source: str, inner: str) -> None:
    """Write `source` (a file, or a directory with all below) as a tar where `inner` is its name."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        path = source.rstrip("/") or "/"
        if source.endswith(("/", "/.")) or source == ".":
            path = os.path.realpath(source)
        archive.add(path, arcname=inner, recursive=True)
