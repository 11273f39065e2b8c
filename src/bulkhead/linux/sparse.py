"""Copying a file without its holes, or without copying at all where the file system shares blocks.

ioctl_ficlone(2), lseek(2) SEEK_DATA.
"""

import errno
import fcntl
import os

_FICLONE = 0x40049409
_STEP = 1 << 20
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})


def copy_file(source: str, target: str, mode: int = 0o666) -> None:
    """Make `target`, which must not be there, a copy of `source`; `mode` is open(2)'s. OSError."""

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags, mode)

    with open(source, "rb") as old, open(target, "xb", opener=opener) as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole is left
                    raise
                return
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(old.fileno(), min(end - at, _STEP), at)
                if not data:
                    raise OSError(errno.EIO, "it was cut while it was copied", source)
                at += os.pwrite(new.fileno(), data, at)
