"""cgroup v2: one directory; Documentation/admin-guide/cgroup-v2.

    <mount>/bulkhead/ID

Controllers are handed down by `cgroup.subtree_control` of every group above; those that cannot be
(a group above has processes of its own, or is not ours to write) are remembered with the reason,
which matters only to limits that need them.
"""

import contextlib
import errno
import os
import threading
from typing import Any

from bulkhead.errors import Conflict, Denied, Internal, Unsupported
from bulkhead.isolation.cgroups import convert, device_rules, files, stats
from bulkhead.isolation.cgroups.group import TIMEOUT_S, Group, check_path
from bulkhead.linux import bpf
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Resources

WANTED = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc")

_ATTEMPTS = 100
_PROGRAM = "bulkhead_dev"


class HierarchyV2:
    """The host's unified hierarchy."""

    version = 2

    def __init__(self, mount: str) -> None:
        self.mount = mount
        self.controllers = frozenset(files.get(f"{mount}/cgroup.controllers").split())
        self._refused: dict[str, str] = {}
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def create(self, path: str, resources: Resources | None = None) -> "GroupV2":
        """Make the group `path` ("/bulkhead/ID") and set its limits.

        A leftover without processes is replaced; Conflict if `path` is in use. Nothing is left
        behind on an error.
        """
        path = check_path(path)
        group = GroupV2(self, path)
        with contextlib.ExitStack() as undo:
            self._make(path)
            undo.callback(files.remove, f"{self.mount}{path}")
            if resources is not None:
                group.apply(resources)
            undo.pop_all()
        return group

    def open(self, path: str) -> "GroupV2":
        """The group `path`, made earlier; nothing is looked at."""
        return GroupV2(self, check_path(path))

    def remove_parent(self, path: str) -> bool:
        """Remove a parent made by `create` if it is empty; whether it is gone."""
        path = check_path(path)
        with self._lock:
            self._ready = {p for p in self._ready if not f"{p}/".startswith(f"{path}/")}
        try:
            os.rmdir(f"{self.mount}{path}")
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise files.translate(error, path, "", "cannot remove") from error
            return False
        return True

    def missing(self, controller: str) -> str:
        """Why limits of `controller` cannot be set here, and the remedy; "" if they can."""
        if controller in self._refused:
            return self._refused[controller]
        if controller in self.controllers or controller not in WANTED:
            return ""
        return (
            f"this host's cgroup v2 has no {controller} controller (built without it, disabled by"
            " cgroup_disable= on its command line, or in use by cgroup v1)"
        )

    def _make(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        for _ in range(_ATTEMPTS):
            try:
                self._prepare(parent)
                os.mkdir(f"{self.mount}{path}", 0o755)
            except FileExistsError:
                if not files.remove(f"{self.mount}{path}"):
                    text = f"control group {path} already exists and is in use"
                    raise Conflict(text) from None
                continue
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENODEV):
                    # Another engine removed the parent as its last user went.
                    with self._lock:
                        self._ready.discard(parent)
                    continue
                raise files.translate(error, path, "", "cannot make a control group") from error
            return
        raise Internal(f"cannot make control group {path}: it or its parent keeps disappearing")

    def _prepare(self, parent: str) -> None:
        """Make `parent` and hand down the controllers along the way."""
        with self._lock:
            if parent in self._ready:
                return
            place = self.mount
            self._hand_down(place)
            for part in parent.split("/")[1:]:
                place = f"{place}/{part}"
                with contextlib.suppress(FileExistsError):
                    os.mkdir(place, 0o755)
                self._hand_down(place)
            self._ready.add(parent)

    def _hand_down(self, place: str) -> None:
        here = set(files.get(f"{place}/cgroup.controllers").split())
        done = set(files.get(f"{place}/cgroup.subtree_control").split())
        lacking = [c for c in WANTED if c in here and c not in done]
        if not lacking:
            return
        try:
            files.put(f"{place}/cgroup.subtree_control", " ".join(f"+{c}" for c in lacking))
        except OSError:
            for controller in lacking:
                try:
                    files.put(f"{place}/cgroup.subtree_control", f"+{controller}")
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENODEV):
                        raise  # the group went away
                    self._refused[controller] = _refusal(controller, place, error)


def _refusal(controller: str, place: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return (
            f"the {controller} controller cannot be handed down by {place}: processes are in it;"
            " move them to a group below it"
        )
    return (
        f"the {controller} controller cannot be handed down by {place}:"
        f" {os.strerror(error.errno or 0)}; delegate it (systemd: Delegate=yes) or run as root"
    )


class GroupV2(Group):
    """One group of the unified hierarchy."""

    def __init__(self, hierarchy: HierarchyV2, path: str) -> None:
        self.path = path
        self._hierarchy = hierarchy
        self._folder = f"{hierarchy.mount}{path}"

    def folders(self) -> list[str]:
        """Its directories, one for each hierarchy."""
        return [self._folder]

    def join_fds(self) -> list[OwnedFd]:
        """Where a process writes "0" to move itself here."""
        with files.explained(self._folder, "", "cannot join the control group"):
            return [OwnedFd(os.open(f"{self._folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))]

    def clone_fd(self) -> OwnedFd | None:
        """What CLONE_INTO_CGROUP takes."""
        with files.explained(self._folder, "", "cannot open the control group"):
            return OwnedFd(files.open_folder(self._folder))

    def apply(self, resources: Resources) -> None:
        """Set the limits that are given, leave the others."""
        writes = convert.plan_v2(resources)
        for write in writes:
            reason = "" if write.optional else self._hierarchy.missing(write.controller)
            if reason:
                raise Unsupported(f"{write.what or write.file}: {reason}", file=write.file)
        if resources.devices:
            self._apply_devices(device_rules.reduce(resources.devices))
        for write in writes:
            self._write(write)

    def _write(self, write: convert.Write) -> None:
        for file, value in ((write.file, write.value), *write.otherwise):
            place = f"{self._folder}/{file}"
            try:
                files.put(place, value)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise files.translate(error, place, value, write.what) from error
            return
        if write.optional or not os.path.isdir(self._folder):
            if write.optional:
                return
            raise files.translate(
                FileNotFoundError(errno.ENOENT, ""), self._folder, write.value, write.what
            )
        if write.file == "memory.swap.max" and not _swap_in_use():
            return  # a kernel without swap keeps every limit of it
        raise Unsupported(
            f"{write.what or write.file}: this kernel's {write.controller} controller has no"
            f" {write.file}",
            file=write.file,
        )

    def _apply_devices(self, state: device_rules.DeviceState) -> None:
        """Attach the program that decides; one of an earlier call is replaced in one step."""
        kind = bpf.ATTACH_CGROUP_DEVICE
        try:
            with OwnedFd(files.open_folder(self._folder)) as folder:
                earlier = bpf.attached(folder.fileno(), kind)
                if state.allow and not state.exceptions and not earlier:
                    return
                program = device_rules.program(state)
                with bpf.load(bpf.PROG_TYPE_CGROUP_DEVICE, program, _PROGRAM) as loaded:
                    if not earlier:
                        bpf.attach(folder.fileno(), loaded.fileno(), kind)
                        return
                    with bpf.by_id(earlier[-1]) as old:
                        bpf.attach(folder.fileno(), loaded.fileno(), kind, instead_of=old.fileno())
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise Denied(
                    f"not permitted to limit devices of {self.path}: {error.strerror};"
                    " it needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN"
                ) from error
            if error.errno in (errno.EINVAL, errno.ENOSYS):
                raise Unsupported(
                    f"this kernel cannot limit devices by a program ({error.strerror});"
                    " it needs CONFIG_CGROUP_BPF"
                ) from error
            raise files.translate(error, self._folder, "", "device rules") from error

    def _freeze(self, value: str, timeout_s: float) -> bool:
        with files.explained(f"{self._folder}/cgroup.freeze", value):
            files.put(f"{self._folder}/cgroup.freeze", value)
            return files.until(lambda: self._events().get("frozen") == int(value), timeout_s)

    def _events(self) -> dict[str, int]:
        return files.flat(files.get_or(f"{self._folder}/cgroup.events", ""))

    def freeze(self, timeout_s: float = TIMEOUT_S) -> None:
        """Stop every process until `thaw`."""
        if not self._freeze("1", timeout_s):
            self._freeze("0", 0)
            raise Internal(f"cannot freeze {self.path}: a process does not stop")

    def thaw(self, timeout_s: float = TIMEOUT_S) -> None:
        """Let them go on."""
        if not self._freeze("0", timeout_s):
            raise Conflict(f"cannot thaw {self.path}: a group above it is frozen")

    def frozen(self) -> bool:
        """Whether `freeze` holds."""
        return files.number(f"{self._folder}/cgroup.freeze") == 1

    def kill(self, timeout_s: float = TIMEOUT_S) -> None:
        """Kill every process and wait until none is left."""
        if not self.exists():
            return
        try:
            files.put(f"{self._folder}/cgroup.kill", "1")
        except FileNotFoundError:  # before 5.14
            self._kill_each(timeout_s)
            return
        except OSError as error:
            raise files.translate(error, self._folder, "1", "kill") from error
        if not files.until(lambda: not self._events().get("populated"), timeout_s):
            self._kill_each(0)

    def stats(self) -> dict[str, Any]:
        """Usage in Docker's shape."""
        return stats.v2(self._folder)

    def oom_kills(self) -> int:
        """Processes killed here, or below, for want of memory."""
        # Hierarchical already (memory.events).
        return files.flat(files.get_or(f"{self._folder}/memory.events", "")).get("oom_kill", 0)

    def memory_limit(self) -> int | None:
        """Bytes, None without a limit."""
        text = files.get_or(f"{self._folder}/memory.max", "max")
        return None if text == "max" else int(text)

    def files(self) -> dict[str, str]:
        """Limits and usage as the kernel has them."""
        found = {name: files.get_or(f"{self._folder}/{name}", "") for name in _SHOWN}
        return {name: value for name, value in found.items() if value}


_SHOWN = (
    "cgroup.controllers",
    "cgroup.freeze",
    "cpu.weight",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.stat",
    "cpuset.cpus",
    "cpuset.cpus.effective",
    "cpuset.mems",
    "memory.max",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.swap.max",
    "memory.current",
    "memory.peak",
    "memory.events",
    "pids.max",
    "pids.current",
    "io.max",
    "io.weight",
    "io.bfq.weight",
)


def _swap_in_use() -> bool:
    with open("/proc/swaps", encoding="utf-8") as file:
        return len(file.readlines()) > 1
