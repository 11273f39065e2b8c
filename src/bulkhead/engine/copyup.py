"""The first use of a volume fills it with what the image has at its place."""

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING

from bulkhead.engine import views
from bulkhead.errors import Invalid
from bulkhead.linux import openat2

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine


def subdirectory(path: str, subpath: str) -> str:
    """`subpath` within the volume at `path`; Invalid if it is not there or leads out."""
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with openat2.openat2(root, subpath, os.O_PATH, openat2.BENEATH) as fd:
            return os.readlink(f"/proc/self/fd/{int(fd)}")
    except OSError as error:
        raise Invalid(f"cannot access path {subpath} of the volume: {error.strerror}") from error
    finally:
        os.close(root)


async def fill(engine: "Engine", target: str, lowers: tuple[str, ...], destination: str) -> None:
    """Copy the image's directory at `destination` into the empty volume `target`."""
    if not any(_has(layer, destination) for layer in lowers) or os.listdir(target):
        return

    def copy(root: int) -> None:
        try:
            source = openat2.openat2(
                root, destination, os.O_RDONLY | os.O_DIRECTORY, openat2.IN_ROOT
            )
        except OSError:
            return
        into = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with source:
                copy_tree(int(source), into, {})
                _copy_status(int(source), into)
        finally:
            os.close(into)

    await engine.blocking(lambda: views.with_layers(lowers, copy))


def _has(layer: str, destination: str) -> bool:
    try:
        root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        openat2.openat2(root, destination, os.O_PATH, openat2.IN_ROOT).close()
    except OSError:
        return False
    finally:
        os.close(root)
    return True


def _copy_status(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(("trusted.overlay.", "user.overlay.")):
            with contextlib.suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_tree(source: int, target: int, links: dict[tuple[int, int], str], where: str = "") -> None:
    """Copy everything in directory `source` into directory `target`, nothing followed.

    `links` remembers files with several names by device and inode, as paths from the top, which is
    open as /proc/self/fd of the first call's target.
    """
    top = links.setdefault((-1, -1), f"/proc/self/fd/{target}")
    for name in os.listdir(source):
        status = os.lstat(name, dir_fd=source)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            _copy_directory(source, target, name, links, f"{where}{name}/")
            continue
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in links:
            os.link(f"{top}/{links[key]}", name, dst_dir_fd=target, follow_symlinks=False)
            continue
        if status.st_nlink > 1:
            links[key] = f"{where}{name}"
        _copy_other(source, target, name, status, kind)


def _copy_directory(
    source: int, target: int, name: str, links: dict[tuple[int, int], str], where: str
) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    os.mkdir(name, 0o700, dir_fd=target)
    inner = os.open(name, flags, dir_fd=source)
    try:
        made = os.open(name, flags, dir_fd=target)
        try:
            copy_tree(inner, made, links, where)
            _copy_status(inner, made)
        finally:
            os.close(made)
    finally:
        os.close(inner)


def _copy_other(source: int, target: int, name: str, status: os.stat_result, kind: int) -> None:
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    elif kind == stat.S_IFREG:
        reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        with os.fdopen(reading, "rb") as file:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=target), "wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
                out.flush()
                _copy_status(file.fileno(), out.fileno())
        return
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
    os.utime(
        name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False
    )
