"""Cables between workloads and bridges: which networks, which addresses, which default route."""

import contextlib
import errno
import os
from dataclasses import replace

from bulkhead.errors import Invalid
from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.netlink import Netlink, NetlinkError
from bulkhead.network import attached as shapes
from bulkhead.network.attached import Attached
from bulkhead.network.bridges import Active, Bridges, Endpoint
from bulkhead.network.catalog import Catalog
from bulkhead.network.ipam import Interface, mac_for, parse_address
from bulkhead.network.lobby import Bare, Cable, Lobby, plug
from bulkhead.network.model import AttachRequest, EndpointRequest
from bulkhead.network.records import Network, check_mac

NO_ENDPOINT = EndpointRequest()
Wanted = list[tuple[Network, EndpointRequest]]


class Wiring:
    """Plans and plugs; knows the lobby."""

    def __init__(self, catalog: Catalog, bridges: Bridges, lobby: Lobby) -> None:
        self._catalog = catalog
        self._bridges = bridges
        self._lobby = lobby

    def wanted(self, request: AttachRequest) -> Wanted:
        """The networks to attach and how, the mode's own first."""
        main = self._catalog.find(request.mode)
        chosen: dict[str, tuple[Network, EndpointRequest]] = {main.id: (main, NO_ENDPOINT)}
        for ref, endpoint in request.endpoints.items():
            network = self._catalog.find(ref)
            if network.default and endpoint.aliases:
                raise Invalid("network-scoped aliases are only supported for user-defined networks")
            chosen[network.id] = (network, endpoint)
        if request.mac and not chosen[main.id][1].mac:
            chosen[main.id] = (main, replace(chosen[main.id][1], mac=request.mac))
        return list(chosen.values())

    def plug_all(
        self,
        made: Attached,
        wanted: Wanted,
        undo: contextlib.ExitStack,
    ) -> Bare:
        """A namespace with an interface on each network; `made.endpoints` is filled."""
        actives = [(self.up(network), endpoint) for network, endpoint in wanted]
        routes = default_routes(actives)
        made.default_routes = {str(version): one.network.id for version, one in routes.items()}
        if len(wanted) == 1 and wanted[0][0].default and wanted[0][1] == NO_ENDPOINT:
            waiting = self._lobby.take_wired()
            if waiting is not None:
                undo.callback(waiting.bare.close)
                self._join(made, waiting.cable, actives[0][0], NO_ENDPOINT, undo)
                return waiting.bare
        bare = self._lobby.take_bare()
        undo.callback(bare.close)
        for number, (active, asked) in enumerate(actives):
            cable = self.plan(active, asked, f"{active.network.container_prefix}{number}")
            undo.callback(active.give, *(str(one.ip) for one in cable.addresses))
            gateways = tuple(
                active.gateway(version) for version, one in routes.items() if one is active
            )
            cable = replace(cable, gateways=gateways)
            if made.request.heir:
                cable = replace(cable, bridge=0)
            plug(self._bridges.route, bare, cable)
            self._join(made, cable, active, asked, undo)
        return bare

    def _join(
        self,
        made: Attached,
        cable: Cable,
        active: Active,
        asked: EndpointRequest,
        undo: contextlib.ExitStack,
    ) -> None:
        """Write down that the workload is on the network by that cable."""
        workload_id = made.request.workload_id
        addresses = {one.version: str(one.ip) for one in cable.addresses}
        named = not active.network.default
        endpoint = Endpoint(
            id=cable.endpoint,
            network=active.network.id,
            name=cable.name,
            host_name=cable.host_name,
            mac=cable.mac,
            ipv4=addresses.get(4, ""),
            ipv6=addresses.get(6, ""),
            names=shapes.dns_names(made.request, asked) if named else [],
            network_name=active.network.name,
            request=asked,
        )
        active.endpoints[workload_id] = endpoint
        undo.callback(active.leave, workload_id)
        made.endpoints.append(endpoint)
        undo.callback(made.endpoints.remove, endpoint)

    def plug_live(
        self, made: Attached, network: Network, asked: EndpointRequest, namespace: int
    ) -> None:
        """One more interface in the namespace of a running workload."""
        active = self.up(network)
        taken = {one.name for one in made.endpoints}
        prefix = network.container_prefix
        first = int(made.request.guest)  # whose first card stays when its network goes
        number = next(n for n in range(first, len(taken) + 2) if f"{prefix}{n}" not in taken)
        with contextlib.ExitStack() as undo:
            cable = self.plan(active, asked, f"{prefix}{number}")
            undo.callback(active.give, *(str(one.ip) for one in cable.addresses))
            with netns.inside(namespace, rt.connect) as inner, OwnedFd(os.dup(namespace)) as fd:
                plug(self._bridges.route, Bare(fd, inner), cable)
                undo.callback(self._unplug, cable.host_name)
                self._join(made, cable, active, asked, undo)
                self._reroute(made, inner)
            undo.pop_all()

    def unplug_live(self, made: Attached, endpoint: Endpoint, namespace: int) -> None:
        """Take an interface from a running workload."""
        self._unplug(endpoint.host_name)
        self._bridges.active[endpoint.network].leave(made.request.workload_id)
        made.endpoints.remove(endpoint)
        with netns.inside(namespace, rt.connect) as inner:
            self._reroute(made, inner)

    def unplug(self, endpoint: Endpoint) -> None:
        """Remove an interface together with its other end; one that is gone is fine."""
        self._unplug(endpoint.host_name)

    def _unplug(self, host_name: str) -> None:
        try:
            self._bridges.route.transact([rt.delete_link(name=host_name)])
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    def actives(self, made: Attached) -> list[tuple[Active, EndpointRequest]]:
        """The networks a workload is on."""
        return [(self._bridges.active[one.network], one.request) for one in made.endpoints]

    def _reroute(self, made: Attached, inner: Netlink) -> None:
        """Let the default routes be those that follow from the networks now."""
        routes = default_routes(self.actives(made))
        by_network = {one.network: one for one in made.endpoints}
        for version in (4, 6):
            active = routes.get(version)
            now = active.network.id if active else ""
            before = made.default_routes.get(str(version), "")
            if now == before or made.request.guest:
                continue  # a guest has its routes inside
            if before in by_network:
                old = rt.link(inner, by_network[before].name).index
                inner.transact([rt.delete_default_route(old, version)])
            if active is not None:
                index = rt.link(inner, by_network[now].name).index
                inner.transact([rt.add_route(gateway=active.gateway(version), index=index)])
        made.default_routes = {str(version): one.network.id for version, one in routes.items()}

    def up(self, network: Network) -> Active:
        """The network's bridge; the default network's subnet is chosen, or chosen anew, here."""
        active = self._bridges.active.get(network.id)
        if active is not None:
            return active
        if network.default and (network.ipv4 is None or self._bridges.collides(network)):
            network.ipv4 = self._bridges.choose4(network)
            self._catalog.keep(network)
        return self._bridges.up(network)

    def plan(self, active: Active, asked: EndpointRequest, name: str) -> Cable:
        """Addresses, MAC and names of a new interface; the addresses are held from now on."""
        addresses: list[Interface] = []
        with contextlib.ExitStack() as undo:
            for version, pool in active.pools.items():
                text = asked.ipv4 if version == 4 else asked.ipv6
                if text:
                    address = parse_address(text, f"IPv{version} address")
                    active.claim(str(address))
                else:
                    address = pool.take()
                undo.callback(active.give, str(address))
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

    def plan_default(self) -> Cable:
        """The plan of a wired namespace for the lobby."""
        active = self._bridges.active[self._catalog.default.id]
        cable = self.plan(active, NO_ENDPOINT, f"{active.network.container_prefix}0")
        gateways = tuple(str(pool.gateway) for pool in active.pools.values())
        return replace(cable, gateways=gateways)

    def spare(self, cable: Cable) -> None:
        """Give back the addresses of a cable that nobody will use."""
        active = self._bridges.active.get(self._catalog.default.id)
        if active is not None:
            active.give(*(str(one.ip) for one in cable.addresses))


def default_routes(actives: list[tuple[Active, EndpointRequest]]) -> dict[int, Active]:
    """Which network gives the default route of each version: highest priority, then by name."""
    ordered = sorted(actives, key=lambda one: (-one[1].priority, one[0].network.name))
    routes: dict[int, Active] = {}
    for active, _ in ordered:
        if active.network.internal:
            continue
        for version in active.pools:
            routes.setdefault(version, active)
    return routes
