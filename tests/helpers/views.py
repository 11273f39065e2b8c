"""What a directory tree looks like to those who use it, for comparing two of them."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bulkhead.linux import mounts, overlayfs


def view(root: str) -> dict[str, dict[str, Any]]:
    """path → everything visible: bytes, mode, owner, time, attributes, links, devices.

    Left out, as they differ between file systems by nature: inode numbers, allocated blocks, a
    directory's size and link count, access and change times.
    """
    found: dict[str, dict[str, Any]] = {}
    for base, directories, files in os.walk(root, followlinks=False):
        for name in [".", *directories, *files] if base == root else [*directories, *files]:
            path = os.path.join(base, name)
            found[os.path.relpath(path, root)] = _item(path)
    return found


def _item(path: str) -> dict[str, Any]:
    info = os.lstat(path)
    item: dict[str, Any] = {
        "mode": oct(info.st_mode),
        "owner": (info.st_uid, info.st_gid),
        "mtime": info.st_mtime_ns,
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        },
    }
    if not stat.S_ISDIR(info.st_mode):
        item["nlink"] = info.st_nlink
        item["size"] = info.st_size
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as stream:
            item["data"] = hashlib.file_digest(stream, "sha256").hexdigest()
    elif stat.S_ISLNK(info.st_mode):
        item["link"] = os.readlink(path)
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        item["device"] = info.st_rdev
    return item


@contextmanager
def overlay(target: str, lowers: Sequence[str], upper: str = "", work: str = "") -> Iterator[str]:
    """An overlay of `lowers`, topmost first, mounted at `target` as our containers have it."""
    options = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off")]
    given = list(lowers)
    if not upper and len(given) == 1:  # overlayfs wants two
        empty = target + ".empty"
        os.makedirs(empty, exist_ok=True)
        given.append(empty)
    os.makedirs(target, exist_ok=True)
    with overlayfs.detached(given, options, upper=upper, work=work) as mounted:
        mounts.attach(int(mounted), target)
    try:
        yield target
    finally:
        mounts.unmount(target, mounts.MNT_DETACH)
