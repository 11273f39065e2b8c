"""Bridges that are up: the link, its gateway addresses, its part of the firewall, its addresses.

A bridge exists while workloads use it and a moment longer; the last one takes the nftables table
and the changed host settings with it.
"""

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address

from bulkhead.errors import Conflict, Unavailable, Unsupported
from bulkhead.home import Home
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.netlink import NetlinkError
from bulkhead.network import host, ipam
from bulkhead.network.firewall import Firewall, Redirect, Rules, forget_flows, open_docker_user
from bulkhead.network.ipam import Pool, Prefix, mac_for
from bulkhead.network.model import EndpointRequest
from bulkhead.network.records import Network, Subnet

DEFAULT_MTU = 1500
IDLE_S = 2.0
"""How long a bridge stays after its last workload, so that one run after the other is quick."""
DOCKER_EACH_S = 10.0
"""How often it is looked whether a Docker has started beside us: its firewall then wants rules."""


@dataclass(slots=True)
class Endpoint:
    """One workload on one network."""

    id: str
    network: str
    name: str
    host_name: str
    mac: str
    ipv4: str = ""
    ipv6: str = ""
    names: list[str] = field(default_factory=list)
    network_name: str = ""
    request: EndpointRequest = field(default_factory=EndpointRequest)


@dataclass(slots=True)
class Active:
    """A network whose bridge is up."""

    network: Network
    index: int
    mtu: int
    pools: dict[int, Pool]
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    idle_since: float = 0.0
    localnet: bool = False
    shared: dict[str, int] = field(default_factory=dict)
    """Addresses that pass from one workload to another, with how many have a part in them."""

    def gateway(self, version: int) -> str:
        """The bridge's address, "" if it has none of that version."""
        pool = self.pools.get(version)
        return str(pool.gateway) if pool else ""

    def leave(self, workload_id: str, *, keep: bool = False) -> Endpoint | None:
        """Forget a workload's endpoint and, unless told to keep them, give its addresses back."""
        endpoint = self.endpoints.pop(workload_id, None)
        if endpoint is not None:
            if not keep:
                self.give(endpoint.ipv4, endpoint.ipv6)
            self.idle_since = time.monotonic()
        return endpoint

    def enter(self, workload_id: str, endpoint: Endpoint) -> None:
        """Know an endpoint of an earlier engine, whose addresses are held again."""
        self.endpoints[workload_id] = endpoint
        for text in (endpoint.ipv4, endpoint.ipv6):
            if text and any(
                text in (other.ipv4, other.ipv6)
                for user, other in self.endpoints.items()
                if user != workload_id
            ):
                self.share(text)
            elif text:
                self.pools[6 if ":" in text else 4].claim(ip_address(text))

    def share(self, text: str) -> None:
        """One more has a part in an address that is held."""
        self.shared[text] = self.shared.get(text, 1) + 1

    def claim(self, text: str) -> None:
        """Hold a particular address, or take a part in it if it passes on."""
        if text in self.shared:
            self.share(text)
        else:
            self.pools[6 if ":" in text else 4].claim(ip_address(text))

    def settle(self, text: str) -> None:
        """It has passed on: give one part back; whoever is left has it alone."""
        self.give(text)
        if self.shared.get(text) == 1:
            del self.shared[text]

    def give(self, *addresses: str) -> None:
        """Give addresses back; those that are "" are ignored."""
        for text in addresses:
            if self.shared.get(text, 0) > 1:
                self.shared[text] -= 1
            elif text:
                self.shared.pop(text, None)
                self.pools[6 if ":" in text else 4].give(ip_address(text))


def identity(home: Home) -> str:
    """40 hex digits that follow from the state directory: whose tables and links these are."""
    return hashlib.sha1(home.root.encode(), usedforsecurity=False).hexdigest()


def default_link(home: Home) -> str:
    """The default bridge's name: bh0 for the usual state directory, else with a part of the hash,
    so that installations beside each other do not collide.
    """
    return "bh0" if home.root == "/var/lib/bulkhead" else f"bh0-{identity(home)[:8]}"


class Bridges:
    """All bridges of one installation that are up. For one thread."""

    def __init__(self, home: Home, networks: Callable[[], Iterable[Network]]) -> None:
        self._home = home
        self._networks = networks
        self._identity = identity(home)
        self._tag = f"bulkhead_{self._identity[:16]}"
        self.route = rt.connect()
        self.filter = nft.connect()
        self.firewall = Firewall(self._tag, f"bulkhead {home.root}")
        os.makedirs(home.in_run("network"), mode=0o700, exist_ok=True)
        self._settings = host.HostSettings(home)
        self.active: dict[str, Active] = {}
        self._going: dict[str, threading.Thread] = {}
        self._docker_checked = 0.0

    def close(self) -> None:
        """Wait for what is going down; close the sockets."""
        for thread in self._going.values():
            thread.join()
        self._going.clear()
        self.route.close()
        self.filter.close()

    # -- subnets

    def busy(self, *, but: str = "") -> list[Prefix]:
        """Every range in use: the host's routes and addresses, and our networks except one."""
        ours = {one.link for one in self._networks()}
        indexes = {one.index for one in rt.links(self.route) if one.name in ours}
        found: list[Prefix] = [
            one.prefix
            for one in rt.routes(self.route)
            if one.prefix.prefixlen and one.index not in indexes
        ]
        found += [
            one.address.network
            for one in rt.addresses(self.route)
            if one.index not in indexes and not one.address.ip.is_loopback
        ]
        for network in self._networks():
            if network.id != but:
                found += subnets(network)
        return found

    def choose4(self, network: Network) -> Subnet:
        """A free IPv4 subnet for the network."""
        start = int(self._identity[:8], 16)
        if network.default and network.link == "bh0":
            start = 0
        candidates = ipam.ipv4_candidates(default=network.default, start=start)
        return _subnet(ipam.choose(candidates, self.busy(but=network.id)))

    def choose6(self, network: Network) -> Subnet:
        """A free unique local IPv6 subnet for the network."""
        candidates = ipam.ipv6_candidates(self._identity, 0 if network.default else 1)
        return _subnet(ipam.choose(candidates, self.busy(but=network.id)))

    def collides(self, network: Network) -> bool:
        """Whether the host meanwhile has a route into the network's subnets."""
        busy = self.busy(but=network.id)
        return any(
            mine.version == other.version and mine.overlaps(other)
            for mine in subnets(network)
            for other in busy
        )

    # -- up and down

    def up(self, network: Network) -> Active:
        """The network's bridge, made if it is not up."""
        active = self.active.get(network.id)
        if active is not None:
            return active
        going = self._going.pop(network.link, None)
        if going is not None:
            going.join()
        pools = _pools(network)
        mtu = network.mtu or self._uplink_mtu()
        with contextlib.ExitStack() as undo:
            index = self._make_link(network, pools, mtu)
            undo.callback(self._drop_link, index)
            if not network.internal:
                undo.callback(self._restore_settings)
                for version in pools:
                    self._settings.forward(version)
            try:
                self.firewall.up(self.filter, _rules(network, pools))
            except NetlinkError as error:
                raise _firewall_failed(error) from error
            undo.callback(self.firewall.down, self.filter, network.link)
            open_docker_user(
                self.filter,
                self._tag,
                [*(a.network.link for a in self.active.values()), network.link],
            )
            undo.pop_all()
        active = Active(network, index, mtu, pools, idle_since=time.monotonic())
        self.active[network.id] = active
        return active

    def _uplink_mtu(self) -> int:
        """The MTU of the interface with the default route if it is below the usual one."""
        routes = [one for one in rt.routes(self.route) if not one.prefix.prefixlen]
        mtus = {one.index: one.mtu for one in rt.links(self.route)}
        found = [mtus[one.index] for one in routes if mtus.get(one.index, 0) >= 1280]
        return min([DEFAULT_MTU, *found])

    def _make_link(self, network: Network, pools: dict[int, Pool], mtu: int) -> int:
        alias = f"{self._tag} {network.name}"
        first = pools.get(4) or pools[6]
        mac = rt.mac_bytes(mac_for(first.gateway))
        made = rt.add_bridge(network.link, mac=mac, mtu=mtu, up=False)
        try:
            self.route.transact([made])
        except NetlinkError as error:
            if error.errno == errno.EPERM:
                raise Unsupported(
                    f"network {network.name}: this process may not make network interfaces"
                ) from error
            if error.errno != errno.EEXIST:
                raise
            present = rt.link(self.route, network.link)
            # One without alias: an engine that was killed before it had set it.
            # Never one whose name a user chose: that may be somebody's own bridge.
            fresh = not present.alias and network.link.startswith("bh")
            ours = fresh or present.alias.startswith(self._tag)
            if present.kind != "bridge" or not ours:
                raise Conflict(
                    f"network {network.name}: interface {network.link} exists and is not ours; "
                    f"remove it (ip link delete {network.link})"
                ) from None
        self.route.transact([rt.set_alias(network.link, alias)])
        index = rt.link(self.route, network.link).index
        batch = [] if 6 in pools else [rt.no_link_local(index)]
        batch += [rt.add_address(index, pool.interface(pool.gateway)) for pool in pools.values()]
        batch.append(rt.set_link(index, up=True))
        try:
            self.route.transact(batch)
        except BaseException:
            self._drop_link(index)
            raise
        return index

    def _drop_link(self, index: int) -> None:
        with contextlib.suppress(NetlinkError):
            self.route.transact([rt.delete_link(index)])

    def down(self, active: Active) -> None:
        """Remove a bridge that nobody uses; the slow part happens in the background."""
        assert not active.endpoints
        link = active.network.link
        del self.active[active.network.id]
        open_docker_user(self.filter, self._tag, [a.network.link for a in self.active.values()])
        self.firewall.down(self.filter, link)
        thread = threading.Thread(target=_delete, args=(active.index,), name=f"remove {link}")
        thread.start()
        self._going[link] = thread
        self._restore_settings()

    def _restore_settings(self) -> None:
        if not self.active:
            self._settings.restore(shared=self.firewall.others(self.filter))

    def is_idle(self, active: Active) -> bool:
        """Whether it has been without workloads long enough to go."""
        return not active.endpoints and time.monotonic() - active.idle_since >= IDLE_S

    def sweep(self) -> float | None:
        """Remove what has been idle long enough; seconds until the next could be, None if none."""
        for link, thread in list(self._going.items()):
            if not thread.is_alive():
                thread.join()
                del self._going[link]
        now = time.monotonic()
        wait: float | None = 0.05 if self._going else None
        for active in list(self.active.values()):
            if active.endpoints:
                continue
            left = active.idle_since + IDLE_S - now
            if left <= 0:
                self.down(active)
                left = 0.05
            wait = left if wait is None else min(wait, left)
        return wait

    def recheck_docker(self) -> None:
        """Follow a Docker that came or went since; at most every `DOCKER_EACH_S`."""
        now = time.monotonic()
        if self.active and now - self._docker_checked >= DOCKER_EACH_S:
            self._docker_checked = now
            open_docker_user(self.filter, self._tag, [a.network.link for a in self.active.values()])

    def remove_leftovers(self, keep: Iterable[str]) -> None:
        """Remove bridges, table and DOCKER-USER rules an earlier engine of ours left, but `keep`
        (link names). For the start, before anything is up.
        """
        kept = set(keep)
        if not kept:
            self.firewall.remove_leftover(self.filter)
        open_docker_user(self.filter, self._tag, kept)
        for one in rt.links(self.route):
            if one.kind == "bridge" and one.alias.startswith(self._tag) and one.name not in kept:
                with contextlib.suppress(NetlinkError):
                    self.route.transact([rt.delete_link(one.index)])
        if not kept:
            self._restore_settings()

    def adopt(self, networks: Iterable[Network], redirects: Iterable[Redirect]) -> None:
        """Take over bridges that live workloads of an earlier engine use, after `remove_leftovers`.

        The firewall's table is replaced in one step: no packet meets a state in between.
        """
        for network in networks:
            pools = _pools(network)
            mtu = network.mtu or self._uplink_mtu()
            index = self._make_link(network, pools, mtu)
            self.active[network.id] = Active(network, index, mtu, pools)
            if not network.internal:
                for version in pools:
                    self._settings.forward(version)
        listed = list(redirects)
        self.firewall.rebuild(
            self.filter, [_rules(one.network, one.pools) for one in self.active.values()], listed
        )
        open_docker_user(self.filter, self._tag, [a.network.link for a in self.active.values()])
        if listed:
            self._open_loopback()

    # -- ports

    def publish(self, redirects: list[Redirect]) -> None:
        """Add redirections, with what 127.0.0.1 needs of the bridges."""
        if not redirects:
            return
        self._open_loopback()
        self.firewall.publish(self.filter, redirects)
        forget_flows(self.filter, redirects, published=True)

    def unpublish(self, redirects: list[Redirect]) -> None:
        """Take redirections away, also from those who use them at this moment."""
        if not redirects:
            return
        self.firewall.unpublish(self.filter, redirects)
        forget_flows(self.filter, redirects, published=False)

    def _open_loopback(self) -> None:
        for active in self.active.values():
            if not active.localnet and 4 in active.pools and not active.network.internal:
                host.write(f"ipv4/conf/{active.network.link}/route_localnet", "1")
                active.localnet = True


def _delete(index: int) -> None:
    with contextlib.suppress(NetlinkError), rt.connect() as route:
        route.transact([rt.delete_link(index)])


def subnets(network: Network) -> list[Prefix]:
    """The network's ranges."""
    return [ipam.parse_subnet(one.subnet) for one in (network.ipv4, network.ipv6) if one]


def _pools(network: Network) -> dict[int, Pool]:
    both = ((4, network.ipv4), (6, network.ipv6))
    return {version: one.pool() for version, one in both if one}


def _subnet(prefix: Prefix) -> Subnet:
    pool = Pool(prefix)
    return Subnet(subnet=str(prefix), gateway=str(pool.gateway))


def _rules(network: Network, pools: dict[int, Pool]) -> Rules:
    four, six = pools.get(4), pools.get(6)
    subnet4 = four.subnet if four else None
    subnet6 = six.subnet if six else None
    assert subnet4 is None or isinstance(subnet4, IPv4Network)
    assert subnet6 is None or isinstance(subnet6, IPv6Network)
    return Rules(
        link=network.link,
        subnet4=subnet4,
        subnet6=subnet6,
        internal=network.internal,
        icc=network.icc,
        masquerade=network.masquerade,
        source4=network.host_ipv4,
        source6=network.host_ipv6,
        routed4=network.routed4,
        routed6=network.routed6,
    )


def _firewall_failed(error: NetlinkError) -> Unavailable | Unsupported:
    if error.errno in (errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT):
        return Unsupported(
            f"network: this kernel lacks a part of nftables ({error}); it needs nf_tables with "
            "inet, nat, fib, ct and masquerade"
        )
    return Unavailable(f"network: the kernel refused our firewall rules: {error}")
