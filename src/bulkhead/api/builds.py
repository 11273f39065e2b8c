"""`/build` and `/build/prune`: the classic builder."""

from typing import Any

from bulkhead.api import buildkit
from bulkhead.api.answers import Failed
from bulkhead.api.exchange import Exchange, Item, with_upload
from bulkhead.api.registry_auth import registry_config
from bulkhead.api.routes import ROUTES
from bulkhead.api.transfers import progress


def _available(x: Exchange, method: str) -> None:
    if method not in x.methods:
        raise Failed(501, "this engine does not build images")


@ROUTES.add("POST", "/build")
async def build(x: Exchange) -> object:
    """Build an image of the context in the body."""
    buildkit.refuse(x)
    _available(x, "build.run")
    from bulkhead.build import classic

    params: dict[str, Any] = classic.parameters(x.query, registry_config(x))

    quiet = x.flag("q")

    async def work(item: Item) -> Any:
        def shown(message: Any) -> None:
            if not quiet or "aux" in message:
                item(message)

        made = await with_upload(x, lambda file: x.call("build.run", params, [file], shown))
        if quiet:
            item({"stream": f"{made['Id']}\n"})

    return await progress(x, work)


@ROUTES.add("POST", "/build/prune")
async def prune(x: Exchange) -> dict[str, Any]:
    """Empty the build cache."""
    params = {"filters": x.filters(), "all": x.flag("all"), "keep": x.number("keep-storage") or 0}
    if "build.prune" not in x.methods:
        return {"CachesDeleted": None, "SpaceReclaimed": 0}
    found: dict[str, Any] = await x.call("build.prune", params)
    return found
