"""`/networks`."""

from typing import Any

import msgspec

from bulkhead.api.answers import NO_CONTENT, OK, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES
from bulkhead.engine.body import EndpointSettings, Part
from bulkhead.engine.rpc_network import ConfigReference, Create, Ipam
from bulkhead.errors import Invalid


class ConnectBody(Part):
    """The body of POST /networks/{id}/connect."""

    container: str = ""
    endpoint_config: EndpointSettings | None = None


class DisconnectBody(Part):
    """The body of POST /networks/{id}/disconnect."""

    container: str = ""
    force: bool = False


class CreateBody(msgspec.Struct):
    """The body of POST /networks/create."""

    Name: str = ""
    Driver: str = ""
    Scope: str = ""
    Internal: bool = False
    Attachable: bool = False
    Ingress: bool = False
    ConfigOnly: bool = False
    ConfigFrom: ConfigReference | None = None
    IPAM: Ipam | None = None
    EnableIPv4: bool | None = None
    EnableIPv6: bool | None = None
    Options: dict[str, str] | None = None
    Labels: dict[str, str] | None = None
    CheckDuplicate: bool | None = None


@ROUTES.add("GET", "/networks")
async def list_(x: Exchange) -> list[dict[str, Any]]:
    """All that match."""
    found: list[dict[str, Any]] = await x.call("network.list", {"filters": x.filters()})
    return found


@ROUTES.add("POST", "/networks/create")
async def create(x: Exchange) -> Reply:
    """A new one."""
    wanted = await x.json(CreateBody)
    if not wanted.Name.strip():
        raise Invalid("network name cannot be blank")
    known = {name: getattr(wanted, name) for name in Create.__struct_fields__}
    known["Driver"] = known["Driver"] or "bridge"
    return Reply(201, await x.call("network.create", known))


@ROUTES.add("POST", "/networks/prune")
async def prune(x: Exchange) -> dict[str, Any]:
    """Remove those of nobody."""
    found: dict[str, Any] = await x.call("network.prune", {"filters": x.filters()})
    return {"NetworksDeleted": found["NetworksDeleted"] or None}


@ROUTES.add("GET", "/networks/{id*}")
async def inspect(x: Exchange) -> dict[str, Any]:
    """All of it."""
    params = {"name": x.at["id"], "verbose": x.flag("verbose"), "scope": x.text("scope")}
    found: dict[str, Any] = await x.call("network.inspect", params)
    return found


@ROUTES.add("DELETE", "/networks/{id*}")
async def remove(x: Exchange) -> Reply:
    """Remove it."""
    await x.call("network.remove", {"name": x.at["id"]})
    return NO_CONTENT


@ROUTES.add("POST", "/networks/{id}/connect")
async def connect(x: Exchange) -> Reply:
    """Attach a container."""
    wanted = await x.json(ConnectBody)
    if not wanted.container:
        raise Invalid("invalid container name or ID: value is empty")
    params = {
        "network": x.at["id"], "container": wanted.container, "endpoint": wanted.endpoint_config,
    }  # fmt: skip
    await x.call("network.connect", params)
    return OK


@ROUTES.add("POST", "/networks/{id}/disconnect")
async def disconnect(x: Exchange) -> Reply:
    """Take a container off."""
    wanted = await x.json(DisconnectBody)
    if not wanted.container:
        raise Invalid("invalid container name or ID: value is empty")
    params = {"network": x.at["id"], "container": wanted.container, "force": wanted.force}
    await x.call("network.disconnect", params)
    return OK
