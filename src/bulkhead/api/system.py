"""`/_ping`, `/version`, `/info`, `/events`, `/system/df`, `/auth`, `/distribution`."""

import contextlib
from typing import Any

from bulkhead.api.answers import Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.registry_auth import registry_auth
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.engine import filters
from bulkhead.engine.rpc_system import EVENT_FILTERS
from bulkhead.errors import Invalid

_PING = {
    "Builder-Version": "1",
    "Swarm": "inactive",
    "Cache-Control": "no-cache, no-store, must-revalidate",
    "Pragma": "no-cache",
}
"""Builder 1 is the classic one: clients without a builder of their own use `/build`."""
DF_TYPES = frozenset({"container", "image", "volume", "build-cache"})


@ROUTES.add("GET", "/_ping")
@ROUTES.add("HEAD", "/_ping")
async def ping(x: Exchange) -> Reply:
    """That we are here, and which versions we speak."""
    from bulkhead.api.service import MAXIMUM

    headers = {**_PING, "Api-Version": "{}.{}".format(*MAXIMUM)}
    return Reply(200, text=b"OK", headers=headers, kind="text/plain; charset=utf-8")


@ROUTES.add("GET", "/version")
async def version(x: Exchange) -> dict[str, Any]:
    """Docker's SystemVersion."""
    found: dict[str, Any] = await x.call("system.version")
    return found


@ROUTES.add("GET", "/info")
async def info(x: Exchange) -> dict[str, Any]:
    """Docker's SystemInfo."""
    found: dict[str, Any] = await x.call("system.info")
    return found


@ROUTES.add("GET", "/events")
async def events(x: Exchange) -> object:
    """A stream of events; its head is sent at once."""
    wanted = filters.normalise(x.filters(), EVENT_FILTERS)
    since, until = filters.moment_ns(x.text("since")), filters.moment_ns(x.text("until"))
    stream = x.begin()
    async with contextlib.aclosing(x.engine.events.stream(since, until, wanted)) as found:
        async for event in found:
            stream.write(Reply(200, event).body)
            await stream.drained()
    stream.end()
    return SENT


@ROUTES.add("GET", "/system/df")
async def df(x: Exchange) -> dict[str, Any]:
    """Docker's disk usage, or the types asked for."""
    wanted = set(x.query.get("type", ()))
    if wanted - DF_TYPES:
        raise Invalid(f"unknown object type: {sorted(wanted - DF_TYPES)[0]}")
    found: dict[str, Any] = await x.call("system.df")
    if x.version < (1, 44):
        for image in found.get("Images") or ():
            image["VirtualSize"] = image["Size"]
    if not wanted:
        return found
    members = {
        "container": ("Containers",), "image": ("Images", "LayersSize"), "volume": ("Volumes",),
        "build-cache": ("BuildCache",),
    }  # fmt: skip
    keep = {name for kind in wanted for name in members[kind]}
    return {name: value for name, value in found.items() if name in keep}


@ROUTES.add("POST", "/auth")
async def auth(x: Exchange) -> dict[str, Any]:
    """Whether a registry accepts credentials."""
    given = await x.json_object()
    wanted = {name.lower(): value for name, value in given.items()}
    known = {
        name: wanted[name]
        for name in ("username", "password", "serveraddress", "identitytoken", "registrytoken")
        if isinstance(wanted.get(name), str) and wanted[name]
    }
    found: dict[str, Any] = await x.call("image.login", {"auth": known})
    return found


@ROUTES.add("GET", "/distribution/{name*}/json")
async def distribution(x: Exchange) -> dict[str, Any]:
    """An image's descriptor and platforms, as its registry says."""
    found: dict[str, Any] = await x.call(
        "image.distribution", {"name": x.at["name"], "auth": registry_auth(x)}
    )
    return found
