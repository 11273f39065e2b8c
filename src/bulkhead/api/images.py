"""`/images`: list, inspect, history, tag, remove, prune, search."""

import contextlib
from collections.abc import Iterator
from typing import Any

from bulkhead.api import shapes
from bulkhead.api.answers import CREATED, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.registry_auth import registry_auth
from bulkhead.api.routes import ROUTES
from bulkhead.errors import Invalid, NotFound


@ROUTES.add("GET", "/images/json")
async def list_(x: Exchange) -> list[dict[str, Any]]:
    """The images that are here."""
    filters = x.filters()
    if x.text("filter"):
        filters.setdefault("reference", [x.text("filter")])
    params = {"all": x.flag("all"), "filters": filters, "shared_size": x.flag("shared-size")}
    found: list[dict[str, Any]] = await x.call("image.list", params)
    return [shapes.image(one, x.version) for one in found]


@ROUTES.add("GET", "/images/search")
async def search(x: Exchange) -> list[dict[str, Any]]:
    """What a registry finds."""
    term = x.text("term")
    if not term:
        raise Invalid("invalid term: it is empty")
    params = {
        "term": term, "limit": x.number("limit") or 25, "filters": x.filters(),
        "auth": registry_auth(x),
    }  # fmt: skip
    found: list[dict[str, Any]] = await x.call("image.search", params)
    return found


@ROUTES.add("POST", "/images/prune")
async def prune(x: Exchange) -> dict[str, Any]:
    """Remove what nobody uses."""
    found: dict[str, Any] = await x.call("image.prune", {"filters": x.filters()})
    return {**found, "ImagesDeleted": found.get("ImagesDeleted") or None}


@contextlib.contextmanager
def _tagged(name: str) -> Iterator[None]:
    """Docker names a missing image with the tag that it looked for."""
    try:
        yield
    except NotFound as error:
        last = name.rpartition("/")[2]
        if error.message == f"No such image: {name}" and not {":", "@"} & set(last):
            raise NotFound(f"No such image: {name}:latest") from None
        raise


@ROUTES.add("GET", "/images/{name*}/json")
async def inspect(x: Exchange) -> dict[str, Any]:
    """All of it."""
    with _tagged(x.at["name"]):
        found: dict[str, Any] = await x.call("image.inspect", {"name": x.at["name"]})
    return shapes.image(found, x.version)


@ROUTES.add("GET", "/images/{name*}/history")
async def history(x: Exchange) -> list[dict[str, Any]]:
    """How it was made."""
    with _tagged(x.at["name"]):
        found: list[dict[str, Any]] = await x.call("image.history", {"name": x.at["name"]})
    return found


@ROUTES.add("POST", "/images/{name*}/tag")
async def tag(x: Exchange) -> Reply:
    """Give it a further name."""
    repository, label = x.text("repo"), x.text("tag")
    if not repository:
        raise Invalid("invalid reference format")
    target = f"{repository}:{label}" if label else repository
    with _tagged(x.at["name"]):
        await x.call("image.tag", {"source": x.at["name"], "target": target})
    return CREATED


@ROUTES.add("DELETE", "/images/{name*}")
async def remove(x: Exchange) -> list[dict[str, str]]:
    """Remove a name, and with its last one the image."""
    params = {"name": x.at["name"], "force": x.flag("force"), "noprune": x.flag("noprune")}
    with _tagged(x.at["name"]):
        found: list[dict[str, str]] = await x.call("image.remove", params)
    return found
