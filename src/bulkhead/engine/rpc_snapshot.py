"""RPC: snapshots of running workloads (`snapshot.*`)."""

from typing import Any

from bulkhead.engine import snapshots
from bulkhead.engine.calls import Call, Nothing, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.lifecycle import attributes

METHODS = Table()


class Take(Params, frozen=True):
    """A workload, and what the snapshot is to be called."""

    id: str
    name: str = ""


class Restore(Params, frozen=True):
    """A snapshot, and what the new workload is to be called."""

    snapshot: str
    name: str = ""


class One(Params, frozen=True):
    """A snapshot."""

    name: str


@METHODS.method("snapshot.create", Take)
async def create(engine: Engine, params: Take, call: Call) -> dict[str, Any]:
    """Save a running workload."""
    workload = engine.workloads.find(params.id)
    facts = await engine.spawn(snapshots.take(engine, workload, params.name))
    engine.events.emit(
        "container", "snapshot", workload.id, attributes(workload, snapshot=facts.name)
    )
    return snapshots.describe(engine.home, facts)


@METHODS.method("snapshot.restore", Restore)
async def restore(engine: Engine, params: Restore, call: Call) -> dict[str, Any]:
    """A new workload that goes on."""
    workload = await engine.spawn(snapshots.restore(engine, params.snapshot, params.name))
    return {"Id": workload.id, "Name": workload.record.name}


@METHODS.method("snapshot.fork", Take)
async def fork(engine: Engine, params: Take, call: Call) -> dict[str, Any]:
    """Save and restore at once."""
    workload = engine.workloads.find(params.id)
    made = await engine.spawn(snapshots.fork(engine, workload, params.name))
    return {"Id": made.id, "Name": made.record.name}


@METHODS.method("snapshot.list", Nothing)
async def list_(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """All of them."""

    def found() -> list[dict[str, Any]]:
        return [snapshots.describe(engine.home, one) for one in snapshots.every(engine.home)]

    return await engine.blocking(found)


@METHODS.method("snapshot.remove", One)
async def remove(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Remove one."""
    await engine.blocking(lambda: snapshots.remove(engine.home, params.name))
    return {}
