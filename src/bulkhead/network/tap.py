"""A workload's network namespace turned into a guest's: its interfaces belong to the guest.

`NetworkManager.prepare` gives a guest the same namespace as a container. The monitor of the virtual
machine runs in it, and what it finds there are only wires:

    host bridge ── veth ── eth0 ─┐
                                gb0 (169.254.53.53, our resolver) ── the monitor's namespace
    guest's eth0 ── tap0 ────────┘

The addresses, the MAC address and the routes of eth0 move to the guest's own interface; eth0 and
tap0 are ports of the bridge gb0 and have none. With further networks there are gb1, tap1 and so on.
Undoing it means letting go of the namespace.

Frames that concern 169.254.53.53 never cross eth0, in neither direction: each guest has this
address beside it, and a neighbour on the host's bridge must not answer for it.
"""

import contextlib
import os
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, ip_interface, ip_network

from bulkhead.errors import Unsupported
from bulkhead.linux import netns
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.netlink import Netlink, NetlinkError
from bulkhead.linux.tap import attach_tap, open_tap
from bulkhead.network.inner import GUEST_ADDRESS

RESOLVER = GUEST_ADDRESS
ALONE = "169.254.53.52/31"
"""A guest without IPv4 has this address, in order to ask the resolver."""
TABLE = "bulkhead_guest"


@dataclass(frozen=True, slots=True)
class GuestRoute:
    """A route of the guest through one of its interfaces; `gateway` "" means directly."""

    destination: str
    gateway: str


@dataclass(frozen=True, slots=True)
class GuestNic:
    """One interface as the guest must set it up, and the tap it is on.

    `tap_fd` is the receiver's to close once the monitor has it. `addresses` have their prefix
    lengths. `nameserver` is where our resolver is, if the workload asks it: /etc/resolv.conf is as
    `Attachment.resolv_conf` says.
    """

    name: str
    tap_fd: OwnedFd
    mac: str
    addresses: tuple[str, ...]
    routes: tuple[GuestRoute, ...]
    mtu: int
    nameserver: str = RESOLVER


def guest_taps(netns_path: str, *, vnet_hdr: bool = False) -> list[GuestNic]:
    """Give every interface of the namespace to a guest; none with network mode "none".

    To be called once per namespace, after `prepare` and before the launch. `vnet_hdr` as in
    `open_tap`. On failure the namespace is of no use any more. Errors: Unsupported, OSError.
    """
    fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return netns.inside(fd, lambda: _convert(vnet_hdr))
    finally:
        os.close(fd)


def guest_tap(netns_path: str, name: str, spare: OwnedFd | None = None) -> GuestNic:
    """Give one more interface, `name`, to the guest that runs in the namespace.

    `spare`: a tap that the machine has already, with no interface yet (linux/tap.py).
    """

    def convert() -> GuestNic:
        with rt.connect() as route:
            known = {one.name for one in rt.links(route)}
            numbers = range(1, len(known) + 2)
            number = next(n for n in numbers if not {f"gb{n}", f"tap{n}"} & known)
            link = rt.link(route, name)
            _filter([link], f"{TABLE}_{name}")
            return _one(route, link, number, False, None, spare)

    with OwnedFd(os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return netns.inside(int(fd), convert)


def bridge_of(netns_path: str, name: str) -> str:
    """The bridge that interface `name` of a guest's namespace is a port of, "" if there is none."""

    def look() -> str:
        with rt.connect() as route:
            links = {one.index: one for one in rt.links(route)}
            master = next((one.master for one in links.values() if one.name == name), 0)
            return links[master].name if master in links else ""

    with OwnedFd(os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return netns.inside(int(fd), look)


def let_go(netns_path: str, bridge: str, name: str) -> None:
    """Undo what a tap was made with, after interface `name` has gone; gb0 stays, with the resolver.

    A guest that asks that then has the address ALONE.
    """

    def work() -> None:
        with rt.connect() as route:
            if bridge == "gb0":
                index = rt.link(route, bridge).index
                with contextlib.suppress(NetlinkError):
                    prefix = IPv4Network(IPv4Interface(ALONE).ip)
                    route.transact([rt.add_route(index=index, prefix=prefix)])
            elif bridge:
                route.transact([rt.delete_link(name=bridge)])
        with contextlib.suppress(NetlinkError), nft.connect() as netlink:
            batch = nft.Batch(nft.BRIDGE, f"{TABLE}_{name}")
            batch.delete_table()
            batch.commit(netlink)

    with OwnedFd(os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        netns.inside(int(fd), work)


def guest_wires(netns_path: str) -> OwnedFd:
    """The same for a monitor that takes over interfaces as they are: a namespace with them.

    There they have the addresses and routes of the workload; the other ends of these pairs are the
    ports that the taps would be. To be called like `guest_taps`; the namespace is the caller's.
    """
    far = netns.create()
    try:
        fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            nics = netns.inside(fd, lambda: _convert(False, far))
        finally:
            os.close(fd)
        for nic in nics:
            nic.tap_fd.close()
        netns.inside(int(far), lambda: _settle(nics))
    except BaseException:
        far.close()
        raise
    return far


def _settle(nics: list[GuestNic]) -> None:
    """Give the interfaces of this namespace what a guest would give its own."""
    with rt.connect() as route:
        route.transact([rt.set_link(name="lo", up=True)])
        for nic in nics:
            index = rt.link(route, nic.name).index
            batch = [rt.no_link_local(name=nic.name), rt.set_link(index, up=True)]
            batch += [rt.add_address(index, ip_interface(one)) for one in nic.addresses]
            for one in nic.routes:
                prefix = ip_network(one.destination)
                batch.append(rt.add_route(index=index, prefix=prefix, gateway=one.gateway))
            route.transact(batch)


def _convert(vnet_hdr: bool, far: OwnedFd | None = None) -> list[GuestNic]:
    with rt.connect() as route, contextlib.ExitStack() as undo:
        links = [one for one in rt.links(route) if one.kind == "veth"]
        links.sort(key=lambda one: one.index)
        _filter(links)
        made = []
        for number, link in enumerate(links):
            nic = _one(route, link, number, vnet_hdr, far)
            undo.callback(nic.tap_fd.close)
            made.append(nic)
        undo.pop_all()
    return made


def _one(
    route: Netlink,
    link: rt.Link,
    number: int,
    vnet_hdr: bool,
    far: OwnedFd | None,
    spare: OwnedFd | None = None,
) -> GuestNic:
    bridge, tap = f"gb{number}", f"tap{number}"
    addresses = [one.address for one in rt.addresses(route) if one.index == link.index]
    addresses = [one for one in addresses if not one.ip.is_link_local]
    gateways = [one for one in rt.routes(route) if one.index == link.index and one.gateway]
    if number == 0 and not any(one.version == 4 for one in addresses):
        addresses.append(IPv4Interface(ALONE))
    with contextlib.ExitStack() as undo:
        if spare is not None:
            attach_tap(int(spare), tap, vnet_hdr=vnet_hdr)
            fd = spare.duplicate()
        else:
            fd = _wire(route, link, tap, far) if far else open_tap(tap, vnet_hdr=vnet_hdr)
        undo.callback(fd.close)
        mac, port = _local_mac(), _local_mac()
        route.transact([rt.add_bridge(bridge, mac=mac, mtu=link.mtu, up=False)])
        index = rt.link(route, bridge).index
        # The routes go with it being down, and IPv6 addresses as well.
        route.transact([rt.set_link(link.index, up=False)])
        batch = [rt.delete_address(link.index, one) for one in _present(route, link.index)]
        for name in (bridge, link.name, tap):
            batch.append(rt.no_link_local(name=name))
        batch.append(rt.set_link(link.index, mac=port, master=index, up=True))
        batch.append(rt.no_learning_port(link.name))
        batch.append(rt.set_link(name=tap, mtu=link.mtu, master=index, up=True))
        batch.append(rt.set_link(index, up=True))
        if number == 0:
            batch.append(rt.add_address(index, IPv4Interface(f"{RESOLVER}/32")))
            batch += [
                rt.add_route(index=index, prefix=IPv4Network(one.ip))
                for one in addresses
                if isinstance(one, IPv4Interface)
            ]
        route.transact(batch)
        undo.pop_all()
    routes = [GuestRoute(str(one.prefix), one.gateway) for one in gateways]
    if number == 0:
        routes.insert(0, GuestRoute(f"{RESOLVER}/32", ""))
    return GuestNic(
        name=link.name,
        tap_fd=fd,
        mac=link.mac,
        addresses=tuple(str(one) for one in addresses),
        routes=tuple(routes),
        mtu=link.mtu,
    )


def _wire(route: Netlink, link: rt.Link, name: str, far: OwnedFd) -> OwnedFd:
    """A pair: `name` here, the like of `link` in the namespace `far`; a descriptor of that."""
    mac = rt.mac_bytes(link.mac)
    # While two have one address they are in different namespaces.
    made = rt.add_veth(
        name, master=0, mtu=link.mtu, peer_name=link.name, peer_netns_fd=int(far), peer_mac=mac,
        up=False,
    )  # fmt: skip
    route.transact(made)
    return far.duplicate()


def _present(route: Netlink, index: int) -> list[IPv4Interface | IPv6Interface]:
    return [one.address for one in rt.addresses(route) if one.index == index]


def _local_mac() -> bytes:
    """A random unicast address, marked as locally administered."""
    return b"\x02" + os.urandom(5)


def _filter(ports: list[rt.Link], table: str = TABLE) -> None:
    """Nothing from or for the resolver's address passes these ports; no echo comes back in."""
    batch = nft.Batch(nft.BRIDGE, table)
    batch.add_table("bulkhead: 169.254.53.53 is this guest's own neighbour")
    resolver = IPv4Network(RESOLVER)
    for chain, hook, key in (
        ("in", "prerouting", nft.META_IIFNAME),
        ("out", "postrouting", nft.META_OIFNAME),
    ):
        batch.add_base_chain(chain, "filter", hook, 0)
        for port in ports:
            here = nft.interface_is(key, port.name)
            for source in (True, False):
                address = nft.address_in(resolver, source=source)
                packet = [*here, *nft.ether_type_is(nft.ETHER_IPV4), *address]
                batch.add_rule(chain, [*packet, nft.verdict(nft.DROP)])
                question = [*here, *nft.ether_type_is(nft.ETHER_ARP)]
                question += nft.arp_address_is(resolver.network_address, sender=source)
                batch.add_rule(chain, [*question, nft.verdict(nft.DROP)])
    for port in ports:
        # The host's bridge sends a group's frames back where ports are published (hairpin mode).
        echo = [*nft.ether_source_is(rt.mac_bytes(port.mac)), *nft.ether_to_many()]
        here = nft.interface_is(nft.META_IIFNAME, port.name)
        batch.add_rule("in", [*here, *echo, nft.verdict(nft.DROP)])
    try:
        with nft.connect() as netlink:
            batch.commit(netlink)
    except NetlinkError as error:
        raise Unsupported(
            f"guest network: this kernel cannot filter on bridges ({error}); "
            "it needs nf_tables for the bridge family"
        ) from error
