"""RPC: volumes (`volume.*`)."""

from typing import Any

from bulkhead.engine import filters
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine

METHODS = Table()
_LIST = frozenset({"dangling", "driver", "label", "name"})
_PRUNE = frozenset({"all", "label", "label!"})


class Create(Params, frozen=True):
    """Docker's VolumeCreate body."""

    Name: str = ""
    Driver: str = "local"
    DriverOpts: dict[str, str] | None = None
    Labels: dict[str, str] | None = None


class One(Params, frozen=True):
    """A volume."""

    name: str
    force: bool = False


class Filters(Params, frozen=True):
    """Which volumes."""

    filters: dict[str, Any] | None = None


@METHODS.method("volume.create", Create)
async def create(engine: Engine, params: Create, call: Call) -> dict[str, Any]:
    """Make it, or return the one that exists."""
    volume = engine.volumes.create(
        params.Name, driver=params.Driver, labels=params.Labels, driver_opts=params.DriverOpts
    )
    if engine.volumes.is_disk(volume.name):
        await engine.blocking(lambda: engine.volumes.image(volume.name))
    engine.events.emit("volume", "create", volume.name, {"driver": "local"})
    return engine.volumes.inspect(volume.name)


@METHODS.method("volume.inspect", One)
async def inspect(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Docker's Volume."""
    return engine.volumes.inspect(params.name)


@METHODS.method("volume.list", Filters)
async def list_(engine: Engine, params: Filters, call: Call) -> dict[str, Any]:
    """Docker's VolumeListResponse."""
    wanted = filters.normalise(params.filters, _LIST)
    found = engine.volumes.summaries(wanted, lambda name: len(engine.volume_users(name)))
    return {"Volumes": found, "Warnings": None}


@METHODS.method("volume.remove", One)
async def remove(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Remove it and its files."""
    left = engine.volumes.remove(params.name, engine.volume_users(params.name), force=params.force)
    if left is not None:
        engine.events.emit("volume", "destroy", params.name, {"driver": "local"})
        await engine.blocking(lambda: engine.volumes.remove_tree(left))
    return {}


@METHODS.method("volume.prune", Filters)
async def prune(engine: Engine, params: Filters, call: Call) -> dict[str, Any]:
    """Remove the anonymous volumes that nobody uses; with filter all=true, named ones too."""
    wanted = filters.normalise(params.filters, _PRUNE)
    names = engine.volumes.prunable(wanted, lambda name: len(engine.volume_users(name)))
    freed = 0
    for name in names:
        size = await engine.blocking(lambda name=name: engine.volumes.usage(name))  # type: ignore[misc]
        left = engine.volumes.remove(name, ())
        if left is not None:
            await engine.blocking(lambda left=left: engine.volumes.remove_tree(left))  # type: ignore[misc]
        freed += size
        engine.events.emit("volume", "destroy", name, {"driver": "local"})
    engine.events.emit("volume", "prune", "", {"reclaimed": str(freed)})
    return {"VolumesDeleted": names, "SpaceReclaimed": freed}
