"""Copying a tree of files with all that they have, between directories given by descriptors."""

import contextlib
import os
import stat


def copy_directory(source: int, target: int) -> None:
    """Copy what is in directory `source`, and its own status, to directory `target`.

    No symbolic link is followed. Owners, modes, times, extended attributes (not those of overlays)
    and hard links are kept; OSError as from the system calls.
    """
    _copy_tree(source, target, {})
    _copy_status(source, target)


def _copy_status(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(("trusted.overlay.", "user.overlay.")):
            with contextlib.suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_tree(
    source: int, target: int, links: dict[tuple[int, int], str], where: str = ""
) -> None:
    """Copy everything in directory `source` into directory `target`, nothing followed.

    `links` remembers files with several names by device and inode, as paths from the top, which is
    open as /proc/self/fd of the first call's target.
    """
    top = links.setdefault((-1, -1), f"/proc/self/fd/{target}")
    for name in os.listdir(source):
        status = os.lstat(name, dir_fd=source)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            _copy_inner(source, target, name, links, f"{where}{name}/")
            continue
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and key in links:
            os.link(f"{top}/{links[key]}", name, dst_dir_fd=target, follow_symlinks=False)
            continue
        if status.st_nlink > 1:
            links[key] = f"{where}{name}"
        _copy_other(source, target, name, status, kind)


def _copy_inner(
    source: int, target: int, name: str, links: dict[tuple[int, int], str], where: str
) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    os.mkdir(name, 0o700, dir_fd=target)
    inner = os.open(name, flags, dir_fd=source)
    try:
        made = os.open(name, flags, dir_fd=target)
        try:
            _copy_tree(inner, made, links, where)
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
                while data := file.read(1 << 20):
                    out.write(data)
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
