"""RPC: what workloads say and use (logs, stats, top)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from bulkhead.boundary import registry
from bulkhead.boundary.seam import Measured
from bulkhead.engine import filters, guests, stdio, table
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.health import moment
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, Conflict, Invalid, Unsupported
from bulkhead.keeper import logs as keeper_logs

METHODS = Table()


class Logs(Params, frozen=True):
    """Which lines."""

    id: str
    follow: bool = False
    stdout: bool = True
    stderr: bool = True
    since: str | float | None = None
    until: str | float | None = None
    timestamps: bool = False
    tail: int | str | None = None
    details: bool = False


class Stats(Params, frozen=True):
    """How often."""

    id: str
    stream: bool = True
    one_shot: bool = False


class Top(Params, frozen=True):
    """Which columns."""

    id: str
    ps_args: str = ""


def _tail(value: int | str | None) -> int | None:
    if value is None or value in {"all", ""}:
        return None
    try:
        number = int(value)
    except ValueError:
        raise Invalid(f"invalid value for tail: {value}") from None
    return None if number < 0 else number


@METHODS.method("workload.logs", Logs)
async def logs(engine: Engine, params: Logs, call: Call) -> dict[str, Any]:
    """Items [stream (1 or 2), bytes]."""
    if not (params.stdout or params.stderr):
        raise Invalid("Bad parameters: you must choose at least one stream")
    workload = engine.workloads.find(params.id)
    config = workload.record.host.log_config
    if config is not None and config.type_ == "none":
        raise Invalid("configured logging driver does not support reading")
    streams = {number for number, wanted in ((1, params.stdout), (2, params.stderr)) if wanted}
    stop = asyncio.Event()
    follow = params.follow and (workload.running or workload.record.status == "restarting")
    watcher = engine.spawn(_until_end(workload, stop)) if follow else None
    try:
        records = keeper_logs.read(
            stdio.log_path(engine.home, workload.record),
            since=filters.moment_ns(params.since),
            until=filters.moment_ns(params.until),
            tail=_tail(params.tail),
            follow=follow,
            stop=stop,
        )
        async with contextlib.aclosing(records):  # type: ignore[type-var]
            async for record in records:
                if record.stream in streams:
                    data = record.data
                    if params.timestamps:
                        data = record.time.encode() + b" " + data
                    await call.item([record.stream, data])
    finally:
        if watcher is not None:
            watcher.cancel()
    return {}


async def _until_end(workload: Workload, stop: asyncio.Event) -> None:
    """Set `stop` when the workload has ended and is not to be started again."""
    while True:
        await asyncio.shield(workload.ended)
        if workload.record.status != "restarting":
            break
        while workload.record.status == "restarting":
            await asyncio.sleep(0.05)
        if not workload.running:
            break
    stop.set()


# --- statistics


def _sample(engine: Engine, workload: Workload, before: dict[str, Any] | None) -> dict[str, Any]:
    record = workload.record
    instance: object = workload.instance
    now = moment(time.time_ns())
    sample: dict[str, Any] = {
        "id": record.id,
        "name": f"/{record.name}",
        "read": now,
        "preread": before["read"] if before else "0001-01-01T00:00:00Z",
        "cpu_stats": {},
        "memory_stats": {},
        "pids_stats": {},
        "blkio_stats": {},
        "num_procs": 0,
        "storage_stats": {},
    }
    if isinstance(instance, Measured) and workload.running:
        sample |= instance.stats()
        networks = table.interfaces(record.pid)
        if networks:
            sample["networks"] = networks
    sample["precpu_stats"] = before["cpu_stats"] if before else {"cpu_usage": {"total_usage": 0}}
    return sample


async def _inside(engine: Engine, workload: Workload) -> dict[str, Any]:
    """What a workload with a kernel of its own uses as that kernel counts: member "guest"."""
    if not guests.has_disk(workload.record) or workload.record.status != "running":
        return {}
    from bulkhead.engine import guest_files

    try:
        return {"guest": await guest_files.usage(engine, workload)}
    except BulkheadError:
        return {}  # it is just ending, or does not answer: what is known outside is said


async def _samples(engine: Engine, workload: Workload) -> AsyncIterator[dict[str, Any]]:
    before = None
    while engine.workloads.by_id(workload.id) is not None:
        before = _sample(engine, workload, before)
        yield before | await _inside(engine, workload)
        await asyncio.sleep(1.0)


@METHODS.method("workload.stats", Stats)
async def stats(engine: Engine, params: Stats, call: Call) -> dict[str, Any]:
    """Items in the shape of Docker's ContainerStatsResponse: one a second, or one."""
    workload = engine.workloads.find(params.id)
    if params.stream:
        async for sample in _samples(engine, workload):
            await call.item(sample)
        return {}
    before = None
    if not params.one_shot and workload.running:
        before = _sample(engine, workload, None)
        await asyncio.sleep(1.0)
    sample = _sample(engine, workload, before) | await _inside(engine, workload)
    call.send(sample)
    return sample


@METHODS.method("workload.top", Top)
async def top(engine: Engine, params: Top, call: Call) -> dict[str, Any]:
    """Docker's ContainerTop, read from /proc."""
    workload = engine.workloads.find(params.id)
    if not workload.running:
        raise Conflict(f"container {workload.id} is not running")
    if workload.record.kernel == registry.GVISOR:
        name = workload.record.name
        raise Unsupported(f"gVisor's processes are its own: bulkhead exec {name} ps shows them")
    if guests.is_guest(workload.record):
        from bulkhead.engine import guest_files

        return await guest_files.top(engine, workload, params.ps_args)
    instance: object = workload.instance
    if not isinstance(instance, Measured):
        raise Unsupported(f"the boundary {workload.record.boundary} does not list processes")
    try:
        return table.processes(instance.processes(), params.ps_args)
    except OSError as error:
        raise BulkheadError(f"top: {error}") from error
