"""What a beginning engine does with what an earlier one left.

holder's entries   running: the workload runs on; ended: its end is handled as if just now
records            "running" without an entry: the process is looked for by its control group;
                   it is watched by pidfd, or its end is recorded, with the code that the holder
                   wrote down or an unknown one; a start or end that came too late for its record
                   is found in the same places
boot               another boot id: everything that ran has ended; restart policies decide
leftovers          half-removed workloads, directories, control groups, networks of nobody
"""

import contextlib
import functools
import logging
import os
import shutil
import time
from typing import TYPE_CHECKING

import msgspec

from bulkhead.boundary.seam import Bundle, Launched, Pausable, Rootfs
from bulkhead.engine import guests, launching, restart, specgen, vm_shape
from bulkhead.engine.launching import Start
from bulkhead.engine.records import UNKNOWN_EXIT, Record, Workload
from bulkhead.engine.users import Identity
from bulkhead.errors import BulkheadError
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.keeper.holder import Entry, Exit
from bulkhead.linux import pidfd, procfs
from bulkhead.machines import files
from bulkhead.network.model import AttachRequest

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")


async def run(engine: "Engine") -> None:
    """Bring records and kernel into agreement, then start what is to be started."""
    entries = {entry.id: entry for entry in await engine.processes.holder.entries()}
    ended: list[tuple[Workload, Exit | _Reaped | None]] = []
    was_up: set[str] = set()
    for workload in engine.workloads:
        record = workload.record
        entry = entries.get(record.id)
        if record.boot_id != engine.boot_id:
            if _after_boot(record):
                was_up.add(record.id)
            engine.workloads.save(workload)
            continue
        if entry is not None and entry.running:
            await _adopt(engine, workload, entry)
        elif entry is not None and _is_news(record, entry):
            _begun(record, entry.pid, entry.started_ns)
            ended.append(
                (workload, Exit(entry.id, entry.pid, entry.wait_status, entry.finished_ns))
            )
        elif workload.running:
            if not await _orphan(engine, workload):
                ended.append((workload, _reaped(engine, record)))
        elif record.status == "restarting":
            was_up.add(record.id)
            record.status = "exited"
        elif not await _unrecorded(engine, workload) and (reaped := _reaped(engine, record)):
            _begun(record, reaped.pid, reaped.started_ns)
            ended.append((workload, reaped))
    _networks(engine)
    engine.processes.on_exit = engine.lifecycle.on_exit
    engine.processes.on_orphan = engine.lifecycle.on_orphan
    for workload, event in ended:
        status = None if event is None else event.wait_status
        finished = time.time_ns() if event is None else event.finished_ns
        if event is not None or workload.running:
            await _load_ended(engine, workload)
            await engine.lifecycle.finish(workload, status, finished)
    engine.reservations.rebalance()
    engine.processes.listen()
    if any(workload.record.moving for workload in engine.workloads):
        from bulkhead.engine import moving  # most engines never move anything

        await moving.recover(engine)
    await _sweep(engine, entries)
    _start(engine, was_up)


def _is_news(record: Record, entry: Entry) -> bool:
    """Whether the entry's end is not in the record yet."""
    return entry.finished_ns != record.finished_ns or record.status == "running"


class _Reaped(msgspec.Struct):
    """The holder's exit record."""

    pid: int
    wait_status: int
    started_ns: int
    finished_ns: int


def _reaped(engine: "Engine", record: Record) -> _Reaped | None:
    """What the holder wrote when the last run ended, if the record does not have it yet."""
    try:
        with open(f"{engine.home.workload_run(record.id)}/exit.json", "rb") as file:
            found = msgspec.json.decode(file.read(), type=_Reaped)
    except (OSError, msgspec.MsgspecError):
        return None
    news = found.finished_ns > record.finished_ns and record.pid in (0, found.pid)
    return found if news else None


def _begun(record: Record, pid: int, started_ns: int) -> None:
    """A run that the record does not have, as `launching.record_start` writes it."""
    launching.record_start(record, Launched(pid, started_ns), record.boot_id)


async def _unrecorded(engine: "Engine", workload: Workload) -> bool:
    """Whether it runs though its record does not say so yet; then it is watched."""
    record = workload.record
    if record.boundary != "container":
        return False
    try:
        pids = cgroups.detect().open(engine.cgroup_path(record)).pids()
        times = sorted((procfs.start_time(pid), pid) for pid in pids)
    except (BulkheadError, OSError):
        return False
    if not times:
        return False
    ticks, first = times[0]
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    _begun(record, first, time.time_ns() - age_ns)
    return await _orphan(engine, workload)


def _after_boot(record: Record) -> bool:
    """The record of a workload after a reboot; whether it had been up."""
    up = record.status in {"running", "paused", "restarting"}
    if up:
        record.status = "exited"
        record.exit_code, record.exit_known = UNKNOWN_EXIT, False
        record.error = "the machine went down while it ran"
        record.finished_ns = time.time_ns()
    record.pid = 0
    return up


def _bundle(engine: "Engine", record: Record, pid: int) -> Bundle:
    """What a running workload was started with, as far as later operations need it."""
    host = record.host.network_mode == "host"
    facts = specgen.Facts(
        identity=Identity(0, 0, (0,), "/", ""),
        cgroup=engine.cgroup_path(record),
        netns=None if host else f"/proc/{pid}/ns/net",
        hostname=record.config.hostname,
        sources=[point.source for point in record.mounts],
    )
    home = engine.home.workload(record.id)
    return Bundle(
        id=record.id,
        spec=specgen.generate(record, facts),
        rootfs=Rootfs((), f"{home}/upper", f"{home}/work", disk=guests.disk(home, record)),
        directory=engine.home.workload_run(record.id),
        kernel=record.kernel,
        machine=vm_shape.describe(engine.home, record),
        within=guests.within(engine, record, known=True),
    )


async def _adopt(engine: "Engine", workload: Workload, entry: Entry) -> None:
    record = workload.record
    record.pid = entry.pid
    record.boot_id = engine.boot_id
    if record.status not in {"running", "paused"}:
        _begun(record, entry.pid, entry.started_ns)
    await _load(engine, workload)
    if record.vm is not None:
        engine.leases.resume(record)
    engine.processes.watch(record.id, None, entry.pid)
    engine.health.begin(workload)


async def _load(engine: "Engine", workload: Workload) -> None:
    record = workload.record
    workload.cleaned.clear()
    workload.begin_run()
    workload.bundle = _bundle(engine, record, record.pid)
    workload.instance = await engine.boundary(record.boundary).load(workload.bundle, record.pid)
    if workload.instance.state().status == "paused":
        record.status = "paused"
        if record.passing and isinstance(workload.instance, Pausable):
            await workload.instance.resume()
            record.status, record.passing = "running", False
    elif record.status == "paused":
        record.status = "running"
    elif record.passing and isinstance(workload.instance, Pausable):
        record.passing = False
        await workload.instance.resume()
    for point in record.mounts:
        if point.type_ == "volume" and point.name in engine.volumes:
            mounted = not guests.has_disk(record)
            who = guests.holder(engine, record, point)
            engine.volumes.hold(point.name, record.id, who, mounted=mounted, known=True)
    engine.workloads.save(workload, durable=False)


async def _load_ended(engine: "Engine", workload: Workload) -> None:
    """Its control group still says whether memory ran out, and is to be removed."""
    record = workload.record
    try:
        workload.bundle = _bundle(engine, record, 0)
        workload.instance = await engine.boundary(record.boundary).load(workload.bundle, 0)
    except BulkheadError as error:
        log.warning("%s has ended and cannot be looked at: %s", record.name, error)


async def _orphan(engine: "Engine", workload: Workload) -> bool:
    """Watch a process that no holder knows; False if it has ended."""
    record = workload.record
    try:
        group = cgroups.detect().open(engine.cgroup_path(record))
        if record.pid not in group.pids():
            return False
        handle = pidfd.open_process(record.pid)
    except (BulkheadError, OSError):
        return False
    await _load(engine, workload)
    engine.processes.orphan(record.id, handle)
    engine.health.begin(workload)
    return True


def _networks(engine: "Engine") -> None:
    live: dict[str, tuple[AttachRequest, int]] = {
        workload.id: (engine.attach_request(workload), workload.record.pid)
        for workload in engine.workloads
        if workload.running and workload.record.pid
    }
    engine.networks.reconcile(live)
    for identity in live:
        workload = engine.workloads.by_id(identity)
        if workload is not None:
            workload.settings = engine.networks.settings(identity)


async def _sweep(engine: "Engine", entries: dict[str, Entry]) -> None:
    """Remove what belongs to nobody."""
    for entry in entries.values():
        identity = entry.id.partition("/")[0]
        if engine.workloads.by_id(identity) is None or ("/" in entry.id and not entry.running):
            if entry.running:
                await engine.processes.signal(entry.id, 9)
            else:
                await engine.processes.forget(entry.id)
    hierarchy = cgroups.detect()
    for name in _groups(engine):
        workload = engine.workloads.by_id(name)
        if workload is None or not workload.running:
            group = hierarchy.open(f"{engine.cgroup_parent}/{name}")
            try:
                await engine.blocking(functools.partial(_delete, group))
            except (BulkheadError, OSError) as error:
                log.warning("cannot remove the control group of %s: %s", name, error)
    await engine.removal.sweep()
    if os.path.exists(engine.home.in_root("machines", "work")):
        await engine.blocking(lambda: files.sweep(engine.home))
    for name in ("looks", "tools", "templates"):
        left = engine.home.in_run(name)
        await engine.blocking(functools.partial(shutil.rmtree, left, ignore_errors=True))
    for path in engine.volumes.sweep():
        await engine.blocking(functools.partial(engine.volumes.remove_tree, path))


def _delete(group: cgroups.Group) -> None:
    group.kill()
    group.delete()


def _groups(engine: "Engine") -> set[str]:
    """Names of the control groups below ours."""
    found: set[str] = set()
    for folder in cgroups.detect().open(engine.cgroup_parent).folders():
        with contextlib.suppress(FileNotFoundError):
            found.update(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return found


def _start(engine: "Engine", was_up: set[str]) -> None:
    for workload in engine.workloads:
        record = workload.record
        if workload.running or record.removing:
            continue
        booted = record.boot_id != engine.boot_id
        record.boot_id = engine.boot_id
        ran = record.started_ns > 0
        if record.vm is not None and record.vm.autostart:
            if booted or not record.stopped_by_hand:
                engine.spawn(_start_one(engine, workload))
            continue
        if (booted and ran) or record.id in was_up:
            again = restart.wanted_at_boot(
                record.host.restart_policy,
                exit_code=record.exit_code,
                restarts=record.restart_count,
                by_hand=record.stopped_by_hand,
                was_up=record.id in was_up,
            )
            if again:
                engine.spawn(_start_one(engine, workload))


async def _start_one(engine: "Engine", workload: Workload) -> None:
    try:
        await engine.lifecycle.start(workload, Start())
    except BulkheadError as error:
        log.warning("%s could not be started: %s", workload.record.name, error)
