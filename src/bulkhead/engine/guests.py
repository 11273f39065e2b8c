"""Workloads with a kernel of their own: what they cannot have, and what a start adds for them."""

import contextlib
import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bulkhead.boundary import registry
from bulkhead.boundary.seam import Nic, Rootfs, Within
from bulkhead.engine import body, options, stdio
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import Conflict, Invalid, Unsupported
from bulkhead.home import Home
from bulkhead.linux.fds import OwnedFd
from bulkhead.network.tap import guest_taps, guest_wires
from bulkhead.store import merged
from bulkhead.volumes import leases

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_DISK = "disk.ext4"
SHM = "/guest/shm"
"""As a bind's source: the /dev/shm of the workload of the same guest whose IPC is joined."""
MOST_LAYERS = 12
"""Guests have few disks: an image of more layers comes as one."""
MEMBER_LAYERS = 2
"""Likewise of a workload in the guest of another."""


def is_guest(record: Record) -> bool:
    """Whether the workload has a kernel of its own."""
    return record.boundary in registry.GUESTS


def has_disk(record: Record) -> bool:
    """Whether its files are on a disk of its kernel's, not in directories of the host."""
    return is_guest(record) and record.kernel != registry.GVISOR


def check(record: Record) -> None:
    """Refuse what a workload of another kernel cannot have, in words; Unsupported or Invalid."""
    if not is_guest(record):
        if record.kernel:
            raise Invalid(
                f"--kernel {record.kernel}: a workload behind the boundary {record.boundary} "
                "shares the host's kernel"
            )
        return
    host = record.host
    disk_size(host)
    foreign = record.kernel == registry.GVISOR
    # A pod: the guest is that of the workload whose network it joins.
    member = host.network_mode.startswith("container:") and not foreign
    if foreign and record.boundary != "sandbox":
        raise Invalid(
            f"--kernel {record.kernel} is for the boundary sandbox, not {record.boundary}"
        )
    for option, present in (
        (f"--network {host.network_mode}", _others(host.network_mode, member)),
        (f"--pid {host.pid_mode}", _others(host.pid_mode, member)),
        (f"--ipc {host.ipc_mode}", _others(host.ipc_mode, member)),
        ("--uts host", host.uts_mode == "host"),
        ("--userns", host.userns_mode not in {"", "host"}),
        ("--cgroupns host", host.cgroupns_mode == "host"),
        ("--device", bool(host.devices)),
        (f"--storage-opt with --kernel {record.kernel}", bool(host.storage_opt) and foreign),
        (f"--privileged with --kernel {record.kernel}", host.privileged and foreign),
        (f"--sysctl with --kernel {record.kernel}", bool(host.sysctls) and foreign),
    ):
        if present:
            raise Unsupported(
                f"{option} is not possible behind the boundary {record.boundary}: "
                "it has a kernel of its own"
            )


def _others(mode: str, member: bool) -> bool:
    """Whether a namespace is shared with the host, or with a workload of another kernel."""
    return mode == "host" or (mode.startswith("container:") and not member)


def pod(engine: "Engine", record: Record) -> Workload | None:
    """The workload in whose guest this one runs: that whose network it joins."""
    mode = record.host.network_mode
    if not has_disk(record) or not mode.startswith("container:"):
        return None
    other = engine.workloads.find(mode.removeprefix("container:"))
    return pod(engine, other.record) or other


def within(engine: "Engine", record: Record, *, known: bool = False) -> Within | None:
    """That guest; Conflict if it does not run, unless the workload is `known` to be in it."""
    other = pod(engine, record)
    if other is None:
        return None
    if not known and not (other.running and other.record.pid):
        raise Conflict(f"cannot join network of a non running container: {other.id}")
    if not known and other.record.status == "paused":
        raise Conflict(f"container {other.record.name} is paused: its kernel stands still")
    modes = (record.host.pid_mode, record.host.ipc_mode)
    joined = {one.removeprefix("container:") for one in modes if one.startswith("container:")}
    if len(joined) > 1:
        raise Unsupported("--pid and --ipc of different workloads: a guest has them from one")
    for identity in joined:
        donor = engine.workloads.find(identity)
        if (pod(engine, donor.record) or donor) is not other:
            raise Unsupported(f"--pid, --ipc {identity}: it is not in the same guest")
    place = engine.home.workload_run
    directory = next((place(identity) for identity in joined), "")
    return Within(other.id, other.record.pid, place(other.id), directory)


def shared(engine: "Engine", record: Record) -> tuple[dict[str, str], str | None]:
    """Of a guest: the kinds of namespaces that it joins, and the /dev/shm that goes with one."""
    found: dict[str, str] = {}
    for kind, mode in (("pid", record.host.pid_mode), ("ipc", record.host.ipc_mode)):
        if not mode.startswith("container:"):
            continue
        other = engine.workloads.find(mode.removeprefix("container:"))
        if not other.running:
            raise Conflict(
                f"cannot join {kind.upper()} namespace of a non running container: {other.id}"
            )
        if kind == "ipc" and other.record.host.ipc_mode != "shareable":
            raise Invalid(
                f"cannot join IPC of {other.id}: non-shareable IPC "
                "(hint: use IpcMode:shareable for the donor container)"
            )
        found[kind] = "guest"
    return found, SHM if "ipc" in found else None


def disk_size(host: body.HostConfig) -> int:
    """Bytes of a guest's writable disk, 0 for the default; Invalid for other storage options."""
    size = 0
    for name, value in (host.storage_opt or {}).items():
        if name != "size":
            raise Invalid(f"--storage-opt {name}: the only storage option of a guest is size")
        size = options.size(value)
    return size


async def rootfs(engine: "Engine", record: Record, base: Rootfs) -> Rootfs:
    """The root with what a guest mounts: the images of its layers and its writable disk."""
    if record.vm is not None:
        return base
    files: dict[str, None] = {}
    for diff_id in reversed(record.diff_ids):
        layer = engine.store.layer(diff_id)
        if layer is None or layer.form != "erofs":
            raise Unsupported(f"layer {diff_id} is not stored as a file system image")
        files[layer.path] = None
    if len(files) > (MOST_LAYERS if pod(engine, record) is None else MEMBER_LAYERS):
        lowers = engine.layers.lowers(record.diff_ids)
        directory, limits = engine.home.in_root("merged"), engine.store.limits
        path = await engine.blocking(
            lambda: merged.merged_image(directory, record.diff_ids, lowers, limits)
        )
        files = {path: None}
    return Rootfs(
        lowers=base.lowers,
        upper=base.upper,
        work=base.work,
        layer_files=tuple(files),
        disk=disk(engine.home.workload(record.id), record),
        disk_size=disk_size(record.host),
        volatile=record.host.auto_remove and not record.building,
    )


def disk(directory: str, record: Record) -> str | None:
    """Where a guest's writable disk is, in the workload's directory."""
    return f"{directory}/{_DISK}" if has_disk(record) else None


def holder(engine: "Engine", record: Record, point: MountPoint) -> leases.Holder:
    """Who uses a volume: containers are one kernel together, a guest is one of its own."""
    first = pod(engine, record)
    own = record.id if first is None else first.id
    kernel = own if is_guest(record) else leases.HOST
    return leases.Holder(record.id, record.name, kernel, record.boundary, point.rw)


def exclusive(engine: "Engine", record: Record, sources: Sequence[str]) -> frozenset[str]:
    """Sources that only this guest writes, and by one mount: volumes that it has the lease of."""
    if not is_guest(record) or pod(engine, record) is not None:
        return frozenset()  # the others of its guest may mount it a second time
    places: dict[str, set[str]] = {}
    for point, source in zip(record.mounts, sources, strict=True):
        if point.type_ == "volume":
            places.setdefault(point.name, set()).add(source)
    return frozenset(
        source
        for name, found in places.items()
        for source in found
        if len(found) == 1
        and not engine.volumes.get(name).options
        and any(one.user == record.id and one.writes for one in engine.volumes.leases.holders(name))
    )


def volume_disks(engine: "Engine", record: Record) -> dict[str, str]:
    """The image files of its volumes that are disks, by the directory that stands for them."""
    if not has_disk(record):
        return {}
    first = pod(engine, record)
    for point in record.mounts:
        if first is None or point.type_ != "volume" or not engine.volumes.is_disk(point.name):
            continue
        users = {one.user for one in engine.volumes.leases.holders(point.name)}
        if users - {record.id, first.id} and first.id not in users:
            raise Conflict(
                f"volume {point.name} is a disk, which another workload of the same guest has: "
                f"mount it in {first.record.name} as well"
            )
    return {
        engine.volumes.data(point.name): engine.volumes.image(point.name)
        for point in record.mounts
        if point.type_ == "volume" and engine.volumes.is_disk(point.name)
    }


def nics(record: Record, netns: str | None, undo: contextlib.AsyncExitStack) -> tuple[Nic, ...]:
    """The interfaces that the network has prepared, as a guest's; closed by `undo` on failure."""
    if not has_disk(record) or netns is None or _joins(record):
        return ()
    made = []
    for one in guest_taps(netns):
        undo.callback(one.tap_fd.close)
        routes = tuple((route.destination, route.gateway) for route in one.routes)
        made.append(Nic(one.name, one.tap_fd, one.mac, one.addresses, routes, one.mtu))
    return tuple(made)


def wires(
    record: Record, netns: str | None, undo: contextlib.AsyncExitStack
) -> tuple[OwnedFd, ...]:
    """The namespace that gVisor takes its interfaces from; to be closed after the start."""
    if record.kernel != registry.GVISOR or netns is None:
        return ()
    wire = guest_wires(netns)
    undo.callback(wire.close)
    return (wire,)


def writable_bytes(home: Home, record: Record) -> int:
    """Bytes on disk of the workload's writable layer, a guest's disk included."""
    directory = home.workload(record.id)
    total = stdio.writable_bytes(f"{directory}/upper")
    names = [disk.file for disk in record.vm.disks] if record.vm is not None else [_DISK]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(f"{directory}/{name}").st_blocks * 512
    return total


def check_image(record: Record) -> None:
    """Unsupported for what makes an image of a whole machine."""
    if record.vm is not None:
        raise Unsupported(
            f"{record.name} is a whole machine, which has disks and no image: bulkhead vm export"
        )


def explain_oom(record: Record, kills: int) -> str:
    """One line on kills for want of memory inside the guest."""
    limit = record.host.memory
    size = f"--memory {limit >> 20}m" if limit else "its boundary's default size, no --memory given"
    return (
        f"out of memory inside the guest: its kernel killed {kills} process{'es' * (kills > 1)} "
        f"(it has {size})"
    )


def check_shared(other: Workload, boundary: str) -> None:
    """Unsupported if `other` has its namespaces in another kernel than one behind `boundary`."""
    record = other.record
    if boundary in registry.GUESTS and not is_guest(record):
        raise Unsupported(
            f"the namespaces of {record.name} are the host's: --boundary {record.boundary} joins "
            "them"
        )
    if is_guest(record) and (record.boundary != boundary or record.kernel == registry.GVISOR):
        where = "" if record.kernel == registry.GVISOR else f": --boundary {record.boundary} can"
        raise Unsupported(
            f"the namespaces of {record.name} are those of its own kernel (boundary "
            f"{record.boundary}): no other workload can join them{where}"
        )


def networks() -> ModuleType:
    """engine/guest_networks.py, which few engines need."""
    return import_module("bulkhead.engine.guest_networks")


def _joins(record: Record) -> bool:
    return record.host.network_mode.startswith("container:")


def account_files(engine: "Engine", record: Record) -> Sequence[str]:
    """Where passwd and group of a running workload are read; for guests those of its image."""
    if has_disk(record):
        return engine.layers.lowers(record.diff_ids)
    return (host_root(record),)


def own_addresses(workload: Workload) -> list[str]:
    """The addresses of a workload whose loopback nobody outside can reach; else []."""
    if workload.record.kernel != registry.GVISOR or workload.settings is None:
        return []
    found = workload.settings["Networks"].values()
    return [one["IPAddress"] for one in found if one.get("IPAddress")]


def host_root(record: Record) -> str:
    """Where the host sees the root of a running workload without a disk of its own."""
    place = f"/proc/{record.pid}/root"
    return f"{place}/run/rootfs" if record.kernel == registry.GVISOR else place
