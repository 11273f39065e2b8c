"""One start of a workload: from its record to a running process, or to nothing.

Everything acquired registers its undo on the next line; a failed start leaves the workload as it
was, with the reason in its record and Docker's exit code (127 not found, 126 not executable, 128
otherwise).
"""

import asyncio
import contextlib
import functools
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bulkhead.boundary.seam import Bundle, Launched, Nic, Rootfs
from bulkhead.engine import copyup, guests, parents, specgen, stdio, users, vm_shape
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import (
    BulkheadError,
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    Invalid,
)
from bulkhead.home import Home
from bulkhead.keeper.holder import program_path
from bulkhead.network.model import Attachment

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_LET_GO_S = 30.0
_GENERATED = {"/etc/hosts": "hosts", "/etc/hostname": "hostname", "/etc/resolv.conf": "resolv.conf"}


@dataclass(slots=True)
class Start:
    """What a client adds to a start."""

    rows: int = 0
    columns: int = 0


async def launch(engine: "Engine", workload: Workload, start: Start) -> Launched:
    """Run the workload's program; the caller holds the lock and records the outcome."""
    record = workload.record
    async with contextlib.AsyncExitStack() as undo:
        lowers = await engine.lowers(record.diff_ids)
        rootfs = _directories(engine, record, lowers)
        if guests.has_disk(record):
            rootfs = await guests.rootfs(engine, record, rootfs)
        undo.callback(engine.volumes.release, record.id)
        sources = [await _source(engine, record, point, lowers) for point in record.mounts]
        attachment = engine.networks.prepare(engine.attach_request(workload))
        undo.callback(engine.networks.release, record.id)
        await engine.processes.sync_helpers()
        facts = _facts(engine, workload, attachment, rootfs, sources, start)
        spec = specgen.generate(record, facts)
        engine.reservations.prepare(record)
        undo.callback(engine.reservations.settled, record)
        engine.reservations.shape(record, spec)
        wires = guests.wires(record, attachment.netns_path, undo)
        bundle = Bundle(
            id=record.id,
            spec=spec,
            rootfs=rootfs,
            directory=engine.home.workload_run(record.id),
            nics=_nics(engine, record, attachment, undo),
            kernel=record.kernel,
            exclusive=guests.exclusive(engine, record, sources),
            disks=guests.volume_disks(engine, record),
            fds=tuple(int(fd) for fd in wires),
            saved=engine.home.in_root("snapshots", record.saved) if record.saved else "",
            machine=vm_shape.describe(engine.home, record),
            within=guests.within(engine, record),
        )
        parents.claim(engine, record)
        undo.callback(parents.give_back, record)
        instance = await engine.boundary(record.boundary).create(bundle)
        engine.spares.used(record.id, None if record.building else rootfs)
        undo.push_async_callback(_delete, instance)
        # While this process waits for the holder, there is time to replace what was taken.
        engine.tend_networks(0.0)
        engine.loop.call_soon(engine.spares.refill)
        with stdio.make(engine.home, record, start.rows, start.columns) as streams:
            launched = await instance.start(streams)
        for wire in wires:
            wire.close()
        workload.instance, workload.bundle = instance, bundle
        record.saved = ""
        engine.processes.watch(record.id, launched.pidfd, launched.pid)
        engine.networks.started(record.id, launched.pid)
        workload.settings = engine.networks.settings(record.id)
        undo.pop_all()
    return launched


def _nics(
    engine: "Engine", record: Record, attachment: Attachment, undo: contextlib.AsyncExitStack
) -> tuple[Nic, ...]:
    """A guest's interfaces; a whole machine asks for their addresses itself."""
    nics = guests.nics(record, attachment.netns_path, undo)
    if record.vm is not None and attachment.netns_path is not None:
        engine.leases.begin(record, attachment.netns_path, nics, attachment.resolv_conf)
        undo.callback(engine.leases.end, record.id)
    return nics


async def _delete(instance: object) -> None:
    with contextlib.suppress(BulkheadError):
        await instance.delete(force=True)  # type: ignore[attr-defined]


def _directories(engine: "Engine", record: Record, lowers: tuple[str, ...]) -> Rootfs:
    home = engine.home.workload(record.id)
    make_directories(engine.home, record.id)
    if not record.mapped:
        lowers = (*lowers, *engine.builds.points(record.id), points(engine.home))
    # What a reboot deletes need not be written back when it is unmounted.
    volatile = record.host.auto_remove or record.building
    return Rootfs(lowers=lowers, upper=f"{home}/upper", work=f"{home}/work", volatile=volatile)


def make_directories(home: Home, identity: str) -> None:
    """The directories of a workload, as far as they are missing."""
    place = home.workload(identity)
    for path, mode in (
        (place, 0o710),
        (f"{place}/upper", 0o755),
        (f"{place}/work", 0o700),
        (f"{place}/log", 0o700),
        (home.workload_run(identity), 0o711),
    ):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)


@functools.cache
def points(home: Home) -> str:
    """A lowest layer with all that is mounted on in every container, made once.

    What an image lacks of it need not be made in the writable layer.
    """
    path = home.in_run("points")
    for folder in ("", "/etc", "/dev", "/proc", "/sys"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{path}{folder}", 0o755)
    for place in _GENERATED:
        fd = os.open(f"{path}{place}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.close(fd)
    return path


async def _source(
    engine: "Engine", record: Record, point: MountPoint, lowers: tuple[str, ...]
) -> str:
    """The host's path of one mount, made ready."""
    if point.type_ == "tmpfs":
        return ""
    if point.type_ == "bind":
        if not os.path.lexists(point.source):
            if not point.create:
                raise Invalid(
                    'invalid mount config for type "bind": '
                    f"bind source path does not exist: {point.source}"
                )
            os.makedirs(point.source, mode=0o755, exist_ok=True)
        return point.source
    if point.name not in engine.volumes:
        engine.volumes.create(point.name, anonymous=point.anonymous)
    return await _volume(engine, record, point, lowers)


async def _volume(
    engine: "Engine", record: Record, point: MountPoint, lowers: tuple[str, ...]
) -> str:
    """The directory of a volume, filled at its first use; for a guest that of its disk's files."""
    volumes, name = engine.volumes, point.name
    disk = guests.has_disk(record) and volumes.is_disk(name)
    if volumes.is_disk(name):
        await engine.blocking(functools.partial(volumes.image, name))
    await _ended_let_go(engine, record, name)
    if volumes.is_disk(name) and not disk:
        await engine.blocking(functools.partial(volumes.settle, name, record.id))
    path = volumes.hold(name, record.id, guests.holder(engine, record, point), mounted=not disk)
    if not volumes.get(name).filled:
        if not point.no_copy:
            with volumes.on_host(name, record.id) as seen:
                await copyup.fill(engine, seen, lowers, point.destination)
        volumes.mark_filled(name)
    if disk:
        await engine.blocking(functools.partial(volumes.lend, name))
        return f"{path}/{point.subpath}" if point.subpath else path
    return copyup.subdirectory(path, point.subpath) if point.subpath else path


async def _ended_let_go(engine: "Engine", record: Record, volume: str) -> None:
    """Wait for workloads that have ended, but whose kernels may not quite have."""

    def ending(identity: str) -> bool:
        other = engine.workloads.by_id(identity)
        return other is None or not (other.running or other.cleaned.is_set())

    deadline = time.monotonic() + _LET_GO_S
    users = {one.user for one in engine.volumes.leases.holders(volume)} - {record.id}
    while any(map(ending, users)) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
        users &= {one.user for one in engine.volumes.leases.holders(volume)}


def _facts(
    engine: "Engine",
    workload: Workload,
    attachment: Attachment,
    rootfs: Rootfs,
    sources: list[str],
    start: Start,
) -> specgen.Facts:
    record = workload.record
    hostname = attachment.hostname or record.config.hostname or os.uname().nodename
    namespaces, shared_shm = _shared(engine, record)
    return specgen.Facts(
        identity=users.resolve(
            record.config.user,
            engine.accounts(rootfs),
            record.host.group_add or (),
        ),
        cgroup=engine.cgroup_path(record),
        netns=attachment.netns_path,
        hostname=hostname,
        files=_files(engine, record, attachment, hostname),
        sources=sources,
        namespaces=namespaces,
        shared_shm=shared_shm,
        api=engine.home.in_run("docker.sock"),
        private=workload.private,
        init=program_path("bulkhead-init") if record.host.init else "",
        rows=start.rows,
        columns=start.columns,
    )


def _files(
    engine: "Engine", record: Record, attachment: Attachment, hostname: str
) -> dict[str, str]:
    """Write the three files of /etc, unless a mount of the user's is in their place."""
    texts = {
        "/etc/hosts": attachment.hosts,
        "/etc/hostname": f"{hostname}\n",
        "/etc/resolv.conf": attachment.resolv_conf,
    }
    taken = {point.destination for point in record.mounts}
    directory = engine.home.workload_run(record.id)
    written = {}
    for place, text in texts.items():
        if place in taken:
            continue
        path = f"{directory}/{_GENERATED[place]}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        written[place] = path
    return written


def rewrite_files(
    engine: "Engine", record: Record, before: tuple[str, str], after: tuple[str, str]
) -> None:
    """A running workload's networks have changed: /etc/hosts and /etc/resolv.conf follow.

    One that the workload itself has changed meanwhile stays as it is.
    """
    taken = {point.destination for point in record.mounts}
    directory = engine.home.workload_run(record.id)
    for place, old, new in zip(("/etc/hosts", "/etc/resolv.conf"), before, after, strict=True):
        if old == new or place in taken:
            continue
        # In place: the workload has this very file mounted.
        fd = os.open(f"{directory}/{_GENERATED[place]}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            known = old.encode()
            if os.pread(fd, len(known) + 1, 0) == known:
                data = new.encode()
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
        finally:
            os.close(fd)


def _shared(engine: "Engine", record: Record) -> tuple[dict[str, str], str | None]:
    """Namespaces of other workloads to join, and the /dev/shm that goes with an IPC namespace."""
    if guests.has_disk(record):
        return guests.shared(engine, record)
    found: dict[str, str] = {}
    shm = None
    for kind, mode in (("pid", record.host.pid_mode), ("ipc", record.host.ipc_mode)):
        if not mode.startswith("container:"):
            continue
        other = engine.workloads.find(mode.removeprefix("container:"))
        if not other.running:
            raise Conflict(
                f"cannot join {kind.upper()} namespace of a non running container: {other.id}"
            )
        if kind == "ipc":
            if other.record.host.ipc_mode not in {"shareable", "host"}:
                raise Invalid(
                    f"cannot join IPC of {other.id}: non-shareable IPC "
                    "(hint: use IpcMode:shareable for the donor container)"
                )
            shm = engine.shm_path(other.id)
        found[kind] = f"/proc/{other.record.pid}/ns/{kind}"
        engine.networks.keep_apart(other.id)
    if record.host.ipc_mode == "shareable":
        shm = engine.make_shm(record)
    return found, shm


def failure_code(error: BulkheadError) -> int:
    """The exit code of a workload whose program could not be run."""
    if isinstance(error, CommandNotFound):
        return 127
    if isinstance(error, CommandNotExecutable):
        return 126
    return 128


def record_start(record: Record, launched: Launched, boot_id: str) -> None:
    """Write down that it runs."""
    record.status = "running"
    record.pid = launched.pid
    record.started_ns = launched.started_ns or time.time_ns()
    record.finished_ns = 0
    record.exit_code = 0
    record.exit_known = True
    record.error = ""
    record.oom_killed = False
    record.oom_text = ""
    record.boot_id = boot_id


def record_failure(record: Record, error: BulkheadError) -> None:
    """Write down why it does not."""
    record.status = "created" if not record.started_ns else "exited"
    record.pid = 0
    record.exit_code = failure_code(error)
    record.error = error.message
