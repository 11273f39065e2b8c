"""The network's face towards the engine: networks, attached workloads, published ports.

All methods belong on one thread (the engine's loop) and make system calls of some tenths of a
millisecond. On the way of a launch nothing is waited for: namespaces wait in the lobby, and a
workload on the default bridge without ports costs one small file.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from bulkhead.errors import Conflict, Denied, Invalid, NotFound
from bulkhead.home import Home
from bulkhead.linux.fds import OwnedFd
from bulkhead.network import attached as shapes
from bulkhead.network import files, ports
from bulkhead.network.attached import Attached, Records
from bulkhead.network.bridges import Active, Bridges, Endpoint
from bulkhead.network.catalog import NO_FILTERS, Catalog, DocumentStore
from bulkhead.network.firewall import Redirect
from bulkhead.network.ipam import Interface, mac_for, parse_address
from bulkhead.network.lobby import Bare, Cable, Lobby, plug
from bulkhead.network.model import Attachment, AttachRequest, EndpointRequest
from bulkhead.network.ports import Published
from bulkhead.network.records import Network, check_mac

_NO_ENDPOINT = EndpointRequest()

# The class has a method called list.
_Shapes = list[dict[str, Any]]
_Names = list[str]
_Wanted = list[tuple[Network, EndpointRequest]]
_Redirects = list[Redirect]


class NetworkManager:
    """Everything about networks of one installation. See docs/network.md for the duties."""

    def __init__(self, home: Home, documents: DocumentStore) -> None:
        self._home = home
        self._catalog = Catalog(home, documents)
        self._bridges = Bridges(home, self._catalog.all)
        self._records = Records(home)
        self._lobby = Lobby()
        self._attached: dict[str, Attached] = {}
        self._namespaces: dict[str, OwnedFd] = {}
        self._pids: dict[str, int] = {}
        self._held: dict[str, list[Published]] = {}

    # -- networks

    def create(self, body: Mapping[str, Any]) -> str:
        """A new network from Docker's NetworkCreate body; its id."""
        network = self._catalog.create(body, self._bridges.choose4, self._bridges.choose6)
        return network.id

    def remove(self, ref: str) -> None:
        """Remove a network; Denied while a workload is attached."""
        if self._catalog.pseudo(ref):
            raise Denied(f"{ref} is a pre-defined network and cannot be removed")
        network = self._catalog.find(ref)
        if self._users(network):
            raise Denied(
                f"error while removing network: network {network.name} id {network.id} has "
                "active endpoints"
            )
        active = self._bridges.active.get(network.id)
        if active is not None:
            if network.default:
                raise Denied(f"{network.name} is a pre-defined network and cannot be removed")
            self._bridges.down(active)
        self._catalog.remove(network)

    def inspect(self, ref: str, verbose: bool = False) -> dict[str, Any]:
        """Docker's Network map, with the attached workloads."""
        del verbose
        found = self._catalog.pseudo(ref)
        if found is not None:
            return found
        return self._describe(self._catalog.find(ref))

    def list(self, filters: Mapping[str, Iterable[str]] = NO_FILTERS) -> _Shapes:
        """Docker's Network maps of what the filters let through."""
        chosen = self._catalog.select(filters, lambda one: bool(self._users(one)))
        return [one.describe() if isinstance(one, Network) else one for one in chosen]

    def prune(self, filters: Mapping[str, Iterable[str]] = NO_FILTERS) -> _Names:
        """Remove user-defined networks nobody uses; their names."""
        unused = self._catalog.select(
            {**filters, "dangling": ["true"]}, lambda n: bool(self._users(n))
        )
        removed = []
        for one in unused:
            if isinstance(one, Network):
                self.remove(one.id)
                removed.append(one.name)
        return removed

    def _users(self, network: Network) -> dict[str, Endpoint]:
        active = self._bridges.active.get(network.id)
        return active.endpoints if active else {}

    def _describe(self, network: Network) -> dict[str, Any]:
        shape = network.describe()
        for workload_id, endpoint in self._users(network).items():
            active = self._bridges.active[network.id]
            prefix = {version: pool.subnet.prefixlen for version, pool in active.pools.items()}
            shape["Containers"][workload_id] = {
                "Name": self._attached[workload_id].request.name,
                "EndpointID": endpoint.id,
                "MacAddress": endpoint.mac,
                "IPv4Address": f"{endpoint.ipv4}/{prefix[4]}" if endpoint.ipv4 else "",
                "IPv6Address": f"{endpoint.ipv6}/{prefix[6]}" if endpoint.ipv6 else "",
            }
        return shape

    # -- workloads

    def prepare(self, request: AttachRequest) -> Attachment:
        """Make ready what a launch needs; nothing of it stays if this fails.

        Errors: NotFound (network, container), Conflict (port, address), Invalid, Unsupported.
        """
        if request.workload_id in self._attached:
            raise Conflict(f"workload {request.workload_id} is attached to its networks already")
        mode = request.mode
        if mode in ("host", "none"):
            return self._prepare_simple(request, mode)
        if mode.startswith("container:"):
            return self._prepare_shared(request, mode.partition(":")[2])
        return self._prepare_bridged(request)

    def _prepare_simple(self, request: AttachRequest, kind: str) -> Attachment:
        made = Attached(request, kind)
        path = None
        if kind == "none":
            bare = self._lobby.take_bare()
            bare.netlink.close()
            self._namespaces[request.workload_id] = bare.netns
            path = f"/proc/self/fd/{bare.netns.fileno()}"
        self._attached[request.workload_id] = made
        self._records.write(made)
        return self._attachment(made, path)

    def _prepare_shared(self, request: AttachRequest, target: str) -> Attachment:
        if request.ports or request.publish_all:
            raise Invalid(
                "conflicting options: port publishing and the container type network mode"
            )
        pid = self._pids.get(target)
        if pid is None:
            raise Conflict(f"cannot join network of a non running container: {target}")
        made = Attached(request, "container", target=target)
        self._attached[request.workload_id] = made
        self._records.write(made)
        return self._attachment(made, f"/proc/{pid}/ns/net")

    def _prepare_bridged(self, request: AttachRequest) -> Attachment:
        wanted = self._wanted(request)
        made = Attached(request, "bridge")
        workload_id = request.workload_id
        with contextlib.ExitStack() as undo:
            bare = self._plug_all(made, wanted, undo)
            undo.callback(bare.close)
            self._attached[workload_id] = made
            undo.callback(self._attached.pop, workload_id)
            if request.ports or request.publish_all:
                self._publish(made, undo)
            self._records.write(made)
            undo.callback(self._records.remove, workload_id)
            self._namespaces[workload_id] = bare.netns
            undo.callback(self._namespaces.pop, workload_id)
            attachment = self._attachment(made, f"/proc/self/fd/{bare.netns.fileno()}")
            undo.pop_all()
        bare.netlink.close()
        return attachment

    def _wanted(self, request: AttachRequest) -> _Wanted:
        """The networks to attach and how, the mode's own first."""
        main = self._catalog.find(request.mode)
        chosen: dict[str, tuple[Network, EndpointRequest]] = {main.id: (main, _NO_ENDPOINT)}
        for ref, endpoint in request.endpoints.items():
            network = self._catalog.find(ref)
            chosen[network.id] = (network, endpoint)
        if request.mac and not chosen[main.id][1].mac:
            chosen[main.id] = (main, replace(chosen[main.id][1], mac=request.mac))
        return list(chosen.values())

    def _plug_all(
        self,
        made: Attached,
        wanted: _Wanted,
        undo: contextlib.ExitStack,
    ) -> Bare:
        """A namespace with an interface on each network; `made.endpoints` is filled."""
        workload_id = made.request.workload_id
        actives = [(self._up(network), endpoint) for network, endpoint in wanted]
        if len(wanted) == 1 and wanted[0][0].default and wanted[0][1] == _NO_ENDPOINT:
            waiting = self._lobby.take_wired()
            if waiting is not None:
                active = actives[0][0]
                endpoint = _endpoint(waiting.cable, active)
                active.endpoints[workload_id] = endpoint
                undo.callback(active.leave, workload_id)
                made.endpoints.append(endpoint)
                return waiting.bare
        bare = self._lobby.take_bare()
        undo.callback(bare.close)
        routes = _default_routes(actives)
        for number, (active, asked) in enumerate(actives):
            cable = self._plan(active, asked, f"{active.network.container_prefix}{number}")
            undo.callback(active.give, *(str(one.ip) for one in cable.addresses))
            gateways = tuple(
                active.gateway(version) for version, one in routes.items() if one is active
            )
            cable = replace(cable, gateways=gateways)
            plug(self._bridges.route, bare, cable)
            endpoint = _endpoint(cable, active, asked)
            active.endpoints[workload_id] = endpoint
            undo.callback(active.leave, workload_id)
            made.endpoints.append(endpoint)
        return bare

    def _up(self, network: Network) -> Active:
        """The network's bridge; the default network's subnet is chosen, or chosen anew, here."""
        active = self._bridges.active.get(network.id)
        if active is not None:
            return active
        if network.default and (network.ipv4 is None or self._bridges.collides(network)):
            network.ipv4 = self._bridges.choose4(network)
            self._catalog.keep(network)
        return self._bridges.up(network)

    def _plan(self, active: Active, asked: EndpointRequest, name: str) -> Cable:
        """Addresses, MAC and names of a new interface; the addresses are held from now on."""
        addresses: list[Interface] = []
        with contextlib.ExitStack() as undo:
            for version, pool in active.pools.items():
                text = asked.ipv4 if version == 4 else asked.ipv6
                if text:
                    address = parse_address(text, f"IPv{version} address")
                    pool.claim(address)
                else:
                    address = pool.take()
                undo.callback(pool.give, address)
                addresses.append(pool.interface(address))
            for version, text in ((4, asked.ipv4), (6, asked.ipv6)):
                if text and version not in active.pools:
                    raise Invalid(
                        f"network {active.network.name} has no IPv{version} subnet for {text}"
                    )
            mac = asked.mac or mac_for(addresses[0].ip)
            check_mac(mac)
            undo.pop_all()
        identity = os.urandom(32).hex()
        return Cable(
            endpoint=identity,
            host_name=f"bhv{identity[:12]}",
            name=name,
            mac=mac,
            addresses=tuple(addresses),
            gateways=(),
            mtu=active.mtu,
            bridge=active.index,
            isolated=not active.network.icc,
        )

    def _plan_default(self) -> Cable:
        """The plan of a wired namespace for the lobby."""
        active = self._bridges.active[self._catalog.default.id]
        cable = self._plan(active, _NO_ENDPOINT, f"{active.network.container_prefix}0")
        gateways = tuple(str(pool.gateway) for pool in active.pools.values())
        return replace(cable, gateways=gateways)

    def _spare(self, cable: Cable) -> None:
        """Give back the addresses of a cable that nobody will use."""
        active = self._bridges.active.get(self._catalog.default.id)
        if active is not None:
            active.give(*(str(one.ip) for one in cable.addresses))

    def _publish(self, made: Attached, undo: contextlib.ExitStack) -> None:
        """Bind the ports and redirect them; undone by `undo`."""
        request = made.request
        active = self._publishing(made)
        wanted = ports.wishes(
            request.ports,
            request.exposed,
            publish_all=request.publish_all,
            default_address=active.network.host_binding,
        )
        taken = ports.take(wanted)
        for one in taken:
            if one.held is not None:
                undo.callback(one.held.close)
        made.ports = shapes.port_records(taken)
        redirects = self._redirects(made)
        self._bridges.publish(redirects)
        if redirects:
            undo.callback(self._bridges.firewall.unpublish, self._bridges.filter, redirects)
        self._held[request.workload_id] = taken
        undo.callback(self._held.pop, request.workload_id)

    def _publishing(self, made: Attached) -> Active:
        """The network whose address published ports lead to: the one with the default route."""
        actives = [(self._bridges.active[e.network], e.request) for e in made.endpoints]
        routes = _default_routes(actives)
        if not routes:
            raise Invalid(
                f"container {made.request.name}: ports cannot be published from internal networks"
            )
        return routes.get(4) or routes[6]

    def _redirects(self, made: Attached) -> _Redirects:
        """What the firewall must do for the published ports."""
        if not made.ports:
            return []
        actives = [(self._bridges.active[e.network], e.request) for e in made.endpoints]
        routes = _default_routes(actives)
        target = {}
        for version, active in routes.items():
            endpoint = active.endpoints[made.request.workload_id]
            target[version] = endpoint.ipv4 if version == 4 else endpoint.ipv6
        found = []
        for one in made.ports:
            version = 6 if ":" in one.address else 4
            address = target.get(version)
            if address:
                everywhere = one.address in ("0.0.0.0", "::")
                place = "" if everywhere else one.address
                found.append(Redirect(one.protocol, place, one.host_port, address, one.port))
        return found

    def _attachment(self, made: Attached, path: str | None) -> Attachment:
        request = made.request
        hostname = request.hostname
        if not hostname and made.kind != "host":
            hostname = request.workload_id[:12]
        return Attachment(
            netns_path=path,
            settings=self.settings(request.workload_id),
            hosts=self._hosts(made),
            resolv_conf=self._resolv_conf(made),
            hostname=hostname,
        )

    def _hosts(self, made: Attached) -> str:
        if made.kind == "container":
            return self._hosts(self._attached[made.target])
        gateways = [
            gateway
            for endpoint in made.endpoints[:1]
            for version in (4, 6)
            if (gateway := self._bridges.active[endpoint.network].gateway(version))
        ]
        if made.kind == "host":
            gateways = ["127.0.0.1"]
        return shapes.hosts_file(made, gateways)

    def _resolv_conf(self, made: Attached) -> str:
        if made.kind == "container":
            return self._resolv_conf(self._attached[made.target])
        request = made.request
        host = files.host_resolution()
        search = request.dns_search or host.search
        options = request.dns_options or host.options
        servers = request.dns or host.servers
        if made.kind == "bridge" and not request.dns:
            servers = tuple(one for one in servers if not files.is_loopback(one))
        return files.resolv_conf(servers, search, options, ours=False)

    def started(self, workload_id: str, pid: int) -> None:
        """The workload runs: its process keeps the namespace from now on."""
        if workload_id not in self._attached:
            raise NotFound(f"workload {workload_id} is not attached to any network")
        self._pids[workload_id] = pid
        held = self._namespaces.pop(workload_id, None)
        if held is not None:
            held.close()

    def release(self, workload_id: str) -> None:
        """The workload has ended, or never started: give everything back. Idempotent."""
        made = self._attached.pop(workload_id, None)
        if made is None:
            return
        self._pids.pop(workload_id, None)
        held = self._namespaces.pop(workload_id, None)
        if held is not None:
            held.close()
        with contextlib.ExitStack() as all_of_it:
            all_of_it.callback(self._records.remove, workload_id)
            for endpoint in made.endpoints:
                active = self._bridges.active.get(endpoint.network)
                if active is not None:
                    all_of_it.callback(active.leave, workload_id)
            if made.ports:
                all_of_it.callback(self._unpublish, made)

    def _unpublish(self, made: Attached) -> None:
        for one in self._held.pop(made.request.workload_id, ()):
            if one.held is not None:
                one.held.close()
        redirects = self._redirects(made)
        made.ports = []
        if redirects:
            self._bridges.firewall.unpublish(self._bridges.filter, redirects)

    def settings(self, workload_id: str) -> dict[str, Any]:
        """Docker's NetworkSettings; the empty shape for what is not attached."""
        shape = shapes.empty_settings()
        made = self._attached.get(workload_id)
        if made is None:
            return shape
        shape["SandboxID"] = workload_id
        pid = self._pids.get(workload_id)
        shape["SandboxKey"] = f"/proc/{pid}/ns/net" if pid else ""
        if made.kind in ("host", "none"):
            identity = self._catalog.pseudo_id(made.kind)
            shape["Networks"][made.kind] = {"NetworkID": identity, "EndpointID": "", "Gateway": ""}
            return shape
        shape["Ports"] = shapes.port_map(made)
        for endpoint in made.endpoints:
            active = self._bridges.active[endpoint.network]
            one = shapes.endpoint_settings(made, endpoint, active)
            shape["Networks"][active.network.name] = one
            if active.network.default:
                shape.update({key: one[key] for key in shape if key in one})
        return shape

    # -- duties

    def refill(self) -> float | None:
        """What can wait until nobody waits. Never blocks long.

        Returns after how many seconds it wants to be called again, None if not at all.
        """
        default = self._bridges.active.get(self._catalog.default.id)
        if self._lobby.filling:
            return 0.01
        if default is not None and self._bridges.is_idle(default):
            self._lobby.unwire(self._spare)
            default = None
        wait = self._bridges.sweep()
        self._bridges.recheck_docker()
        cable: Callable[[], Cable] | None = self._plan_default if default is not None else None
        self._lobby.fill(cable, self._spare)
        return wait

    def close(self) -> None:
        """The engine ends: the lobby empties; what live workloads use stays, nothing else does."""
        self._lobby.close(self._spare)
        for held in self._namespaces.values():
            held.close()
        self._namespaces.clear()
        for active in list(self._bridges.active.values()):
            if not active.endpoints:
                self._bridges.down(active)
        for taken in self._held.values():
            for one in taken:
                if one.held is not None:
                    one.held.close()
        self._held.clear()
        self._bridges.close()


def _endpoint(cable: Cable, active: Active, asked: EndpointRequest = _NO_ENDPOINT) -> Endpoint:
    addresses = {one.version: str(one.ip) for one in cable.addresses}
    return Endpoint(
        id=cable.endpoint,
        network=active.network.id,
        name=cable.name,
        host_name=cable.host_name,
        mac=cable.mac,
        ipv4=addresses.get(4, ""),
        ipv6=addresses.get(6, ""),
        request=asked,
    )


def _default_routes(actives: list[tuple[Active, EndpointRequest]]) -> dict[int, Active]:
    """Which network gives the default route of each version: highest priority, then by name."""
    ordered = sorted(actives, key=lambda one: (-one[1].priority, one[0].network.name))
    routes: dict[int, Active] = {}
    for active, _ in ordered:
        if active.network.internal:
            continue
        for version in active.pools:
            routes.setdefault(version, active)
    return routes
