"""`/volumes`."""

from typing import Any

import msgspec

from bulkhead.api.absent import NO_MANAGER
from bulkhead.api.answers import NO_CONTENT, Failed, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES
from bulkhead.errors import BulkheadError


class CreateBody(msgspec.Struct):
    """The body of POST /volumes/create."""

    Name: str = ""
    Driver: str = "local"
    DriverOpts: dict[str, str] | None = None
    Labels: dict[str, str] | None = None
    ClusterVolumeSpec: dict[str, Any] | None = None


@ROUTES.add("GET", "/volumes")
async def list_(x: Exchange) -> dict[str, Any]:
    """All that match."""
    found: dict[str, Any] = await x.call("volume.list", {"filters": x.filters()})
    return found


@ROUTES.add("POST", "/volumes/create")
async def create(x: Exchange) -> Reply:
    """A new one, or the one that is called so."""
    wanted = await x.json(CreateBody)
    if wanted.ClusterVolumeSpec:
        raise Failed(503, NO_MANAGER)
    params = {
        "Name": wanted.Name, "Driver": wanted.Driver or "local", "DriverOpts": wanted.DriverOpts,
        "Labels": wanted.Labels,
    }  # fmt: skip
    try:
        made = await x.call("volume.create", params)
    except BulkheadError as error:
        if error.message.startswith("error looking up volume plugin"):
            error.message = f"create {wanted.Name}: {error.message}"
        raise
    return Reply(201, made)


@ROUTES.add("POST", "/volumes/prune")
async def prune(x: Exchange) -> dict[str, Any]:
    """Remove those that nobody uses; before 1.42 named ones too."""
    filters = x.filters()
    if x.version < (1, 42):
        filters.setdefault("all", ["true"])
    found: dict[str, Any] = await x.call("volume.prune", {"filters": filters})
    return {**found, "VolumesDeleted": found["VolumesDeleted"] or None}


@ROUTES.add("GET", "/volumes/{name}")
async def inspect(x: Exchange) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = await x.call("volume.inspect", {"name": x.at["name"]})
    return found


@ROUTES.add("PUT", "/volumes/{name}")
async def update(x: Exchange) -> Reply:
    """Only volumes of a cluster can be updated."""
    raise Failed(503, _NO_SWARM)


@ROUTES.add("DELETE", "/volumes/{name}")
async def remove(x: Exchange) -> Reply:
    """Remove it and its files."""
    await x.call("volume.remove", {"name": x.at["name"], "force": x.flag("force")})
    return NO_CONTENT


_NO_SWARM = "volume update only valid for cluster volumes, but swarm is unavailable"
