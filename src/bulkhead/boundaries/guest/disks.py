"""A guest's writable disk: a sparse ext4 image, copied from a template that is made once per size.

    <root>/kernels/disks/ext4-BYTES-j.img     the templates, empty file systems

The image's size is the workload's quota; on the host it takes what the guest has written. The
guest trusts it as its own disk, the host never mounts it.
"""

import contextlib
import os
import subprocess
import tempfile

from bulkhead.errors import Invalid, Unavailable, Unsupported
from bulkhead.home import Home
from bulkhead.linux import sparse

DEFAULT_BYTES = 10 << 30
_MINIMUM_BYTES = 16 << 20
_MAKE_S = 120


def make_disk(home: Home, path: str, size: int = 0, *, uid: int) -> None:
    """An empty ext4 file system of `size` bytes at `path`, owned by `uid`; kept if it is there.

    Invalid for a size that no file system fits in, Unsupported without mke2fs(8).
    """
    size = (size or DEFAULT_BYTES) // 4096 * 4096
    if size < _MINIMUM_BYTES:
        raise Invalid(f"a guest's disk has at least {_MINIMUM_BYTES >> 20} MiB")
    if not os.path.exists(path):
        template = _template(home, size)
        scratch = f"{path}.new"
        with contextlib.ExitStack() as undo:
            undo.callback(_forget, scratch)
            sparse.copy_file(template, scratch)
            os.rename(scratch, path)
            undo.pop_all()
    os.chown(path, uid, uid)
    os.chmod(path, 0o600)


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _template(home: Home, size: int) -> str:
    folder = home.in_root("kernels", "disks")
    path = f"{folder}/ext4-{size}-j.img"
    if os.path.exists(path):
        return path
    os.makedirs(folder, mode=0o700, exist_ok=True)
    fd, scratch = tempfile.mkstemp(dir=folder, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, scratch)
        os.truncate(fd, size)
        os.close(fd)
        _make(scratch, size)
        os.rename(scratch, path)
        undo.pop_all()
    return path


def _make(path: str, size: int) -> None:
    """mke2fs with a small journal: after a kill of its kernel the file system is whole."""
    command = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "upper",
        "-O", "^resize_inode,sparse_super2", "-J", "size=4", "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", "-I", "256",
        "-N", str(max(8192, min(size // 16384, 1 << 20))), path,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MAKE_S,
            check=False,
            env={"PATH": "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"},
        )
    except FileNotFoundError:
        raise Unsupported("mke2fs is not installed: apt-get install e2fsprogs") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"mke2fs: {error}") from error
    if done.returncode:
        raise Unavailable(f"mke2fs: {done.stderr.strip() or done.returncode}")
