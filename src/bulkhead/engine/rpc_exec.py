"""RPC: further processes in running workloads (`exec.*`)."""

import asyncio
from typing import Any

from bulkhead.engine import body
from bulkhead.engine.attach import Streams, detach_keys
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.errors import Conflict, NotFound

METHODS = Table()

_ADOPTED_WITHIN = 200
"""Hundredths of a second until the keeper knows a process that runs."""


class Create(Params, frozen=True):
    """A new exec."""

    id: str
    body: body.ExecBody


class One(Params, frozen=True):
    """An exec."""

    id: str


class Start(One, frozen=True):
    """How to start it; `stdin`, `stdout`, `stderr` say which descriptors come along."""

    detach: bool = False
    tty: bool = False
    detach_keys: str = ""
    rows: int = 0
    columns: int = 0
    stdin: bool | None = None
    stdout: bool | None = None
    stderr: bool | None = None
    returns: bool = True
    """Whether the client attaches again should this engine be killed."""


class Resize(One, frozen=True):
    """A terminal's size."""

    rows: int
    columns: int


@METHODS.method("exec.create", Create)
async def create(engine: Engine, params: Create, call: Call) -> dict[str, Any]:
    """Docker's ContainerExec."""
    workload = engine.workloads.find(params.id)
    return {"Id": engine.execs.create(workload, params.body).id}


@METHODS.method("exec.start", Start)
async def start(engine: Engine, params: Start, call: Call) -> dict[str, Any]:
    """Run it, with the descriptors of the streams that its body attaches."""
    execution = engine.execs.find(params.id)
    request = execution.request
    rows, columns = params.rows, params.columns
    if not rows and request.console_size and len(request.console_size) == 2:
        rows, columns = request.console_size
    if params.detach:
        await engine.execs.start(execution, rows=rows, columns=columns)
        return {"Reason": "detached"}
    wanted = [
        request.attach_stdin if params.stdin is None else params.stdin,
        request.attach_stdout if params.stdout is None else params.stdout,
        (request.attach_stderr and len(call.fds) > 1) if params.stderr is None else params.stderr,
    ]
    streams = Streams(call, wanted)
    try:
        keys = detach_keys(params.detach_keys or request.detach_keys)
        stdin, stdout, stderr = streams.lend()
        async with engine.processes.keeper.attaching(
            execution.identity,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            detach_keys=keys,
            returns=params.returns,
        ) as attached:
            starting = engine.spawn(
                engine.execs.start(execution, rows=rows, columns=columns, stdin=wanted[0])
            )
            await engine.shielded(starting)
            reason = await attached
        if reason == "exited":
            code = await asyncio.shield(execution.ended)
            return {"Reason": reason, "ExitCode": code}
        return {"Reason": reason}
    finally:
        streams.close()


@METHODS.method("exec.inspect", One)
async def inspect(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Docker's ExecInspect."""
    return engine.execs.inspect(engine.execs.find(params.id))


@METHODS.method("exec.resize", Resize)
async def resize(engine: Engine, params: Resize, call: Call) -> dict[str, Any]:
    """Set the size of its terminal."""
    execution = engine.execs.find(params.id)
    if execution.state != "running":
        raise Conflict(f"exec {execution.id} is not running")
    for attempt in range(_ADOPTED_WITHIN):
        try:
            await engine.processes.keeper.resize(execution.identity, params.rows, params.columns)
            break
        except NotFound:  # the holder has launched it and is about to hand it to the keeper
            if execution.state != "running" or attempt == _ADOPTED_WITHIN - 1:
                raise
            await asyncio.sleep(0.01)
    return {}
