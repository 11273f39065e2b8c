"""Control groups by way of systemd: a transient scope around a container's group.

`--systemd-cgroup` and a cgroupsPath of the form "slice:prefix:name" (org.freedesktop.systemd1(5)).
The group is ours: the runtime makes it, the process is born in it, and limits are written to its
files. systemd is told of the process once it is there, makes a scope with Delegate= of the group,
and knows the limits as properties, so that a daemon-reload does not undo them.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from bulkhead.errors import Internal, Invalid, Unsupported
from bulkhead.isolation.cgroups import convert
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.linux import dbus
from bulkhead.oci.runtime import Resources

_SOCKET = "/run/systemd/private"
_BOOTED = "/run/systemd/system"
_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_EXISTS = f"{_NAME}.UnitExists"
_GONE = (f"{_NAME}.NoSuchUnit", f"{_NAME}.LoadFailed")
_PART = re.compile(r"[A-Za-z0-9:_.@\\+-]+")
_UNLIMITED = (1 << 64) - 1
_STEP = 10_000
"""Microseconds of a second: what systemd rounds a quota to."""

Property = tuple[str, tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Scope:
    """A scope, by name, in a slice; `path` is its control group's."""

    unit: str
    slice_: str
    path: str


def check() -> None:
    """Unsupported unless systemd is process 1 and the hierarchy is the unified one."""
    if not os.path.isdir(_BOOTED):
        raise Unsupported(
            "systemd is not running on this host, so it cannot manage control groups: leave out "
            "--systemd-cgroup (engines: the cgroupfs driver)"
        )
    if cgroups.detect().version != 2:
        raise Unsupported(
            "--systemd-cgroup needs cgroup v2: boot with systemd.unified_cgroup_hierarchy=1"
        )


def parse(path: str, identity: str) -> Scope:
    """A cgroupsPath as a scope; Invalid for other forms. "" is system.slice:bulkhead:ID."""
    parts = path.split(":") if path else ["", "bulkhead", identity]
    if len(parts) != 3 or path.startswith("/"):
        raise Invalid(
            'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got '
            f"{path!r} instead"
        )
    slice_, prefix, name = parts
    unit = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if not name or not _PART.fullmatch(unit):
        raise Invalid(f"cgroupsPath {path!r}: {unit!r} is no name of a unit")
    slice_ = slice_ or "system.slice"
    return Scope(unit, slice_, f"{expand(slice_)}/{unit}")


def expand(slice_: str) -> str:
    """The control group of a slice: a-b.slice is below a.slice; systemd.slice(5)."""
    name = slice_.removesuffix(".slice")
    if name == slice_ or not _PART.fullmatch(name):
        raise Invalid(f"cgroupsPath: {slice_!r} is no name of a slice")
    if name == "-":
        return ""
    words = name.split("-")
    if "" in words:
        raise Invalid(f"cgroupsPath: {slice_!r} is no name of a slice")
    return "".join(f"/{'-'.join(words[: count + 1])}.slice" for count in range(len(words)))


def start(scope: Scope, pid: int, identity: str, resources: Resources | None) -> None:
    """Make the scope around `pid`, which is in its group already; Internal if systemd does not."""
    properties: list[Property] = [
        ("Description", ("s", f"bulkhead container {identity}")),
        ("Slice", ("s", scope.slice_)),
        ("PIDs", ("au", [pid])),
        ("Delegate", ("b", True)),
        ("DefaultDependencies", ("b", False)),
        ("CollectMode", ("s", "inactive-or-failed")),
        *((f"{name}Accounting", ("b", True)) for name in ("Memory", "CPU", "IO", "Tasks")),
        *limits(resources or Resources()),
    ]
    with dbus.Connection(_SOCKET) as manager:
        words: tuple[Any, ...] = (scope.unit, "replace", properties, [])
        try:
            job = _call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", *words)
        except dbus.CallFailed as error:
            if error.name != _EXISTS:
                raise
            # One that failed is remembered; one that runs makes the second try fail too.
            _call(manager, "ResetFailedUnit", "s", scope.unit)
            job = _call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", *words)
        _finish(manager, job, scope.unit)


def stop(unit: str) -> None:
    """Have systemd forget a scope whose group is gone; nothing if it has. Not waited for."""
    with dbus.Connection(_SOCKET) as manager:
        try:
            _call(manager, "StopUnit", "ss", unit, "replace")
            _call(manager, "ResetFailedUnit", "s", unit)
        except dbus.CallFailed as error:
            if error.name not in _GONE:
                raise


def update(unit: str, resources: Resources) -> None:
    """Tell systemd of changed limits."""
    properties = limits(resources)
    if properties:
        with dbus.Connection(_SOCKET) as manager:
            _call(manager, "SetUnitProperties", "sba(sv)", unit, True, properties)


def _call(manager: dbus.Connection, member: str, signature: str, *values: Any) -> str:
    answer = manager.call(_NAME, _PATH, _MANAGER, member, signature, *values)
    return str(answer[0]) if answer else ""


def _finish(manager: dbus.Connection, job: str, unit: str) -> None:
    """Until systemd has done a job; JobRemoved says u id, o job, s unit, s result."""
    while True:
        told = manager.signal()
        if told.member == "JobRemoved" and told.body[1:2] == (job,):
            if told.body[3] not in ("done", "skipped"):
                raise Internal(f"systemd could not change {unit}: {told.body[3]}")
            return


def limits(resources: Resources) -> list[Property]:
    """The limits that systemd has properties for; systemd.resource-control(5)."""
    found: list[Property] = []

    def number(name: str, value: int | None) -> None:
        if value is not None:
            found.append((name, ("t", _UNLIMITED if value < 0 else value)))

    memory, cpu, io = resources.memory, resources.cpu, resources.block_io
    if memory is not None:
        number("MemoryMax", memory.limit)
        number("MemoryLow", memory.reservation)
        if memory.swap is not None:
            number("MemorySwapMax", convert.swap_to_v2(memory.swap, memory.limit))
    if cpu is not None:
        if cpu.shares:
            number("CPUWeight", convert.shares_to_weight(cpu.shares))
        if cpu.quota is not None or cpu.period:
            period = cpu.period or 100_000
            number("CPUQuotaPeriodUSec", period)
            quota = cpu.quota if cpu.quota is not None and cpu.quota > 0 else -1
            a_second = -(-quota * 1_000_000 // period // _STEP) * _STEP if quota > 0 else -1
            number("CPUQuotaPerSecUSec", a_second)
        for name, text in (("AllowedCPUs", cpu.cpus), ("AllowedMemoryNodes", cpu.mems)):
            if text:
                found.append((name, ("ay", _bits(text))))
    if resources.pids is not None:
        number("TasksMax", resources.pids.limit if resources.pids.limit > 0 else -1)
    if io is not None and io.weight:
        number("IOWeight", convert.blkio_to_io_weight(io.weight))
    return found


def _bits(text: str) -> list[int]:
    """A list ("0-3,7") as systemd has it: bytes, the lowest bit first."""
    mask = 0
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            for number in range(int(first), int(last or first) + 1):
                mask |= 1 << number
    except ValueError:
        raise Invalid(f"{text!r} is no list of processors or memory nodes") from None
    return list(mask.to_bytes(-(-mask.bit_length() // 8), "little"))
