"""What the rest of the project asks of the network, and what it gets back.

A workload is attached in three calls: `NetworkManager.prepare(AttachRequest)` before its launch,
`started(id, pid)` after it, `release(id)` when it has ended. Everything here is plain data that
`msgspec.json` can write and read again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from bulkhead.errors import Invalid


@dataclass(frozen=True, slots=True)
class EndpointRequest:
    """What a workload wants of one network; the names of Docker's EndpointSettings."""

    ipv4: str = ""
    ipv6: str = ""
    link_local: tuple[str, ...] = ()
    mac: str = ""
    aliases: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    """GwPriority: the network with the highest one gives the default route."""

    @classmethod
    def from_docker(cls, body: Mapping[str, Any] | None) -> Self:
        """From an EndpointSettings map of the Engine API; unknown members are ignored."""
        body = body or {}
        ipam = body.get("IPAMConfig") or {}
        return cls(
            ipv4=ipam.get("IPv4Address") or "",
            ipv6=ipam.get("IPv6Address") or "",
            link_local=tuple(ipam.get("LinkLocalIPs") or ()),
            mac=body.get("MacAddress") or "",
            aliases=tuple(body.get("Aliases") or ()),
            links=tuple(body.get("Links") or ()),
            options=dict(body.get("DriverOpts") or {}),
            priority=int(body.get("GwPriority") or 0),
        )


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """Everything the network must know to start one workload.

    `mode` is "none", "host", "container:FULL-WORKLOAD-ID", "bridge" (also "default" and "") or the
    name or id of a user-defined network. `endpoints` maps network names or ids to what is wanted
    of them; the mode's own network is always attached, listed or not. `ports` and `exposed` have
    Docker's shapes: {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]} and ("80/tcp", …).
    """

    workload_id: str
    name: str
    """Without a leading slash."""
    mode: str = "bridge"
    endpoints: Mapping[str, EndpointRequest] = field(default_factory=dict)
    ports: Mapping[str, tuple[Mapping[str, str], ...]] = field(default_factory=dict)
    exposed: tuple[str, ...] = ()
    publish_all: bool = False
    hostname: str = ""
    domainname: str = ""
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    extra_hosts: tuple[str, ...] = ()
    mac: str = ""
    guest: bool = False
    """A virtual machine's: network/tap.py will turn the namespace into a guest's."""
    heir: str = ""
    """The workload whose addresses it takes over; its cables wait (network/handover.py)."""
    confined: bool = False
    """It shares nothing with others and may not change its network (see network/reuse.py)."""

    @classmethod
    def from_docker(
        cls, workload_id: str, name: str, body: Mapping[str, Any], *, mode: str | None = None
    ) -> Self:
        """From the body of Docker's ContainerCreate (Config members, HostConfig, NetworkingConfig).

        `mode` overrides HostConfig.NetworkMode, which the caller uses to replace the name in
        "container:NAME" by the full id.
        """
        host = body.get("HostConfig") or {}
        wanted = (body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
        return cls(
            workload_id=workload_id,
            name=name.lstrip("/"),
            mode=mode if mode is not None else (host.get("NetworkMode") or "bridge"),
            endpoints={ref: EndpointRequest.from_docker(one) for ref, one in wanted.items()},
            ports=bindings_from_docker(host.get("PortBindings")),
            exposed=tuple(body.get("ExposedPorts") or ()),
            publish_all=bool(host.get("PublishAllPorts")),
            hostname=body.get("Hostname") or "",
            domainname=body.get("Domainname") or "",
            dns=tuple(host.get("Dns") or host.get("DNS") or ()),
            dns_search=tuple(host.get("DnsSearch") or ()),
            dns_options=tuple(host.get("DnsOptions") or ()),
            extra_hosts=tuple(host.get("ExtraHosts") or ()),
            mac=body.get("MacAddress") or "",
        )


@dataclass(slots=True)
class Attachment:
    """What a launch needs from the network.

    `netns_path` can be opened by this process until `started` or `release` is called for the
    workload (a path below /proc/self/fd or /proc/PID/ns); None means the host's own namespace.
    `settings` is Docker's NetworkSettings map. `hosts` and `resolv_conf` are the contents of the
    two files in /etc; `hostname` is the name for the UTS namespace and /etc/hostname ("" in host
    mode unless one was asked for: the host's own name is used).
    """

    netns_path: str | None
    settings: dict[str, Any]
    hosts: str
    resolv_conf: str
    hostname: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor()`: status is "ok", "warn" or "missing"."""

    check: str
    status: str
    detail: str
    remedy: str = ""


def bindings_from_docker(
    bindings: Mapping[str, Sequence[Mapping[str, Any]] | None] | None,
) -> dict[str, tuple[Mapping[str, str], ...]]:
    """HostConfig.PortBindings as `AttachRequest.ports`; a port without bindings gets a free one."""
    made: dict[str, tuple[Mapping[str, str], ...]] = {}
    for port, wanted in (bindings or {}).items():
        listed: Sequence[Mapping[str, Any]] = wanted or ({},)
        made[port] = tuple(
            {"HostIp": str(one.get("HostIp") or ""), "HostPort": str(one.get("HostPort") or "")}
            for one in listed
        )
    return made


def parse_port(text: str) -> tuple[int, str]:
    """(port, protocol) of "80/tcp" or "80"; Invalid if not tcp or udp, or out of range."""
    number, _, protocol = text.partition("/")
    protocol = (protocol or "tcp").lower()
    if protocol == "sctp":
        raise Invalid(f"publishing {text}: SCTP ports cannot be published, only tcp and udp")
    if protocol not in {"tcp", "udp"}:
        raise Invalid(f"invalid proto: {protocol}")
    if not number.isascii() or not number.isdigit() or not 0 < int(number) < 65536:
        raise Invalid(f"invalid container port: {text}: must be a number from 1 to 65535")
    return int(number), protocol
