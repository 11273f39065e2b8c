"""`/containers/{id}/exec` and `/exec`: further processes in running containers."""

from typing import Any

from bulkhead.api.answers import OK, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.api.streams import Session, kind_of, report_failure
from bulkhead.engine import body
from bulkhead.engine.body import Part
from bulkhead.errors import BulkheadError, Conflict


class StartBody(Part):
    """The body of POST /exec/{id}/start."""

    detach: bool = False
    tty: bool = False
    console_size: list[int] | None = None


@ROUTES.add("POST", "/containers/{id}/exec")
async def create(x: Exchange) -> Reply:
    """A new exec."""
    request = await x.json(body.ExecBody)
    if x.engine.workloads.find(x.at["id"]).record.status == "paused":
        raise Conflict(f"Container {x.at['id']} is paused, unpause the container before exec")
    return Reply(201, await x.call("exec.create", {"id": x.at["id"], "body": request}))


@ROUTES.add("GET", "/exec/{id}/json")
async def inspect(x: Exchange) -> dict[str, Any]:
    """What it is and how it ended."""
    found: dict[str, Any] = await x.call("exec.inspect", {"id": x.at["id"]})
    return found


@ROUTES.add("POST", "/exec/{id}/start")
async def start(x: Exchange) -> object:
    """Run it: detached, or with its streams on this connection; a hijack."""
    execution = x.engine.execs.find(x.at["id"])
    wanted = await x.json(StartBody)
    request = execution.request
    size = wanted.console_size or request.console_size or []
    rows, columns = size if len(size) == 2 else (0, 0)
    workload = execution.workload
    if not workload.running:
        raise Conflict(f"Container {workload.id} is not running")
    if workload.record.status == "paused":
        raise Conflict(f"Container {workload.id} is paused, unpause the container before exec")
    if execution.state != "created":
        word = "running" if execution.state == "running" else "run"
        raise Conflict(f"Error: Exec command {execution.id} has already {word}")
    params: dict[str, Any] = {"id": execution.id, "rows": rows, "columns": columns}
    if wanted.detach:
        await x.call("exec.start", {**params, "detach": True})
        return OK
    stdin, stdout = request.attach_stdin, request.attach_stdout
    stderr = request.attach_stderr and not request.tty
    session = Session(x, raw=request.tty, stdin=stdin, stdout=stdout, stderr=stderr)
    params |= {"stdin": stdin, "stdout": stdout, "stderr": stderr, "returns": False}
    complete = False
    try:
        stream = x.hijack(kind_of(x, terminal=request.tty))
        session.start(stream)
        try:
            await x.call("exec.start", params, session.give())
        except BulkheadError as error:
            await x.connection.head_taken()
            report_failure(stream, error, terminal=request.tty)
        complete = True
    finally:
        await session.finish(complete=complete)
    return SENT
