"""Volumes that are one file: an ext4 image whose size is the quota.

    ROOT/volumes/NAME/disk.ext4     the image, sparse
    ROOT/volumes/NAME/_data         where the host mounts it while containers use it

Containers have it by a loop device that goes with its mount, guests as a disk of their own. What a
guest has written is checked by e2fsck(8) before the host's kernel reads it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable

from bulkhead.errors import Conflict, Invalid, Unavailable, Unsupported
from bulkhead.linux import loop, syscall

IMAGE = "disk.ext4"
GUEST = "written-by-a-guest"
"""A mark beside the image."""
_LEAST = 16 << 20
_MOST = 16 << 40
_TOOL_S = 600
_FREE_S = 30.0
_MS_NOSUID, _MS_NODEV, _MS_RDONLY = 2, 4, 1
_SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_CHECK = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from bulkhead.volumes import checker; sys.exit(checker.main(sys.argv[2]))"
)
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
_PATH = {"PATH": "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"}


def check_size(size: int) -> int:
    """Bytes, whole blocks; Invalid if no file system has that size."""
    if not _LEAST <= size <= _MOST:
        raise Invalid(f"a volume's size is at least {_LEAST >> 20}m and at most {_MOST >> 40}t")
    return size // 4096 * 4096


def make(directory: str, size: int) -> str:
    """The image in `directory`, made if it is missing; Unsupported without mke2fs."""
    path = f"{directory}/{IMAGE}"
    if os.path.exists(path):
        return path
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    fd, scratch = tempfile.mkstemp(dir=directory, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, scratch)
        try:
            os.truncate(fd, size)
        finally:
            os.close(fd)
        _tool(
            "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-E",
            "lazy_itable_init=1,nodiscard,root_owner=0:0", scratch,
        )  # fmt: skip
        # An empty volume is empty: workloads look.
        _tool("debugfs", "-w", "-R", "rmdir lost+found", scratch)
        os.chmod(scratch, 0o644)
        os.rename(scratch, path)
        undo.pop_all()
    return path


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _tool(*command: str, good: frozenset[int] = frozenset({0}), name: str = "") -> None:
    name = name or command[0]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TOOL_S,
            check=False,
            env=_PATH,
        )
    except FileNotFoundError:
        raise Unsupported(f"{name} is not installed: apt-get install e2fsprogs") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name}: {error}") from error
    if done.returncode not in good:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Unavailable(f"{name}: {said[-1] if said else done.returncode}")


def lend(directory: str) -> str:
    """The image, for a guest that may write it; Conflict if the host still has it mounted."""
    path = f"{directory}/{IMAGE}"
    deadline = time.monotonic() + _FREE_S
    # The kernel's name of the file has no symbolic links in it.
    real = os.path.realpath(path)
    while real in _looped():
        if time.monotonic() > deadline:
            raise Conflict(f"{path} is still being written back by the host")
        time.sleep(0.02)
    with _locks[directory]:
        _mark(directory)
    return path


def _mark(directory: str) -> None:
    """On the disk before a guest can write: a host that crashed is to check, too."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with open(f"{directory}/{GUEST}", "wb") as mark:
        os.fsync(mark.fileno())
    folder = os.open(directory, flags)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _looped() -> set[str]:
    """Files that loop devices have; loop(4)."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir("/sys/block"):
            if entry.name.startswith("loop"):
                with contextlib.suppress(OSError), open(f"{entry.path}/loop/backing_file") as file:
                    found.add(file.read().strip())
    return found


def take_back(directory: str, allowed: Callable[[], None] = lambda: None) -> None:
    """Check the image if a guest has had it; Unavailable if it cannot be mended.

    `allowed` raises if a guest has it now. In a jail (checker.py), and it may take minutes: for a
    thread.
    """
    mark = f"{directory}/{GUEST}"
    if not os.path.exists(mark):
        return
    with _locks[directory]:
        allowed()
        if os.path.exists(mark):
            # 1: errors were corrected.
            command = [sys.executable, "-I", "-c", _CHECK, _SOURCE, f"{directory}/{IMAGE}"]
            _tool(*command, good=frozenset({0, 1}), name="e2fsck")
            os.unlink(mark)


def mount(directory: str, target: str, *, readonly: bool = False) -> None:
    """Mount the image on `target`; the loop device goes when it is unmounted everywhere."""
    path = f"{directory}/{IMAGE}"
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if readonly else 0)
    try:
        device, name = loop.attach(path)
        with device:
            data = b"errors=remount-ro"
            syscall.call("mount", name.encode(), os.fsencode(target), b"ext4", flags, data)
    except OSError as error:
        raise Unavailable(
            f"cannot mount {path}: {os.strerror(error.errno or 0)} (a loop device and ext4 are "
            "needed: modprobe loop ext4)"
        ) from error
