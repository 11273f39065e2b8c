"""Reading a file of an image before anything of it is mounted.

`Layers` is overlayfs in miniature, read-only: directories merge from the topmost layer down,
whiteouts and opaque directories hide, symbolic links are followed inside the root only. Every step
goes by directory descriptors without following, so no link of an image leads to the host.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import Self

from bulkhead.errors import Invalid

_MAX_LINKS = 40
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")

Level = tuple[int, ...]
"""A merged directory: descriptors of its parts, topmost first."""


class Layers:
    """The merged view of directories, topmost first. A context manager: it holds descriptors."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._undo = contextlib.ExitStack()
        self._root: Level = ()
        with contextlib.ExitStack() as undo:
            self._root = tuple(self._keep(os.open(path, _OPEN_TOP), undo) for path in directories)
            self._undo = undo.pop_all()

    @staticmethod
    def _keep(fd: int, undo: contextlib.ExitStack) -> int:
        undo.callback(os.close, fd)
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def read(self, path: str, limit: int = 1 << 20) -> bytes | None:
        """The content of regular file `path`; None if there is none. Invalid beyond `limit`."""
        found = self._find(path)
        if found is None:
            return None
        parent, name = found
        for directory in parent:
            try:
                fd = os.open(name, _OPEN_FILE, dir_fd=directory)
            except OSError:
                continue
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return None
                data = file.read(limit + 1)
            if len(data) > limit:
                raise Invalid(f"{path} in the image is larger than {limit} bytes")
            return data
        return None

    def is_directory(self, path: str) -> bool:
        """Whether `path` is a directory."""
        found = self._find(path)
        if found is None:
            return False
        parent, name = found
        if name == ".":
            return True
        status = self._stat(parent, name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def _find(self, path: str) -> tuple[Level, str] | None:
        """(merged parent, name) of what `path` leads to, links followed; None if not there."""
        with contextlib.ExitStack() as undo:
            found = self._walk(path, undo)
            if found is not None:
                self._undo.push(undo.pop_all())
            return found

    def _walk(self, path: str, undo: contextlib.ExitStack) -> tuple[Level, str] | None:
        levels: list[Level] = [self._root]
        todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                if len(levels) > 1:
                    levels.pop()
                continue
            status = self._stat(levels[-1], name)
            if status is None:
                return None
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    return None
                target = self._link(levels[-1], name)
                if target.startswith("/"):
                    levels = [self._root]
                todo += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                continue
            if not todo:
                return levels[-1], name
            if not stat.S_ISDIR(status.st_mode):
                return None
            levels.append(self._enter(levels[-1], name, undo))
        return levels[-1], "."

    @staticmethod
    def _stat(level: Level, name: str) -> os.stat_result | None:
        """What the merged directory has under `name`."""
        for directory in level:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            return None if _is_whiteout(status) else status
        return None

    @staticmethod
    def _link(level: Level, name: str) -> str:
        for directory in level:
            with contextlib.suppress(FileNotFoundError):
                return os.readlink(name, dir_fd=directory)
        return ""

    def _enter(self, level: Level, name: str, undo: contextlib.ExitStack) -> Level:
        parts: list[int] = []
        for directory in level:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not stat.S_ISDIR(status.st_mode):
                break
            parts.append(self._keep(os.open(name, _OPEN_DIRECTORY, dir_fd=directory), undo))
            if _is_opaque(parts[-1]):
                break
        return tuple(parts)


_OPEN_TOP = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
"""A layer's own path is the host's word: links in it are followed."""


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(fd: int) -> bool:
    for name in _OPAQUE:
        try:
            if os.getxattr(fd, name) == b"y":
                return True
        except OSError:
            continue
    return False
