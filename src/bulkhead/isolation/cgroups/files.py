"""Reading and writing control group files, with errors that people understand."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator

from bulkhead.errors import (
    BulkheadError,
    Conflict,
    Denied,
    Internal,
    Invalid,
    NotFound,
    Unsupported,
)

_WRITE = os.O_WRONLY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def put(path: str, value: str, dir_fd: int | None = None) -> None:
    """Write `value` in one write(2), as these files want it; OSError."""
    fd = os.open(path, _WRITE, dir_fd=dir_fd)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def get(path: str, dir_fd: int | None = None) -> str:
    """The file's text without its last newline; OSError."""
    fd = os.open(path, _READ, dir_fd=dir_fd)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="replace").rstrip("\n")


def get_or(path: str, default: str) -> str:
    """The file's text, or `default` where the file or its group does not exist."""
    try:
        return get(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOTDIR):
            return default
        raise


def number(path: str, default: int = 0) -> int:
    """The file's number; "max" is 2**64 - 1, absence `default`."""
    text = get_or(path, "")
    if text == "max":
        return 2**64 - 1
    return int(text) if text else default


def flat(text: str) -> dict[str, int]:
    """Lines "key value" as a mapping; others are left out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            found[key] = int(value)
    return found


def open_folder(path: str, dir_fd: int | None = None) -> int:
    """A descriptor of a directory; OSError."""
    return os.open(path, _FOLDER, dir_fd=dir_fd)


def folders(path: str) -> Iterator[str]:
    """`path` and every control group below it, children before their parents."""
    try:
        with os.scandir(path) as entries:
            children = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for child in children:
        yield from folders(child)
    yield path


def tasks(path: str, file: str = "cgroup.procs") -> list[int]:
    """Process ids in the group at `path` and below it, each once."""
    found: dict[int, None] = {}
    for folder in folders(path):
        # A group that is just going away (ENODEV) or a threaded one (EOPNOTSUPP) lists none.
        for line in get_or(f"{folder}/{file}", "").split():
            found[int(line)] = None
    return list(found)


def remove(path: str) -> bool:
    """Remove the group at `path` and those below it; False while something in them lives."""
    # Mostly there is none below, and looking costs more than trying.
    return _rmdir(path) or all(_rmdir(folder) for folder in folders(path))


def _rmdir(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise translate(error, folder, "", "cannot remove the control group") from error
    return True


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll, ever more slowly up to 20 ms; whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    pause = 0.0002
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return True


def translate(error: OSError, path: str, value: str, what: str) -> BulkheadError:
    """The kernel's answer to a write of `value` to `path` as an error for people."""
    subject = f"{what} " if what else ""
    place = f"{value!r} to {path}" if value else path
    reason = os.strerror(error.errno or 0)
    text = f"{subject}({place}): {reason}"
    match error.errno:
        case errno.EINVAL | errno.ERANGE | errno.ENODEV | errno.E2BIG | errno.ENOSPC:
            return Invalid(f"the kernel refuses {text}")
        case errno.EPERM | errno.EACCES | errno.EROFS:
            return Denied(f"not permitted: {text}; control groups need root or delegation")
        case errno.EBUSY:
            return Conflict(f"in use: {text}")
        case errno.ENOENT:
            return NotFound(f"no such control group: {text}")
        case errno.EOPNOTSUPP:
            return Unsupported(f"not supported: {text}")
        case _:
            return Internal(f"failed: {text}")


@contextlib.contextmanager
def explained(path: str, value: str = "", what: str = "") -> Iterator[None]:
    """Turn an OSError of the block into an error for people."""
    try:
        yield
    except OSError as error:
        raise translate(error, path, value, what) from error
