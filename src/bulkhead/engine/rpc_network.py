"""RPC: networks (`network.*`)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from bulkhead.engine import body, filters, guests, launching
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.records import Workload
from bulkhead.errors import Conflict, Denied, Invalid, NotFound, Unsupported
from bulkhead.network.model import EndpointRequest

METHODS = Table()
_LIST = frozenset({"dangling", "driver", "id", "label", "name", "scope", "type"})
_PRUNE = frozenset({"label", "label!", "until"})


class IpamConfig(Params, frozen=True, omit_defaults=True):
    """A subnet."""

    Subnet: str = ""
    IPRange: str = ""
    Gateway: str = ""
    AuxiliaryAddresses: dict[str, str] | None = None
    AuxAddress: dict[str, str] | None = None


class Ipam(Params, frozen=True, omit_defaults=True):
    """Where a network's addresses come from."""

    Driver: str = ""
    Config: list[IpamConfig] | None = None
    Options: dict[str, str] | None = None


class ConfigReference(Params, frozen=True):
    """The network whose configuration is taken."""

    Network: str = ""


class Create(Params, frozen=True):
    """Docker's NetworkCreate body."""

    Name: str
    Driver: str = "bridge"
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


class One(Params, frozen=True):
    """A network."""

    name: str
    verbose: bool = False
    scope: str = ""


class Filters(Params, frozen=True):
    """Which networks."""

    filters: dict[str, Any] | None = None


class Connect(Params, frozen=True):
    """A workload and a network."""

    network: str
    container: str
    endpoint: body.EndpointSettings | None = None


class Disconnect(Params, frozen=True):
    """A workload and a network."""

    network: str
    container: str
    force: bool = False


@METHODS.method("network.create", Create)
async def create(engine: Engine, params: Create, call: Call) -> dict[str, Any]:
    """Docker's NetworkCreate."""
    if params.ConfigFrom is not None and params.ConfigFrom.Network:
        raise Unsupported(f"network {params.Name}: ConfigFrom is not supported")
    wanted = {
        name: msgspec.to_builtins(value)
        for name in Create.__struct_fields__
        if (value := getattr(params, name)) is not None
        and name not in {"CheckDuplicate", "ConfigFrom"}
    }
    identity = engine.networks.create(wanted)
    engine.events.emit("network", "create", identity, {"name": params.Name, "type": "bridge"})
    return {"Id": identity, "Warning": ""}


@METHODS.method("network.inspect", One)
async def inspect(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Docker's Network."""
    return engine.networks.inspect(params.name)


@METHODS.method("network.list", Filters)
async def list_(engine: Engine, params: Filters, call: Call) -> list[dict[str, Any]]:
    """Docker's list of networks."""
    return engine.networks.list(filters.normalise(params.filters, _LIST))


@METHODS.method("network.remove", One)
async def remove(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Remove it."""
    found = engine.networks.inspect(params.name)
    engine.networks.remove(params.name)
    engine.tend_networks()
    engine.events.emit(
        "network", "destroy", found["Id"], {"name": found["Name"], "type": found["Driver"]}
    )
    return {}


def _known(engine: Engine, workload: Workload, found: dict[str, Any]) -> str | None:
    """The key under which a workload remembers this network."""
    for key in workload.record.networks:
        if key in {found["Name"], found["Id"]}:
            return key
    return None


@METHODS.method("network.connect", Connect)
async def connect(engine: Engine, params: Connect, call: Call) -> dict[str, Any]:
    """Attach a workload to one more network, at once if it runs."""
    workload = engine.workloads.find(params.container)
    found = engine.networks.inspect(params.network)
    record = workload.record
    if record.host.network_mode in {"host"} or found["Driver"] in {"host", "null"}:
        raise Denied(
            "container cannot be disconnected from host network or connected to host network"
        )
    if record.host.network_mode == "none":
        raise Invalid(
            "container cannot be connected to multiple networks with one of the networks in "
            "private (none) mode"
        )
    if record.host.network_mode.startswith("container:"):
        raise Conflict(
            "container sharing network namespace with another container or host cannot be "
            "connected to any other network"
        )
    if _known(engine, workload, found) is not None:
        raise Denied(f"endpoint with name {record.name} already exists in network {found['Name']}")
    settings = params.endpoint or body.EndpointSettings()
    async with workload.lock:
        if workload.running:
            with _following_files(engine, workload):
                if guests.is_guest(record):
                    request = _request(settings)
                    await guests.networks().connect(engine, workload, found["Name"], request)
                else:
                    engine.networks.connect(record.id, found["Name"], _request(settings))
            if guests.is_guest(record):
                await guests.networks().follow(engine, workload)
            await engine.processes.sync_helpers()
            engine.tend_networks()
        record.networks[found["Name"]] = settings
        engine.workloads.save(workload)
    _emit(engine, "connect", workload, found)
    return {}


@contextlib.contextmanager
def _following_files(engine: Engine, workload: Workload) -> Iterator[None]:
    """What is changed inside is seen in the running workload's settings and files of /etc."""
    before = engine.networks.files(workload.id)
    yield
    after = engine.networks.files(workload.id)
    workload.settings = engine.networks.settings(workload.id)
    shared = f"container:{workload.id}"
    for other in engine.workloads:
        if other is workload or (other.running and other.record.host.network_mode == shared):
            launching.rewrite_files(engine, other.record, before, after)


def _request(settings: body.EndpointSettings) -> EndpointRequest:
    ipam = settings.ipam_config or body.EndpointIpam()
    return EndpointRequest(
        ipv4=ipam.ipv4_address,
        ipv6=ipam.ipv6_address,
        link_local=tuple(ipam.link_local_ips or ()),
        mac=settings.mac_address,
        aliases=tuple(settings.aliases or ()),
        links=tuple(settings.links or ()),
        options=settings.driver_opts or {},
        priority=settings.gw_priority,
    )


@METHODS.method("network.disconnect", Disconnect)
async def disconnect(engine: Engine, params: Disconnect, call: Call) -> dict[str, Any]:
    """Take a workload off a network."""
    found = engine.networks.inspect(params.network)
    workload = engine.workloads.find(params.container)
    record = workload.record
    key = _known(engine, workload, found)
    if key is None:
        if params.force:
            return {}
        raise NotFound(f"container {record.id} is not connected to network {found['Name']}")
    async with workload.lock:
        if workload.running:
            with _following_files(engine, workload):
                if guests.is_guest(record):
                    await guests.networks().disconnect(engine, workload, found["Name"])
                else:
                    engine.networks.disconnect(record.id, found["Name"])
            if guests.is_guest(record):
                await guests.networks().follow(engine, workload)
            await engine.processes.sync_helpers()
            engine.tend_networks()
        del record.networks[key]
        if record.host.network_mode in {found["Name"], found["Id"]}:
            record.host.network_mode = next(iter(record.networks), record.host.network_mode)
        engine.workloads.save(workload)
    _emit(engine, "disconnect", workload, found)
    return {}


def _emit(engine: Engine, action: str, workload: Workload, found: dict[str, Any]) -> None:
    engine.events.emit(
        "network",
        action,
        found["Id"],
        {"container": workload.id, "name": found["Name"], "type": found["Driver"]},
    )


@METHODS.method("network.prune", Filters)
async def prune(engine: Engine, params: Filters, call: Call) -> dict[str, Any]:
    """Remove the networks of nobody."""
    wanted = filters.normalise(params.filters, _PRUNE)
    ids = {one["Name"]: one["Id"] for one in engine.networks.list()}
    removed = engine.networks.prune(wanted)
    engine.tend_networks()
    for name in removed:
        engine.events.emit("network", "destroy", ids[name], {"name": name, "type": "bridge"})
    engine.events.emit("network", "prune", "", {"reclaimed": "0"})
    return {"NetworksDeleted": removed}
