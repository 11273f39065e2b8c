"""RPC: workloads' life (`workload.*` but files, output and description)."""

import asyncio
from typing import Any

from bulkhead.engine import body, creation, launching
from bulkhead.engine.attach import Streams, detach_keys
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.launching import Start
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, Conflict

METHODS = Table()


class Create(Params, frozen=True):
    """A new workload."""

    body: body.CreateBody
    name: str = ""
    boundary: str = ""
    kernel: str = ""


class Run(Create, frozen=True):
    """Create, start and, with `attach`, stay with it."""

    attach: tuple[bool, bool, bool] = (False, False, False)
    tty: bool = False
    detach_keys: str = ""
    rows: int = 0
    columns: int = 0
    detach: bool = False


class One(Params, frozen=True):
    """A workload."""

    id: str


class Attach(One, frozen=True):
    """Streams to connect."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    logs: bool = False
    detach_keys: str = ""
    again: bool = False
    """An engine before this one was lost: connect to that run or none, say how it ended."""


class Resize(One, frozen=True):
    """A terminal's size."""

    rows: int
    columns: int


class Wait(One, frozen=True):
    """What to wait for."""

    condition: str = "not-running"


class Stop(One, frozen=True):
    """How to end it."""

    signal: str | None = None
    timeout_s: float | None = None


class Kill(One, frozen=True):
    """A signal."""

    signal: str = "SIGKILL"


class Remove(One, frozen=True):
    """How to remove."""

    force: bool = False
    volumes: bool = False
    link: bool = False


class Rename(One, frozen=True):
    """A new name."""

    name: str


class Update(One, frozen=True):
    """New limits."""

    body: body.UpdateBody


def _create(engine: Engine, params: Create) -> tuple[Workload, list[str]]:
    workload, warnings = creation.create(
        engine, params.name, params.body, params.boundary, params.kernel
    )
    engine.events.emit("container", "create", workload.id, attributes(workload))
    return workload, warnings


@METHODS.method("workload.create", Create)
async def create(engine: Engine, params: Create, call: Call) -> dict[str, Any]:
    """Docker's ContainerCreate."""
    workload, warnings = _create(engine, params)
    return {"Id": workload.id, "Warnings": warnings}


@METHODS.method("workload.start", One)
async def start(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Run it; {"NotModified": true} if it runs already."""
    workload = engine.workloads.find(params.id)
    try:
        started = await engine.lifecycle.start(workload)
    except BulkheadError:
        if workload.record.host.auto_remove and not workload.running:
            await engine.removal.remove(workload, force=False, volumes=True)
        raise
    engine.tend_networks()
    return {} if started else {"NotModified": True}


@METHODS.method("workload.run", Run)
async def run(engine: Engine, params: Run, call: Call) -> dict[str, Any]:
    """Create, start, attach and wait in one request."""
    streams = Streams(call, params.attach)
    try:
        keys = detach_keys(params.detach_keys)
        workload, warnings = _create(engine, params)
    except BaseException:
        streams.close()
        raise
    try:
        if not streams.any:
            await _start_announced(engine, workload, params, call, warnings)
            if params.detach:
                return {"Id": workload.id, "StatusCode": 0, "Reason": "detached"}
            await asyncio.shield(workload.ended)
            return _outcome(workload, "exited")
        stdin, stdout, stderr = streams.lend()
        async with engine.processes.keeper.attaching(
            workload.id, stdin=stdin, stdout=stdout, stderr=stderr, detach_keys=keys
        ) as attached:
            engine.events.emit("container", "attach", workload.id, attributes(workload))
            workload.attachment = attached
            await _start_announced(engine, workload, params, call, warnings)
            reason = await attached
        if reason == "detached":
            return {"Id": workload.id, "StatusCode": 0, "Reason": "detached"}
        await asyncio.shield(workload.ended)
        return _outcome(workload, "exited")
    finally:
        streams.close()
        engine.tend_networks()


def _outcome(workload: Workload, reason: str) -> dict[str, Any]:
    record = workload.record
    result: dict[str, Any] = {
        "Id": record.id, "StatusCode": record.exit_code, "Reason": reason,
    }  # fmt: skip
    error = record.error or record.oom_text
    if error:
        result["Error"] = error
    return result


async def _start_announced(
    engine: Engine, workload: Workload, params: Run, call: Call, warnings: list[str]
) -> None:
    """Start, and tell the client its id and that it has started.

    The id goes first: a client that sees output must be able to ask the next engine for it.
    """
    call.send({"Id": workload.id, "Warnings": warnings} if warnings else {"Id": workload.id})
    await _start_or_remove(engine, workload, params)
    call.send({"Started": True})


async def _start_or_remove(engine: Engine, workload: Workload, params: Run) -> None:
    """Start; a workload with --rm that cannot be started is gone again."""
    try:
        await engine.lifecycle.start(workload, Start(params.rows, params.columns))
    except BulkheadError as error:
        error.details.setdefault("Id", workload.id)
        error.details.setdefault("exit_code", launching.failure_code(error))
        if workload.record.host.auto_remove:
            engine.removal.forget(workload)
            await engine.removal.erase(workload)
        raise


@METHODS.method("workload.attach", Attach)
async def attach(engine: Engine, params: Attach, call: Call) -> dict[str, Any]:
    """Connect streams to a running workload, or to the next run of one that does not run."""
    departed = engine.removal.departed(params.id)
    if departed is not None:
        return {"Reason": "exited", **departed}
    workload = engine.workloads.find(params.id)
    if params.again and not workload.running:
        return {"Reason": "exited", **engine.control.outcome(workload.record)}
    if workload.record.status == "paused" and not params.again:
        raise Conflict(f"container {workload.id} is paused, unpause the container before attach")
    streams = Streams(call, (params.stdin, params.stdout, params.stderr))
    try:
        keys = detach_keys(params.detach_keys)
        engine.events.emit("container", "attach", workload.id, attributes(workload))
        reason = await streams.attach(engine, workload.id, keys, wait=not params.again)
    finally:
        streams.close()
    if reason == "detached":
        engine.events.emit("container", "detach", workload.id, attributes(workload))
        return {"Reason": reason}
    result = {"Reason": reason}
    if reason == "exited":
        await asyncio.shield(workload.ended)
        return {**result, "StatusCode": workload.record.exit_code}
    return result


@METHODS.method("workload.resize", Resize)
async def resize(engine: Engine, params: Resize, call: Call) -> dict[str, Any]:
    """Set the size of its terminal."""
    workload = engine.workloads.find(params.id)
    if not workload.running:
        raise Conflict(f"container {workload.id} is not running")
    await engine.processes.keeper.resize(workload.id, params.rows, params.columns)
    engine.events.emit(
        "container",
        "resize",
        workload.id,
        attributes(workload, height=params.rows, width=params.columns),
    )
    return {}


@METHODS.method("workload.wait", Wait)
async def wait(engine: Engine, params: Wait, call: Call) -> dict[str, Any]:
    """Wait for its end."""
    departed = engine.removal.departed(params.id)
    if departed is not None:
        return departed
    return await engine.control.wait(engine.workloads.find(params.id), params.condition)


@METHODS.method("workload.stop", Stop)
async def stop(engine: Engine, params: Stop, call: Call) -> dict[str, Any]:
    """End it; {"NotModified": true} if it has ended already."""
    workload = engine.workloads.find(params.id)
    stopped = await engine.control.stop(workload, params.signal or "", params.timeout_s)
    return {} if stopped else {"NotModified": True}


@METHODS.method("workload.kill", Kill)
async def kill(engine: Engine, params: Kill, call: Call) -> dict[str, Any]:
    """Send a signal."""
    await engine.control.kill(engine.workloads.find(params.id), params.signal)
    return {}


@METHODS.method("workload.restart", Stop)
async def restart(engine: Engine, params: Stop, call: Call) -> dict[str, Any]:
    """Stop and start."""
    workload = engine.workloads.find(params.id)
    task = engine.spawn(engine.control.restart(workload, params.signal or "", params.timeout_s))
    await engine.shielded(task)
    return {}


@METHODS.method("workload.pause", One)
async def pause(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Freeze every process."""
    await engine.control.pause(engine.workloads.find(params.id))
    return {}


@METHODS.method("workload.unpause", One)
async def unpause(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Thaw them."""
    await engine.control.unpause(engine.workloads.find(params.id))
    return {}


@METHODS.method("workload.remove", Remove)
async def remove(engine: Engine, params: Remove, call: Call) -> dict[str, Any]:
    """Remove it."""
    workload = engine.workloads.find(params.id)
    await engine.removal.remove(workload, force=params.force, volumes=params.volumes)
    return {}


@METHODS.method("workload.rename", Rename)
async def rename(engine: Engine, params: Rename, call: Call) -> dict[str, Any]:
    """Give it another name."""
    engine.control.rename(engine.workloads.find(params.id), params.name)
    return {}


@METHODS.method("workload.update", Update)
async def update(engine: Engine, params: Update, call: Call) -> dict[str, Any]:
    """Change limits, restart policy, published ports."""
    workload = engine.workloads.find(params.id)
    return {"Warnings": await engine.control.update(workload, params.body)}
