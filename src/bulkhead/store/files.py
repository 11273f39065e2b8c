"""Files and locks of the store: durable publication, scratch space that a crash cannot leak."""

import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress


def sync_directory(path: str) -> None:
    """Make the names in directory `path` durable, fsync(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: str, data: bytes) -> None:
    """A new file `path` with `data`, on the disk when this returns (its name is not yet)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data` at the file's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Gate:
    """A shared/exclusive lock between threads and processes: flock(2) on the file `path`.

    A thread that holds it exclusively may ask for it again.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._mine = threading.local()

    @contextmanager
    def _hold(self, how: int) -> Iterator[None]:
        if getattr(self._mine, "exclusive", False):
            yield
            return
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            self._mine.exclusive = how == fcntl.LOCK_EX
            yield
        finally:
            self._mine.exclusive = False
            os.close(fd)

    def shared(self) -> AbstractContextManager[None]:
        """Held by whoever publishes or relies on content."""
        return self._hold(fcntl.LOCK_SH)

    def exclusive(self) -> AbstractContextManager[None]:
        """Held by the collector."""
        return self._hold(fcntl.LOCK_EX)


def try_lock(fd: int) -> bool:
    """Whether `fd` could be locked at once; the lock lives as long as the open file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def scratch(parent: str, gate: Gate) -> Iterator[str]:
    """A private directory below `parent`, removed at the end; `sweep` removes it after a crash."""
    path = f"{parent}/{secrets.token_hex(8)}"
    with gate.shared():
        os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(fd)


def sweep(parent: str) -> None:
    """Remove what crashed users of `scratch` left; the gate must be held exclusively."""
    for name in os.listdir(parent):
        path = f"{parent}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if try_lock(fd):
                remove_tree(path)
        finally:
            os.close(fd)


def remove_tree(path: str) -> None:
    """Remove the file or directory `path` if it exists, never following symbolic links."""
    try:
        shutil.rmtree(path)
    except NotADirectoryError:
        with suppress(FileNotFoundError):
            os.unlink(path)
    except FileNotFoundError:
        return


def disk_bytes(path: str) -> int:
    """Bytes that `path` and all below it occupy on the disk, hard links counted once."""
    total = 0
    seen: set[tuple[int, int]] = set()
    pending = [path]
    while pending:
        here = pending.pop()
        try:
            info = os.lstat(here)
        except FileNotFoundError:
            continue
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        total += info.st_blocks * 512
        if (info.st_mode & 0o170000) == 0o040000:
            with suppress(FileNotFoundError), os.scandir(here) as entries:
                pending.extend(entry.path for entry in entries)
    return total


def sweep_partial(parent: str, age_s: float) -> int:
    """Remove partial blobs that nobody writes and that are older than `age_s`; bytes freed."""
    freed = 0
    for name in os.listdir(parent):
        path = f"{parent}/{name}"
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if time.time() - info.st_mtime >= age_s and try_lock(fd):
                os.unlink(path)
                freed += info.st_blocks * 512
        finally:
            os.close(fd)
    return freed


def remove_tree_at(directory: int, name: bytes) -> None:
    """Remove directory `name` of directory `directory` with all below it, following no links."""
    shutil.rmtree(os.fsdecode(name), dir_fd=directory)
