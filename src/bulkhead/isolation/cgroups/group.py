"""The face of a control group, whatever the version: what boundaries and the engine use."""

import os
import signal
from abc import ABC, abstractmethod
from typing import Any

from bulkhead.errors import Conflict, Internal, Invalid
from bulkhead.isolation.cgroups import files, oom
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Resources

TIMEOUT_S = 30.0


def check_path(path: str) -> str:
    """`path` in its one form ("/bulkhead/ID"); Invalid if it is not absolute or has dots."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or not parts or "." in parts or ".." in parts or "\0" in path:
        raise Invalid(f"cgroup path {path!r} is not an absolute path without dots")
    return "/" + "/".join(parts)


class Group(ABC):
    """One control group, in every hierarchy where the limits need it.

    The methods are synchronous and short, except `freeze`, `thaw`, `kill` and `delete`, which
    wait for the kernel up to their `timeout_s`: call these in a thread.
    """

    path: str
    """Absolute, below each hierarchy's mount point."""

    @abstractmethod
    def join_fds(self) -> list[OwnedFd]:
        """Descriptors to which a process writes "0" to move itself here, before it has threads."""

    @abstractmethod
    def clone_fd(self) -> OwnedFd | None:
        """What clone3(2) takes for CLONE_INTO_CGROUP (v2), or None: then use `join_fds`."""

    @abstractmethod
    def apply(self, resources: Resources) -> None:
        """Set the limits that are given, leave the others.

        Unsupported, with the remedy, for a limit whose controller this host lacks; Invalid or
        Conflict for what the kernel refuses.
        """

    @abstractmethod
    def freeze(self, timeout_s: float = TIMEOUT_S) -> None:
        """Stop every process until `thaw`."""

    @abstractmethod
    def thaw(self, timeout_s: float = TIMEOUT_S) -> None:
        """Let them go on."""

    @abstractmethod
    def frozen(self) -> bool:
        """Whether `freeze` holds."""

    @abstractmethod
    def kill(self, timeout_s: float = TIMEOUT_S) -> None:
        """Kill every process, also frozen ones, and wait until none is left."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Its directories, one for each hierarchy."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Usage in Docker's shape: cpu_stats, memory_stats, pids_stats, blkio_stats."""

    @abstractmethod
    def oom_kills(self) -> int:
        """Processes killed here, or below, for want of memory."""

    @abstractmethod
    def memory_limit(self) -> int | None:
        """Bytes, None without a limit."""

    @abstractmethod
    def files(self) -> dict[str, str]:
        """Limits and usage as the kernel has them, by file name, for explanations."""

    def exists(self) -> bool:
        """Whether any of its directories is there."""
        return any(os.path.isdir(folder) for folder in self.folders())

    def pids(self) -> list[int]:
        """Processes here and in groups below, by their ids on the host."""
        return files.tasks(self.folders()[0])

    def signal(self, number: int) -> None:
        """Send a signal to every process there is now."""
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def oom(self) -> "oom.Report | None":
        """What the kernel's log says of the last such kill here; None if it cannot be read."""
        return oom.find(self.path)

    def explain_oom(self) -> str:
        """One line on the last kill for want of memory, "" if there was none."""
        if not self.oom_kills():
            return ""
        return oom.explain(self.oom(), self.memory_limit(), self.path)

    def try_delete(self) -> bool:
        """Remove it, and groups below, if nothing in them lives; does not wait."""
        left = [folder for folder in self.folders() if not files.remove(folder)]
        return not left

    def delete(self, timeout_s: float = TIMEOUT_S) -> None:
        """Remove it; Conflict if something in it still lives after `timeout_s`."""
        if files.until(self.try_delete, timeout_s):
            return
        raise Conflict(
            f"cannot remove the control group {self.path}: processes"
            f" {', '.join(map(str, self.pids()[:5])) or 'unknown'} are still in it"
        )

    def _kill_each(self, timeout_s: float) -> None:
        def empty() -> bool:
            self.signal(signal.SIGKILL)
            return not self.pids()

        if not files.until(empty, timeout_s):
            raise Internal(
                f"processes {self.pids()[:5]} in {self.path} survive SIGKILL (uninterruptible I/O?)"
            )
