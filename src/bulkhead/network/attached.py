"""What is known of one attached workload, on file and in Docker's shapes.

    <run>/network/workloads/ID.json     request, endpoints, published ports (`Attached`)
    <run>/network/workloads/ID.pid      "PID STARTTIME" once it runs, if network/helper.py serves it

The engine writes both, reads the first when it starts again; the helper reads both when it does.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from bulkhead.home import Home
from bulkhead.network import files
from bulkhead.network.bridges import Active, Endpoint
from bulkhead.network.firewall import Redirect
from bulkhead.network.inner import ADDRESS, GUEST_ADDRESS
from bulkhead.network.model import AttachRequest, EndpointRequest, parse_port
from bulkhead.network.ports import Published

Sockets = list[tuple[str, socket.socket]]
"""Sockets for the helper, each with its role."""


class PortRecord(msgspec.Struct, frozen=True):
    """A published port on file."""

    protocol: str
    port: int
    address: str
    host_port: int

    @property
    def role(self) -> str:
        """Its name towards network/helper.py."""
        return f"{self.protocol} {self.address} {self.host_port}"


class Attached(msgspec.Struct):
    """An attached workload; `kind` is none, host, container or bridge."""

    request: AttachRequest
    kind: str
    endpoints: list[Endpoint] = []
    ports: list[PortRecord] = []
    target: str = ""
    """Of kind container: whose namespace."""
    resolver_ports: list[int] = []
    """(UDP, TCP) ports on 127.0.0.11 if it asks our resolver."""
    servers: list[str] = []
    """Where the resolver sends what it does not know; none: to the host's."""
    forward: bool = True
    """False if it is on internal networks only: its questions then stay inside too."""
    publishing: dict[str, str] = {}
    """IP version -> the address that published ports lead to."""
    default_routes: dict[str, str] = {}
    """IP version -> the network that gives the default route."""

    @property
    def served(self) -> bool:
        """Whether network/helper.py has to do with it."""
        return bool(self.resolver_ports or self.ports)


class Records:
    """The files of attached workloads."""

    def __init__(self, home: Home) -> None:
        self._directory = home.in_run("network", "workloads")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._with_pid = {
            name.removesuffix(".pid")
            for name in os.listdir(self._directory)
            if name.endswith(".pid")
        }

    def _path(self, workload_id: str, suffix: str) -> str:
        return f"{self._directory}/{workload_id}.{suffix}"

    def write_first(self, attached: Attached) -> None:
        """Keep it for the first time: nobody reads it before the workload has started."""
        path = self._path(attached.request.workload_id, "json")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            # From a launch that was cut off.
            self.write(attached)
            return
        try:
            os.write(fd, msgspec.json.encode(attached))
        finally:
            os.close(fd)

    def write(self, attached: Attached) -> None:
        """Keep it; what was kept before is replaced in one step."""
        path = self._path(attached.request.workload_id, "json")
        data = msgspec.json.encode(attached)
        # A name of its own costs a rename, but a reader never sees half a file.
        temporary = path + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        os.rename(temporary, path)

    def write_pid(self, workload_id: str, pid: int) -> None:
        """Say in which process's namespace the workload is."""
        path = self._path(workload_id, "pid")
        self._with_pid.add(workload_id)
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(f"{pid} {start_time(pid)}")
        os.rename(path + ".new", path)

    def read(self, workload_id: str) -> Attached | None:
        """What was kept, None if nothing readable."""
        try:
            with open(self._path(workload_id, "json"), "rb") as file:
                return msgspec.json.decode(file.read(), type=Attached)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def remove(self, workload_id: str) -> None:
        """Forget it; nothing there is fine."""
        for suffix in ("json", "pid") if workload_id in self._with_pid else ("json",):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(workload_id, suffix))
        self._with_pid.discard(workload_id)

    def known(self) -> set[str]:
        """The ids of workloads with a file of any kind."""
        return {name.split(".", 1)[0] for name in os.listdir(self._directory)}

    def sweep(self, keep: set[str]) -> None:
        """Remove the files of all workloads but `keep`."""
        for name in os.listdir(self._directory):
            if name.split(".", 1)[0] not in keep or name.endswith(".new"):
                os.unlink(f"{self._directory}/{name}")


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: tells it from a later one of that pid.

    proc_pid_stat(5); FileNotFoundError or ProcessLookupError if it is gone.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def dns_names(request: AttachRequest, asked: EndpointRequest) -> list[str]:
    """The names by which others on a user-defined network find the workload."""
    wanted = [request.name, *asked.aliases, request.workload_id[:12]]
    if request.hostname:
        wanted.append(request.hostname)
    return list(dict.fromkeys(one for one in wanted if one))


def port_map(attached: Attached) -> dict[str, list[dict[str, str]] | None]:
    """Docker's NetworkSettings.Ports."""
    made: dict[str, list[dict[str, str]] | None] = {}
    for text in attached.request.exposed:
        made[text if "/" in text else f"{text}/tcp"] = None
    for one in attached.ports:
        entry = {"HostIp": one.address, "HostPort": str(one.host_port)}
        listed = made.setdefault(f"{one.port}/{one.protocol}", None)
        if listed is None:
            made[f"{one.port}/{one.protocol}"] = [entry]
        else:
            listed.append(entry)
    return made


def endpoint_settings(endpoint: Endpoint, active: Active) -> dict[str, Any]:
    """Docker's EndpointSettings."""
    asked = endpoint.request
    pools = active.pools
    internal = active.network.internal
    ipam = None
    if asked.ipv4 or asked.ipv6 or asked.link_local:
        ipam = {}
        if asked.ipv4:
            ipam["IPv4Address"] = asked.ipv4
        if asked.ipv6:
            ipam["IPv6Address"] = asked.ipv6
    return {
        "IPAMConfig": ipam,
        "Links": list(asked.links) or None,
        "Aliases": list(asked.aliases) or None,
        "MacAddress": endpoint.mac,
        "DriverOpts": dict(asked.options) or None,
        "GwPriority": asked.priority,
        "NetworkID": endpoint.network,
        "EndpointID": endpoint.id,
        "Gateway": "" if internal else active.gateway(4),
        "IPAddress": endpoint.ipv4,
        "IPPrefixLen": pools[4].subnet.prefixlen if endpoint.ipv4 else 0,
        "IPv6Gateway": "" if internal else active.gateway(6),
        "GlobalIPv6Address": endpoint.ipv6,
        "GlobalIPv6PrefixLen": pools[6].subnet.prefixlen if endpoint.ipv6 else 0,
        "DNSNames": None if active.network.default else endpoint.names,
    }


def empty_settings() -> dict[str, Any]:
    """Docker's NetworkSettings of a workload that does not run."""
    return {
        "Bridge": "", "SandboxID": "", "SandboxKey": "", "Ports": {}, "HairpinMode": False,
        "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0, "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None, "EndpointID": "", "Gateway": "",
        "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "IPAddress": "", "IPPrefixLen": 0,
        "IPv6Gateway": "", "MacAddress": "", "Networks": {},
    }  # fmt: skip


def hosts_file(attached: Attached, gateways: list[str]) -> str:
    """The content of /etc/hosts."""
    request = attached.request
    extra = []
    for text in request.extra_hosts:
        extra += files.parse_extra_host(text, gateways)
    hostname = request.hostname or request.workload_id[:12]
    if request.domainname:
        hostname = f"{hostname}.{request.domainname} {hostname}"
    own = []
    for endpoint in attached.endpoints:
        own += [(address, hostname) for address in (endpoint.ipv4, endpoint.ipv6) if address]
    return files.hosts(extra, own, ipv6=True)


def port_records(published: list[Published]) -> list[PortRecord]:
    """As they are kept on file."""
    return [PortRecord(one.protocol, one.port, one.address, one.host_port) for one in published]


def redirects(attached: Attached) -> list[Redirect]:
    """What the firewall must do for the published ports; the helper does the rest."""
    found = []
    for one in attached.ports:
        address = attached.publishing.get("6" if ":" in one.address else "4")
        if address:
            place = "" if one.address in ("0.0.0.0", "::") else one.address
            found.append(Redirect(one.protocol, place, one.host_port, address, one.port))
    return found


def keep_ports(attached: Attached, wanted: AttachRequest) -> tuple[list[PortRecord], AttachRequest]:
    """The records of ports that are held already and `wanted` now, and the request for the others.

    A held port of the host that is wanted for another port of the workload has a new record.
    """
    left = list(attached.ports)
    kept: list[PortRecord] = []
    missing: dict[str, tuple[Mapping[str, str], ...]] = {}
    for text, bindings in wanted.ports.items():
        port, protocol = parse_port(text)
        rest = []
        for binding in bindings or ({},):
            found = [
                one
                for one in left
                if one.protocol == protocol
                and _same_port(binding.get("HostPort", ""), one, port)
                and _same_place(binding.get("HostIp", ""), one.address)
            ]
            if not found:
                rest.append(binding)
                continue
            # One binding without an address holds a port of each family.
            chosen = [one for one in found if one.host_port == found[0].host_port]
            kept += [msgspec.structs.replace(one, port=port) for one in chosen]
            left = [one for one in left if one not in chosen]
        if rest:
            missing[text] = tuple(rest)
    return kept, replace(wanted, ports=missing)


def _same_port(asked: str, held: PortRecord, port: int) -> bool:
    if asked in ("", "0"):
        return held.port == port
    return asked == str(held.host_port)


def _same_place(asked: str, address: str) -> bool:
    return asked == address or (not asked and address in ("0.0.0.0", "::"))


def resolv_conf(attached: Attached) -> str:
    """The content of /etc/resolv.conf."""
    request = attached.request
    host = files.host_resolution()
    search = request.dns_search or host.search
    options = request.dns_options or host.options
    if attached.resolver_ports:
        server = GUEST_ADDRESS if request.guest else ADDRESS
        return files.resolv_conf([server], search, options, ours=True)
    servers = request.dns or host.servers
    if attached.kind == "bridge" and not request.dns:
        servers = tuple(one for one in servers if not files.is_loopback(one))
    return files.resolv_conf(servers, search, options, ours=False)


def pseudo_endpoint(network_id: str) -> dict[str, Any]:
    """Docker's EndpointSettings on "host" and "none"."""
    return {
        "IPAMConfig": None, "Links": None, "Aliases": None, "MacAddress": "", "DriverOpts": None,
        "GwPriority": 0, "NetworkID": network_id, "EndpointID": "", "Gateway": "",
        "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "", "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0, "DNSNames": None,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cables:
    """Names of interfaces by the network's id, and by IP version what the default route is:
    interface and gateway.
    """

    names: dict[str, str]
    gateways: dict[int, tuple[str, str]]


def cables(made: Attached, active: Mapping[str, Active]) -> Cables:
    """Of a workload on bridges."""
    names = {one.network: one.name for one in made.endpoints}
    gateways = {
        int(version): (names[network], active[network].gateway(int(version)))
        for version, network in made.default_routes.items()
    }
    return Cables(names, gateways)


def close_all(sockets: Sockets) -> None:
    """Close sockets with their roles."""
    for _, one in sockets:
        one.close()
