"""Paths of /proc and /sys that a container must not see, or not write.

The file systems are reached by the descriptors with which they were made, so nothing in an image
can put something else in their place. The trick that saves a system call for each path: the mount
is read-only while the paths are bound onto themselves (a bind keeps its source's flags), and made
writable at the end.
"""

import errno
import posixpath
from collections.abc import Sequence

from bulkhead.linux import mounts as kernel
from bulkhead.linux.openat2 import HOW_SIZE
from bulkhead.linux.program import Fd, Program, Slot
from bulkhead.linux.tree import OPEN_ANY, OPEN_DIRECTORY, Tree

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
"""What the kernel tells or takes there concerns the host."""
READONLY_PATHS = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)

_FILES = frozenset(
    {
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/interrupts",
        "/proc/sysrq-trigger",
        "/proc/config.gz",
        "/proc/kallsyms",
        "/proc/kmsg",
    }
)
_DIRECTORIES = frozenset(
    {
        "/proc/acpi",
        "/proc/asound",
        "/proc/scsi",
        "/sys/firmware",
        "/sys/devices/virtual/powercap",
    }
)
"""What the kernel has under these names, so that one attempt each is enough."""
_BLANK = "/sys"


class Masks:
    """Plans masks and read-only paths of one container."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.program: Program = tree.program
        self._cwd: Slot | Fd | None = None

    def plan(self, masked: Sequence[str], readonly: Sequence[str]) -> None:
        """Cover `masked`, protect `readonly`; what does not exist is left out."""
        masked = list(dict.fromkeys(posixpath.normpath(path) for path in masked))
        readonly = list(dict.fromkeys(posixpath.normpath(path) for path in readonly))
        if any(path not in _FILES for path in masked):
            self._plan_blank()
        self._group("/proc", masked, readonly)
        for path in (p for p in masked if self._in("/proc", p) is None):
            self._mask(path)
        for path in (p for p in readonly if self._in("/proc", p) is None):
            self._protect(path)

    def _in(self, point: str, path: str) -> tuple[Slot | Fd, str] | None:
        """(mount, relative path) if `path` is in the file system we made at `point`."""
        own, at = self.tree.own(path), self.tree.own(point)
        if own is None or at is None or at[1] or own[0] != at[0] or not own[1]:
            return None
        return own

    def _group(self, point: str, masked: Sequence[str], readonly: Sequence[str]) -> None:
        at = self.tree.own(point)
        if at is None or at[1]:
            return
        protected = [(path, own[1]) for path in readonly if (own := self._in(point, path))]
        for path in masked:
            if self._in(point, path):
                self._mask(path)
        if not protected:
            return
        self._enter(at[0])
        kernel_flags = kernel.MS_BIND | kernel.MS_REC
        step = f"make {point} writable again"
        closed = kernel.mount_attr(set_=kernel.ATTR_RDONLY)
        opened = kernel.mount_attr(clear=kernel.ATTR_RDONLY)
        self.program.call(
            f"make {point} read-only for a moment",
            "mount_setattr", at[0], "", kernel.AT_EMPTY_PATH, closed, kernel.ATTR_SIZE,
        )  # fmt: skip
        for path, rest in protected:
            self.program.call(
                f"make {path} read-only", "mount", rest, rest, None, kernel_flags, None,
                ok=(errno.ENOENT,),
            )  # fmt: skip
        self.program.call(
            step, "mount_setattr", at[0], "", kernel.AT_EMPTY_PATH, opened, kernel.ATTR_SIZE
        )

    def _enter(self, mount: Slot | Fd) -> None:
        if self._cwd != mount:
            self.program.call("enter the file system to mask", "fchdir", mount)
            self._cwd = mount

    def _mask(self, path: str) -> None:
        own = self.tree.own(path)
        step = f"mask {path}"
        if own is None or not own[1]:
            self._mask_foreign(step, path)
            return
        mount, rest = own
        if path in _FILES:
            self._enter(mount)
            self._bind_null(step, rest, (errno.ENOENT,))
        elif path in _DIRECTORIES:
            self._enter(mount)
            self._bind(step, _BLANK, rest, (errno.ENOENT,))
        else:
            self._enter(mount)
            done = self._bind_null(step, rest, (errno.ENOENT, errno.ENOTDIR))
            with self.program.when(done, failed=True):
                self._bind(step, _BLANK, rest, (errno.ENOENT,))

    def _bind_null(self, step: str, rest: str, ok: tuple[int, ...]) -> Slot:
        # Absolute paths are the host's until the pivot, so this is the host's null device.
        return self._bind(step, "/dev/null", rest, ok)

    def _bind(self, step: str, source: str, rest: str, ok: tuple[int, ...]) -> Slot:
        return self.program.call(step, "mount", source, rest, None, kernel.MS_BIND, None, ok=ok)

    def _plan_blank(self) -> None:
        """An empty read-only directory where the host's /sys was for this child.

        Directories are masked with binds of it. The host's tree is let go of at the pivot.
        """
        program, step = self.program, "make an empty directory to mask with"
        context = program.call(step, "fsopen", "tmpfs", kernel.FSOPEN_CLOEXEC)
        program.call(step, "fsconfig", context, kernel.FSCONFIG_SET_STRING, "size", "0", 0)
        program.call(step, "fsconfig", context, kernel.FSCONFIG_CMD_CREATE, None, None, 0)
        attributes = (
            kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC
        )
        blank = program.call(step, "fsmount", context, kernel.FSMOUNT_CLOEXEC, attributes)
        flags = kernel.MOVE_MOUNT_F_EMPTY_PATH
        program.call(step, "move_mount", blank, "", kernel.AT_FDCWD, _BLANK, flags)

    def _mask_foreign(self, step: str, path: str) -> None:
        """Cover whatever `path` leads to inside the root."""
        tree = self.tree
        missing = (errno.ENOENT, errno.ENOTDIR)
        directory = tree.open(step, path, OPEN_DIRECTORY, ok=missing)
        with self.program.when(directory):
            self._clone_over(step, _BLANK, directory)
        with self.program.when(directory, failed=True):
            target = tree.open(step, path, OPEN_ANY, ok=missing)
            with self.program.when(target):
                self._clone_over(step, "/dev/null", target)

    def _clone_over(self, step: str, source: str, target: Slot) -> None:
        flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC
        clone = self.program.call(step, "open_tree", kernel.AT_FDCWD, source, flags)
        flags = kernel.MOVE_MOUNT_F_EMPTY_PATH | kernel.MOVE_MOUNT_T_EMPTY_PATH
        self.program.call(step, "move_mount", clone, "", target, "", flags)

    def _protect(self, path: str) -> None:
        """Bind whatever `path` leads to inside the root onto itself, read-only."""
        program = self.program
        step = f"make {path} read-only"
        own = self.tree.own(path)
        missing = (errno.ENOENT, errno.ENOTDIR)
        if own is not None and own[1]:
            flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC | kernel.AT_RECURSIVE
            clone = program.call(step, "open_tree", own[0], own[1], flags, ok=missing)
            with program.when(clone):
                self._attach_readonly(step, clone, own[0], own[1], 0)
            return
        target = program.call(
            step, "openat2", self.tree.root, path.lstrip("/") or ".", OPEN_ANY, HOW_SIZE, ok=missing
        )
        with program.when(target):
            flags = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC | kernel.AT_RECURSIVE
            flags |= kernel.AT_EMPTY_PATH
            clone = program.call(step, "open_tree", target, "", flags)
            self._attach_readonly(step, clone, target, "", kernel.MOVE_MOUNT_T_EMPTY_PATH)

    def _attach_readonly(
        self, step: str, clone: Slot, at: Slot | Fd, name: str, extra_flags: int
    ) -> None:
        flags = kernel.AT_EMPTY_PATH | kernel.AT_RECURSIVE
        data = kernel.mount_attr(set_=kernel.ATTR_RDONLY)
        self.program.call(step, "mount_setattr", clone, "", flags, data, kernel.ATTR_SIZE)
        self.program.call(
            step, "move_mount", clone, "", at, name, kernel.MOVE_MOUNT_F_EMPTY_PATH | extra_flags
        )
