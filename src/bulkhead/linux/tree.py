"""Planning mounts below the root of a file system that nobody is trusted to have left alone.

A path of a container's root may be anything: a symbolic link to the host's /etc, a link into
/proc. So a target is resolved by openat2(2) inside the root (RESOLVE_IN_ROOT, no magic links), and
the mount goes to the descriptor, never to a path. Below a file system that the same plan has just
made (its own /dev, /proc, /sys), nobody else has been yet and plain relative names do.
"""

import errno
import os
import posixpath
import stat

from bulkhead.linux.mounts import (
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH,
)
from bulkhead.linux.openat2 import HOW_SIZE, IN_ROOT, NO_MAGICLINKS, open_how
from bulkhead.linux.program import Argument, Fd, Program, Slot

_RESOLVE = IN_ROOT | NO_MAGICLINKS
OPEN_DIRECTORY = open_how(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, _RESOLVE)
OPEN_ANY = open_how(os.O_PATH | os.O_CLOEXEC, _RESOLVE)
# Not for writing: an open writer would keep the root from becoming read-only (EBUSY).
OPEN_NEW_FILE = open_how(
    os.O_CREAT | os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, _RESOLVE, 0o644
)


class Tree:
    """The file system tree under construction: `root` is a descriptor of its root mount."""

    def __init__(self, program: Program, root: Argument) -> None:
        self.program = program
        self.root = root
        self._points: dict[str, Slot | Fd | None] = {}

    def made(self, path: str, mount: Slot | Fd) -> None:
        """Say that `mount`, attached at `path`, is a new file system with nothing foreign in it."""
        self._forget(path)
        self._points[path] = mount

    def covered(self, path: str) -> None:
        """Say that something foreign was mounted at `path`."""
        self._forget(path)
        self._points[path] = None

    def _forget(self, path: str) -> None:
        below = path.rstrip("/") + "/"
        for known in [p for p in self._points if p == path or p.startswith(below)]:
            del self._points[known]

    def own(self, path: str) -> tuple[Slot | Fd, str] | None:
        """The file system of our own that `path` lies in, and the path in it; None if foreign."""
        at = path
        while at not in self._points:
            if at == "/":
                return None
            at = posixpath.dirname(at)
        mount = self._points[at]
        return None if mount is None else (mount, path[len(at.rstrip("/")) + 1 :])

    def open(self, step: str, path: str, how: bytes = OPEN_ANY, ok: tuple[int, ...] = ()) -> Slot:
        """A descriptor of `path` inside the root."""
        relative = path.lstrip("/") or "."
        return self.program.call(step, "openat2", self.root, relative, how, HOW_SIZE, ok=ok)

    def attach(self, step: str, mount: Argument, path: str, *, directory: bool) -> None:
        """Attach the detached `mount` at `path`, which is made if it does not exist."""
        own = self.own(path)
        if own is not None and own[1]:
            self._attach_in_own(step, mount, own[0], own[1], directory=directory)
            return
        name = path.lstrip("/")
        if not name:
            flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
            self.program.call(step, "move_mount", mount, "", self.root, "", flags)
        elif directory and "/" not in name:
            # One component, not followed: a directory of the root itself, or (a link, EINVAL) not.
            moved = self.program.call(
                step,
                "move_mount",
                mount,
                "",
                self.root,
                name,
                MOVE_MOUNT_F_EMPTY_PATH,
                ok=(errno.ENOENT, errno.ENOTDIR, errno.EINVAL),
            )
            with self.program.when(moved, failed=True):
                self._attach_resolved(step, mount, path, directory=True)
        else:
            self._attach_resolved(step, mount, path, directory=directory)

    def _attach_in_own(
        self, step: str, mount: Argument, base: Slot | Fd, rest: str, *, directory: bool
    ) -> None:
        """Attach below a file system of ours, making what lacks by plain names."""
        flags = MOVE_MOUNT_F_EMPTY_PATH
        missing = (errno.ENOENT,)
        moved = self.program.call(step, "move_mount", mount, "", base, rest, flags, ok=missing)
        with self.program.when(moved, failed=True):
            self.make_in_own(step, base, rest, directory=directory)
            self.program.call(step, "move_mount", mount, "", base, rest, flags)

    def make_in_own(self, step: str, base: Argument, rest: str, *, directory: bool) -> None:
        """Make directory or empty file `rest` below a file system of ours, with its parents."""
        parts = rest.split("/")
        for depth in range(1, len(parts)):
            prefix = "/".join(parts[:depth])
            self.program.call(step, "mkdirat", base, prefix, 0o755, ok=(errno.EEXIST,))
        if directory:
            self.program.call(step, "mkdirat", base, rest, 0o755, ok=(errno.EEXIST,))
        else:
            self.program.call(
                step, "mknodat", base, rest, stat.S_IFREG | 0o644, 0, ok=(errno.EEXIST,)
            )

    def _attach_resolved(self, step: str, mount: Argument, path: str, *, directory: bool) -> None:
        how = OPEN_DIRECTORY if directory else OPEN_ANY
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        target = self.open(step, path, how, ok=(errno.ENOENT,))
        with self.program.when(target):
            self.program.call(step, "move_mount", mount, "", target, "", flags)
        with self.program.when(target, failed=True):
            made = self.make(step, path, directory=directory)
            self.program.call(step, "move_mount", mount, "", made, "", flags)

    def make(self, step: str, path: str, *, directory: bool, mode: int = 0o755) -> Slot:
        """Make directory or file `path` and its parents inside the root; a descriptor of it."""
        parent = self.make_parents(step, path, mode)
        if directory:
            name = posixpath.basename(path)
            self.program.call(step, "mkdirat", parent, name, mode, ok=(errno.EEXIST,))
            return self.open(step, path, OPEN_DIRECTORY)
        self.open(step, path, OPEN_NEW_FILE)
        return self.open(step, path, OPEN_ANY)

    def make_parents(self, step: str, path: str, mode: int = 0o755) -> Argument:
        """Make the directories above `path` inside the root; a descriptor of the last."""
        parent: Argument = self.root
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts)):
            prefix = "/".join(parts[:depth])
            self.program.call(step, "mkdirat", parent, parts[depth - 1], mode, ok=(errno.EEXIST,))
            parent = self.open(step, prefix, OPEN_DIRECTORY)
        return parent
