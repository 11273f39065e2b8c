"""cgroup v1: one directory per hierarchy; Documentation/admin-guide/cgroup-v1.

    <mount of each hierarchy>/bulkhead/ID

A workload joins the hierarchies of `JOINED` that are mounted; those of `ON_REQUEST` only for a
limit that needs them, and neither perf_event nor the named hierarchies (name=systemd) nor the
unified one of a hybrid host: they limit nothing, and each would cost a directory and a move. So
systemd sees the workload's processes where the engine was started (its unit must not kill them:
KillMode=process).

New processes move themselves by writing "0" to `tasks`, not to `cgroup.procs`: a task that moves
only itself need not take the kernel's lock of all forks.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead.errors import BulkheadError, Conflict, Denied, Internal, Unsupported
from bulkhead.isolation.cgroups import convert, device_rules, files, stats
from bulkhead.isolation.cgroups.group import TIMEOUT_S, Group, check_path
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Memory, Resources

JOINED = ("pids", "freezer", "devices", "memory", "cpu", "cpuacct", "cpuset", "blkio")
ON_REQUEST = ("hugetlb", "net_cls", "net_prio", "rdma")

_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class _Parent:
    """A group that workloads' groups are made in."""

    folders: list[tuple["MountV1", OwnedFd]]
    clones: bool
    """Whether a cpuset made in it takes its processors and nodes (cgroup.clone_children)."""


@dataclass(frozen=True, slots=True)
class MountV1:
    """One hierarchy: where it is, and its controllers (often one, sometimes "cpu,cpuacct")."""

    target: str
    controllers: frozenset[str]

    @property
    def joined(self) -> bool:
        """Whether every workload gets a directory here."""
        return not self.controllers.isdisjoint(JOINED)


class HierarchyV1:
    """The host's v1 hierarchies."""

    version = 1

    def __init__(self, mounts: tuple[MountV1, ...], kernel: frozenset[str]) -> None:
        """`kernel` are the controllers that the kernel has, mounted or not."""
        ranked = sorted(mounts, key=_rank)
        self.mounts = tuple(mount for mount in ranked if mount.joined)
        self.extra = tuple(
            m for m in ranked if not m.joined and not m.controllers.isdisjoint(ON_REQUEST)
        )
        self.controllers = frozenset().union(*(m.controllers for m in (*self.mounts, *self.extra)))
        self._kernel = kernel
        self._parents: dict[str, _Parent] = {}
        self._lock = threading.Lock()

    def create(self, path: str, resources: Resources | None = None) -> "GroupV1":
        """Make the group `path` ("/bulkhead/ID") and set its limits.

        A leftover without processes is replaced; Conflict if `path` is in use. Nothing is left
        behind on an error.
        """
        path = check_path(path)
        group = GroupV1(self, path)
        with contextlib.ExitStack() as undo:
            self._make(path, undo)
            if resources is not None:
                group.limit(resources, fresh=True)
            undo.pop_all()
        return group

    def open(self, path: str) -> "GroupV1":
        """The group `path`, made earlier; nothing is looked at."""
        return GroupV1(self, check_path(path))

    def remove_parent(self, path: str) -> bool:
        """Remove a parent made by `create` if it is empty; whether it is gone."""
        path = check_path(path)
        with self._lock:
            self._forget(path)
        gone = True
        for mount in (*self.mounts, *self.extra):
            try:
                os.rmdir(f"{mount.target}{path}")
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise files.translate(error, path, "", "cannot remove") from error
                gone = False
        return gone

    def missing(self, controller: str) -> str:
        """Why limits of `controller` cannot be set here, and the remedy; "" if they can."""
        if controller in self.controllers:
            return ""
        if controller in self._kernel:
            return (
                f"the {controller} controller is not mounted as cgroup v1; mend it with"
                f" mkdir /sys/fs/cgroup/{controller} && mount -t cgroup -o {controller}"
                f" {controller} /sys/fs/cgroup/{controller}"
            )
        return (
            f"this kernel has no {controller} controller"
            " (built without it, or disabled by cgroup_disable= on its command line)"
        )

    def folder(self, mount: MountV1, path: str) -> str:
        """Where `path` is in that hierarchy."""
        return f"{mount.target}{path}"

    def extra_for(self, path: str, controller: str) -> None:
        """Make the group in the hierarchy of a controller that is joined only on request."""
        for mount in self.extra:
            if controller in mount.controllers:
                with files.explained(f"{mount.target}{path}", "", "cannot make a control group"):
                    os.makedirs(f"{mount.target}{path}", exist_ok=True)

    def _make(self, path: str, undo: contextlib.ExitStack) -> None:
        parent, _, name = path.rpartition("/")
        for _ in range(_ATTEMPTS):
            with contextlib.ExitStack() as attempt:
                try:
                    above = self._parent(parent)
                    for mount, fd in above.folders:
                        os.mkdir(name, 0o755, dir_fd=fd.fileno())
                        attempt.callback(_rmdir, f"{mount.target}{path}")
                        if "cpuset" in mount.controllers and not above.clones:
                            _inherit_cpuset(f"{mount.target}{parent}", f"{mount.target}{path}")
                except FileExistsError:
                    if not self.open(path).try_delete():
                        text = f"control group {path} already exists and is in use"
                        raise Conflict(text) from None
                    continue
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENODEV):
                        # Another engine removed the parent as its last user went.
                        with self._lock:
                            self._forget(parent)
                        continue
                    what = "cannot make a control group"
                    raise files.translate(error, path, "", what) from error
                undo.push(attempt.pop_all())
                return
        raise Internal(f"cannot make control group {path}: it or its parent keeps disappearing")

    def _forget(self, parent: str) -> None:
        for known in [p for p in self._parents if f"{p}/".startswith(f"{parent}/")]:
            del self._parents[known]  # closed when the last user drops them

    def trim(self, most: int) -> None:
        """Keep no more than `most` parents open."""
        with self._lock:
            if len(self._parents) > most:
                self._parents.clear()

    def parent_of(self, path: str) -> _Parent | None:
        """The opened parent of `path`, if a group was made in it by this object."""
        return self._parents.get(path.rpartition("/")[0])

    def _parent(self, parent: str) -> _Parent:
        with self._lock:
            known = self._parents.get(parent)
            if known is None:
                opened = [(mount, self._open_parent(mount, parent)) for mount in self.mounts]
                clones = all(
                    files.get("cgroup.clone_children", fd.fileno()) == "1"
                    for mount, fd in opened
                    if "cpuset" in mount.controllers
                )
                known = self._parents[parent] = _Parent(opened, clones)
            return known

    def _open_parent(self, mount: MountV1, parent: str) -> OwnedFd:
        """The parent's directory, made with what is missing above it; OSError."""
        place = mount.target
        for part in parent.split("/")[1:]:
            above, place = place, f"{place}/{part}"
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(place, 0o755)
                made = True
            if "cpuset" in mount.controllers:
                _inherit_cpuset(above, place)
                if made:
                    files.put(f"{place}/cgroup.clone_children", "1")
        return OwnedFd(files.open_folder(place))


def _rank(mount: MountV1) -> int:
    ranks = [JOINED.index(c) for c in mount.controllers if c in JOINED]
    return min(ranks, default=len(JOINED))


def _rmdir(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)


def _inherit_cpuset(above: str, place: str) -> None:
    """A new cpuset is empty, and no task may enter one: take the parent's processors and nodes."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not files.get(f"{place}/{file}"):
            files.put(f"{place}/{file}", files.get(f"{above}/{file}"))


class GroupV1(Group):
    """One group in every joined hierarchy."""

    def __init__(self, hierarchy: HierarchyV1, path: str) -> None:
        self.path = path
        self._hierarchy = hierarchy

    def folders(self) -> list[str]:
        """Its directories, one for each hierarchy."""
        return [f"{mount.target}{self.path}" for mount in self._mounts()]

    def _mounts(self) -> Iterator[MountV1]:
        yield from self._hierarchy.mounts
        yield from self._extra()

    def _extra(self) -> Iterator[MountV1]:
        for mount in self._hierarchy.extra:
            if os.path.isdir(f"{mount.target}{self.path}"):
                yield mount

    def _folder(self, controller: str) -> str:
        """The directory for `controller`; Unsupported if no hierarchy has it."""
        for mount in (*self._hierarchy.mounts, *self._hierarchy.extra):
            if controller in mount.controllers:
                return f"{mount.target}{self.path}"
        raise Unsupported(self._hierarchy.missing(controller), controller=controller)

    def _by_controller(self) -> dict[str, str]:
        return {c: f"{m.target}{self.path}" for m in self._mounts() for c in m.controllers}

    def join_fds(self) -> list[OwnedFd]:
        """Where a process writes "0" to move itself here."""
        found: list[OwnedFd] = []
        flags = os.O_WRONLY | os.O_CLOEXEC
        with files.explained(self.path, "", "cannot join the control group"):
            parent = self._hierarchy.parent_of(self.path)
            if parent is None:
                return [OwnedFd(os.open(f"{place}/tasks", flags)) for place in self.folders()]
            tasks = f"{self.path.rpartition('/')[2]}/tasks"
            for _, folder in parent.folders:
                found.append(OwnedFd(os.open(tasks, flags, dir_fd=folder.fileno())))
            for mount in self._extra():
                found.append(OwnedFd(os.open(f"{mount.target}{self.path}/tasks", flags)))
        return found

    def clone_fd(self) -> OwnedFd | None:
        """None: that is version 2's."""
        return None

    def apply(self, resources: Resources) -> None:
        """Set the limits that are given, leave the others."""
        self.limit(resources, fresh=False)

    def limit(self, resources: Resources, *, fresh: bool) -> None:
        """`apply`; `fresh` if the group was just made: it allows what its parent does."""
        writes = convert.plan_v1(resources)
        for write in writes:
            reason = "" if write.optional else self._hierarchy.missing(write.controller)
            if reason:
                raise Unsupported(f"{write.what or write.file}: {reason}", file=write.file)
        if resources.devices and fresh:
            self._write_devices(device_rules.fresh_writes(resources.devices))
        elif resources.devices:
            self._apply_devices(device_rules.reduce(resources.devices))
        if resources.memory is not None:
            self._apply_memory(resources.memory)
        for write in writes:
            self._write(write)

    def _write(self, write: convert.Write) -> None:
        if write.controller in ON_REQUEST:
            self._hierarchy.extra_for(self.path, write.controller)
        folder = self._folder(write.controller)
        for file, value in ((write.file, write.value), *write.otherwise):
            try:
                with files.explained(f"{folder}/{file}", value, write.what):
                    files.put(f"{folder}/{file}", value)
            except BulkheadError as error:
                if isinstance(error.__cause__, FileNotFoundError) and os.path.isdir(folder):
                    continue
                raise
            return
        if not write.optional:
            raise Unsupported(
                f"{write.what or write.file}: this kernel's {write.controller} controller has no"
                f" {write.file}",
                file=write.file,
            )

    def _apply_memory(self, memory: Memory) -> None:
        limit, swap = convert.memory_limits_v1(memory)
        if limit is None and swap is None:
            return
        folder = self._folder("memory")
        steps = [
            ("memory.limit_in_bytes", limit, "--memory"),
            ("memory.memsw.limit_in_bytes", swap, "--memory-swap"),
        ]
        if not os.path.exists(f"{folder}/memory.memsw.limit_in_bytes"):
            if swap is not None and _swap_in_use():
                raise Unsupported(
                    "--memory-swap: this kernel does not account for swap;"
                    " boot it with swapaccount=1"
                )
            steps.pop()
        wanted = [(f"{folder}/{file}", str(v), what) for file, v, what in steps if v is not None]
        # Memory may never exceed memory plus swap: which goes first depends on the old values.
        for order in (wanted, wanted[::-1]):
            path, value, what = order[0]
            try:
                for path, value, what in order:  # noqa: B007  (read below)
                    files.put(path, value)
            except OSError as error:
                if error.errno == errno.EINVAL and order is wanted and len(wanted) > 1:
                    continue
                if error.errno == errno.EBUSY:
                    usage = files.number(f"{folder}/memory.usage_in_bytes")
                    raise Conflict(
                        f"unable to set memory limit to {value} (current usage: {usage} bytes)"
                    ) from error
                raise files.translate(error, path, value, what) from error
            return

    def _apply_devices(self, state: device_rules.DeviceState) -> None:
        folder = self._folder("devices")
        with files.explained(f"{folder}/devices.list"):
            now = device_rules.parse_list(files.get(f"{folder}/devices.list"))
        if now.allow and state.allow and not state.exceptions:
            return
        writes = device_rules.transition(now, state)
        self._write_devices([(file, line.encode()) for file, line in writes])

    def _write_devices(self, writes: Sequence[tuple[str, bytes]]) -> None:
        folder = self._folder("devices")
        opened: dict[str, int] = {}
        file, line = "", b""
        try:
            for file, line in writes:
                fd = opened.get(file)
                if fd is None:
                    fd = opened[file] = os.open(f"{folder}/{file}", os.O_WRONLY | os.O_CLOEXEC)
                os.write(fd, line)
        except OSError as error:
            place = f"{folder}/{file}"
            raise files.translate(error, place, line.decode(), "device rule") from error
        finally:
            for fd in opened.values():
                os.close(fd)

    def _freezer(self, state: str) -> None:
        folder = self._folder("freezer")
        with files.explained(f"{folder}/freezer.state", state):
            files.put(f"{folder}/freezer.state", state)

    def freeze(self, timeout_s: float = TIMEOUT_S) -> None:
        """Stop every process until `thaw`."""
        folder = self._folder("freezer")

        def frozen() -> bool:
            # Written again each time: a process that forked meanwhile is caught by that.
            self._freezer("FROZEN")
            return files.get(f"{folder}/freezer.state") == "FROZEN"

        if not files.until(frozen, timeout_s):
            self._freezer("THAWED")
            raise Internal(f"cannot freeze {self.path}: a process does not stop")

    def thaw(self, timeout_s: float = TIMEOUT_S) -> None:
        """Let them go on."""
        folder = self._folder("freezer")
        self._freezer("THAWED")
        if not files.until(lambda: files.get(f"{folder}/freezer.state") == "THAWED", timeout_s):
            raise Conflict(f"cannot thaw {self.path}: a group above it is frozen")

    def frozen(self) -> bool:
        """Whether `freeze` holds."""
        if "freezer" not in self._hierarchy.controllers:
            return False
        return files.get_or(f"{self._folder('freezer')}/freezer.state", "") in (
            "FROZEN",
            "FREEZING",
        )

    def kill(self, timeout_s: float = TIMEOUT_S) -> None:
        """Kill every process and wait until none is left."""
        if not self.exists():
            return
        if "freezer" not in self._hierarchy.controllers:
            self._kill_each(timeout_s)
            return

        def empty() -> bool:
            if not self.pids():
                return True
            # Frozen, they cannot fork while they are counted; the signal takes effect after.
            with contextlib.suppress(Denied):
                self._freezer("FROZEN")
            self.signal(9)
            self._freezer("THAWED")
            return not self.pids()

        if not files.until(empty, timeout_s):
            self._kill_each(0)

    def stats(self) -> dict[str, Any]:
        """Usage in Docker's shape."""
        return stats.v1(self._by_controller())

    def oom_kills(self) -> int:
        """Processes killed here, or below, for want of memory."""
        if "memory" not in self._hierarchy.controllers:
            return 0
        folder = self._folder("memory")
        # Not hierarchical in v1: groups that the workload made below count too.
        below = files.folders(folder) if _has_children(folder) else (folder,)
        return sum(
            files.flat(files.get_or(f"{place}/memory.oom_control", "")).get("oom_kill", 0)
            for place in below
        )

    def memory_limit(self) -> int | None:
        """Bytes, None without a limit."""
        if "memory" not in self._hierarchy.controllers:
            return None
        limit = files.number(f"{self._folder('memory')}/memory.limit_in_bytes")
        return limit if 0 < limit < stats.NO_LIMIT else None

    def files(self) -> dict[str, str]:
        """Limits and usage as the kernel has them."""
        found: dict[str, str] = {}
        for mount in self._mounts():
            place = f"{mount.target}{self.path}"
            for name in _SHOWN:
                if name.partition(".")[0] in mount.controllers:
                    value = files.get_or(f"{place}/{name}", "")
                    if value:
                        found[name] = value
        return found


_SHOWN = (
    "cpu.shares",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpu.cfs_burst_us",
    "cpu.stat",
    "cpuacct.usage",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "pids.max",
    "pids.current",
    "devices.list",
    "freezer.state",
    "blkio.weight",
    "blkio.bfq.weight",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_iops_device",
    "net_cls.classid",
)


def _has_children(folder: str) -> bool:
    try:
        return os.stat(folder).st_nlink > 2
    except FileNotFoundError:
        return False


def _swap_in_use() -> bool:
    with open("/proc/swaps", encoding="utf-8") as file:
        return len(file.readlines()) > 1
