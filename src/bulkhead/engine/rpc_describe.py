"""RPC: describing workloads (list, inspect, explain, plan) and pruning them."""

import functools
from typing import Any

from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.engine import body, creation, describe, explain, filters, guests, specgen
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.users import Identity
from bulkhead.errors import Unsupported

METHODS = Table()
_PRUNE = frozenset({"until", "label", "label!"})


class List(Params, frozen=True):
    """Which workloads."""

    all: bool = False
    limit: int = 0
    size: bool = False
    filters: dict[str, Any] | None = None


class Inspect(Params, frozen=True):
    """A workload."""

    id: str
    size: bool = False


class Filters(Params, frozen=True):
    """What to prune."""

    filters: dict[str, Any] | None = None


class Plan(Params, frozen=True):
    """What would be run."""

    body: body.CreateBody
    name: str = ""
    boundary: str = ""
    attach: tuple[bool, bool, bool] = (False, False, False)
    tty: bool = False


@METHODS.method("workload.list", List)
async def list_(engine: Engine, params: List, call: Call) -> list[dict[str, Any]]:
    """Docker's ContainerSummary list, newest first."""
    chosen = describe.select(
        engine, everything=params.all, limit=params.limit, given=params.filters
    )
    return [describe.summary(engine, workload, size=params.size) for workload in chosen]


@METHODS.method("workload.inspect", Inspect)
async def inspect(engine: Engine, params: Inspect, call: Call) -> dict[str, Any]:
    """Docker's ContainerInspectResponse."""
    workload = engine.workloads.find(params.id)
    return describe.inspect(engine, workload, size=params.size)


@METHODS.method("workload.explain", Inspect)
async def explain_(engine: Engine, params: Inspect, call: Call) -> dict[str, Any]:
    """What the kernel says of it."""
    workload = engine.workloads.find(params.id)
    return await engine.blocking(lambda: explain.view(engine, workload))


@METHODS.method("workload.plan", Plan)
async def plan(engine: Engine, params: Plan, call: Call) -> dict[str, Any]:
    """The steps that a start would take; nothing is made."""
    record = creation.draft(engine, params.name, params.body, params.boundary)
    boundary = engine.boundary(record.boundary)
    maker = getattr(boundary, "plan", None)
    if maker is None:
        raise Unsupported(f"the boundary {record.boundary} does not describe its launches")
    host = record.host.network_mode == "host"
    facts = specgen.Facts(
        identity=Identity(0, 0, (0,), "/", ""),
        cgroup=engine.cgroup_path(record),
        netns=None if host else "/proc/self/ns/net",
        hostname=record.config.hostname,
        sources=["/" if point.type_ != "tmpfs" else "" for point in record.mounts],
    )
    bundle = Bundle(
        id=record.id,
        spec=specgen.generate(record, facts),
        rootfs=Rootfs(lowers=await engine.lowers(record.diff_ids), upper="upper", work="work"),
        directory=engine.home.workload_run(record.id),
    )
    return {"steps": maker(bundle, terminal=record.config.tty)}


@METHODS.method("workload.prune", Filters)
async def prune(engine: Engine, params: Filters, call: Call) -> dict[str, Any]:
    """Remove every workload that has ended."""
    wanted = filters.normalise(params.filters, _PRUNE)
    until = filters.moment_ns(wanted["until"][-1]) if wanted.get("until") else None
    deleted: list[str] = []
    freed = 0
    for workload in engine.workloads:
        record = workload.record
        labels = record.config.labels or {}
        if workload.running or record.status == "restarting" or record.removing:
            continue
        if until is not None and record.created_ns > until:
            continue
        if not filters.labels_match(labels, wanted.get("label", [])):
            continue
        if wanted.get("label!") and filters.labels_match(labels, wanted["label!"]):
            continue
        measure = functools.partial(guests.writable_bytes, engine.home, record)
        size = await engine.blocking(measure)
        await engine.removal.remove(workload, force=False, volumes=False)
        deleted.append(record.id)
        freed += size
    engine.events.emit("container", "prune", "", {"reclaimed": str(freed)})
    return {"ContainersDeleted": deleted, "SpaceReclaimed": freed}
