"""RPC: what registries say (`image.distribution`, `image.search`), and boundaries' reports."""

from typing import Any

import msgspec

from bulkhead.engine import filters as filtering
from bulkhead.engine.calls import Call, Nothing, Params, Table
from bulkhead.engine.core import Engine

METHODS = Table()
_SEARCH = frozenset({"is-official", "is-automated", "stars"})


class Distribution(Params, frozen=True):
    """An image at a registry."""

    name: str
    auth: dict[str, Any] | None = None


class Search(Params, frozen=True):
    """What to find."""

    term: str
    limit: int = 25
    filters: dict[str, Any] | None = None
    auth: dict[str, Any] | None = None


@METHODS.method("image.distribution", Distribution)
async def distribution(engine: Engine, params: Distribution, call: Call) -> dict[str, Any]:
    """Docker's DistributionInspect; nothing is pulled."""
    return await engine.blocking(lambda: engine.images.distribution(params.name, params.auth))


@METHODS.method("image.search", Search)
async def search(engine: Engine, params: Search, call: Call) -> list[dict[str, Any]]:
    """Docker's ImageSearch."""
    wanted = filtering.normalise(params.filters, _SEARCH)
    return await engine.blocking(
        lambda: engine.images.search(params.term, params.limit, wanted, params.auth)
    )


@METHODS.method("system.boundaries", Nothing)
async def boundaries(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """Every boundary's report on this host."""
    reports = [engine.boundary(name).probe for name in engine.boundary_names()]
    found = [await engine.blocking(probe) for probe in reports]
    return [
        {
            "Name": one.name,
            "Usable": one.usable,
            "Missing": msgspec.to_builtins(list(one.missing)),
            "Optional": sorted(one.optional),
            "Facts": dict(one.facts),
        }
        for one in found
    ]
