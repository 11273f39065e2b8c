"""`/containers`: create, list, inspect and what acts on one."""

import shlex
from typing import Any

from bulkhead.api import shapes
from bulkhead.api.answers import NO_CONTENT, NOT_MODIFIED, OK, Failed, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.engine import body
from bulkhead.errors import BulkheadError, Conflict, Invalid, NotFound


@ROUTES.add("GET", "/containers/json")
async def list_(x: Exchange) -> list[dict[str, Any]]:
    """The list, newest first."""
    limit = x.number("limit") or 0
    params = {
        "all": x.flag("all"), "limit": max(limit, 0), "size": x.flag("size"),
        "filters": x.filters(),
    }  # fmt: skip
    found: list[dict[str, Any]] = await x.call("workload.list", params)
    return [shapes.summary(one, x.version) for one in found]


@ROUTES.add("POST", "/containers/create")
async def create(x: Exchange) -> Reply:
    """A new one."""
    request = await x.json(body.CreateBody)
    platform = x.text("platform")
    if platform:
        request.platform = platform
    if not request.image:
        raise Invalid("config cannot be empty in order to create a container")
    mode = request.host_config.network_mode if request.host_config else ""
    if mode == "default" and request.host_config is not None:
        request.host_config.network_mode = "bridge"
    try:
        made = await x.call("workload.create", {"body": request, "name": x.text("name")})
    except NotFound as error:
        # 404 means that the image is missing: clients pull it then, and try again.
        status = 404 if error.message.startswith("No such image") else 400
        raise Failed(status, error.message) from None
    return Reply(201, {"Id": made["Id"], "Warnings": made["Warnings"] or []})


@ROUTES.add("POST", "/containers/prune")
async def prune(x: Exchange) -> dict[str, Any]:
    """Remove what has ended."""
    found: dict[str, Any] = await x.call("workload.prune", {"filters": x.filters()})
    return {**found, "ContainersDeleted": found["ContainersDeleted"] or None}


@ROUTES.add("GET", "/containers/{id}/json")
async def inspect(x: Exchange) -> dict[str, Any]:
    """All of it."""
    found = await x.call("workload.inspect", {"id": x.at["id"], "size": x.flag("size")})
    return shapes.container(found, x.version)


@ROUTES.add("GET", "/containers/{id}/top")
async def top(x: Exchange) -> dict[str, Any]:
    """Its processes."""
    found: dict[str, Any] = await x.call(
        "workload.top", {"id": x.at["id"], "ps_args": x.text("ps_args")}
    )
    return found


@ROUTES.add("GET", "/containers/{id}/changes")
async def changes(x: Exchange) -> list[dict[str, Any]] | None:
    """What its writable layer changes; null for nothing, as ever."""
    return await x.call("workload.changes", {"id": x.at["id"]}) or None


@ROUTES.add("POST", "/containers/{id}/start")
async def start(x: Exchange) -> Reply:
    """Run it."""
    answer = await x.call("workload.start", {"id": x.at["id"]})
    return NOT_MODIFIED if answer.get("NotModified") else NO_CONTENT


def _stop(x: Exchange) -> dict[str, Any]:
    return {"id": x.at["id"], "signal": x.text("signal") or None, "timeout_s": x.number("t")}


@ROUTES.add("POST", "/containers/{id}/stop")
async def stop(x: Exchange) -> Reply:
    """End it."""
    answer = await x.call("workload.stop", _stop(x))
    return NOT_MODIFIED if answer.get("NotModified") else NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/restart")
async def restart(x: Exchange) -> Reply:
    """Stop and start."""
    await x.call("workload.restart", _stop(x))
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/kill")
async def kill(x: Exchange) -> Reply:
    """Send a signal."""
    await x.call("workload.kill", {"id": x.at["id"], "signal": x.text("signal") or "SIGKILL"})
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/pause")
async def pause(x: Exchange) -> Reply:
    """Freeze it."""
    await x.call("workload.pause", {"id": x.at["id"]})
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/unpause")
async def unpause(x: Exchange) -> Reply:
    """Thaw it."""
    await x.call("workload.unpause", {"id": x.at["id"]})
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/rename")
async def rename(x: Exchange) -> Reply:
    """Give it another name."""
    name = x.text("name")
    if not name:
        raise Invalid("Neither old nor new names may be empty")
    await x.call("workload.rename", {"id": x.at["id"], "name": name})
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/update")
async def update(x: Exchange) -> dict[str, Any]:
    """Change its limits."""
    wanted = await x.json(body.UpdateBody)
    found: dict[str, Any] = await x.call("workload.update", {"id": x.at["id"], "body": wanted})
    return found


def _size(x: Exchange) -> tuple[int, int]:
    rows, columns = x.number("h"), x.number("w")
    if rows is None or columns is None:
        raise Invalid('invalid resize: strconv.ParseUint: parsing "": invalid syntax')
    if not 0 <= rows < 1 << 16 or not 0 <= columns < 1 << 16:
        raise Invalid(f"invalid resize: {rows}x{columns} is no terminal's size")
    return rows, columns


@ROUTES.add("POST", "/containers/{id}/resize")
async def resize(x: Exchange) -> Reply:
    """Set its terminal's size."""
    rows, columns = _size(x)
    await x.call("workload.resize", {"id": x.at["id"], "rows": rows, "columns": columns})
    return OK


@ROUTES.add("POST", "/exec/{id}/resize")
async def resize_exec(x: Exchange) -> Reply:
    """Set an exec's terminal's size."""
    rows, columns = _size(x)
    await x.call("exec.resize", {"id": x.at["id"], "rows": rows, "columns": columns})
    return OK


@ROUTES.add("DELETE", "/containers/{id}")
async def remove(x: Exchange) -> Reply:
    """Remove it."""
    if x.flag("link"):
        raise Conflict(f"Could not get parent for {x.at['id']}: links of containers have no names")
    params = {"id": x.at["id"], "force": x.flag("force"), "volumes": x.flag("v")}
    await x.call("workload.remove", params)
    return NO_CONTENT


@ROUTES.add("POST", "/containers/{id}/wait")
async def wait(x: Exchange) -> object:
    """Its exit code; the head goes out at once, so that the client may start it then."""
    condition = x.text("condition") or "not-running"
    if condition not in {"not-running", "next-exit", "removed"}:
        raise Invalid(f'invalid condition: "{condition}"')
    params = {"id": x.at["id"], "condition": condition}
    if x.engine.removal.departed(x.at["id"]) is None:
        params["id"] = x.engine.workloads.find(x.at["id"]).id
    stream = x.begin()
    try:
        outcome = await x.call("workload.wait", params)
    except BulkheadError as error:
        outcome = {"StatusCode": 125, "Error": {"Message": error.message}}
    stream.write(Reply(200, outcome).body)
    stream.end()
    return SENT


@ROUTES.add("POST", "/commit")
async def commit(x: Exchange) -> Reply:
    """An image of its changes; the body is a container's configuration, laid over its own."""
    container = x.text("container")
    if not container:
        raise NotFound("No such container: ")
    config = await x.json(body.Config)
    params = {
        "id": container,
        "repo": x.text("repo"),
        "tag": x.text("tag"),
        "comment": x.text("comment"),
        "author": x.text("author"),
        "pause": x.flag("pause", default=True),
        "changes": (*config_changes(config), *x.query.get("changes", ())),
    }
    made: dict[str, Any] = await x.call("workload.commit", params)
    return Reply(201, made)


def config_changes(config: body.Config) -> list[str]:
    """A configuration as Dockerfile instructions."""
    import json

    found: list[str] = []
    for name, value in (("CMD", config.cmd), ("ENTRYPOINT", config.entrypoint)):
        if value:
            found.append(f"{name} {json.dumps([value] if isinstance(value, str) else value)}")
    for entry in config.env or ():
        name, _, value = entry.partition("=")
        found.append(f"ENV {name}={json.dumps(value)}")
    for key, value in (config.labels or {}).items():
        found.append(f"LABEL {json.dumps(key)}={json.dumps(value)}")
    found += [f"EXPOSE {port}" for port in config.exposed_ports or ()]
    found += [f"VOLUME {json.dumps([path])}" for path in config.volumes or ()]
    if config.user:
        found.append(f"USER {config.user}")
    if config.working_dir:
        found.append(f"WORKDIR {config.working_dir}")
    if config.stop_signal:
        found.append(f"STOPSIGNAL {config.stop_signal}")
    return found


def words(text: str) -> list[str]:
    """A command line's words; Invalid if its quotes do not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Invalid(str(error)) from None
