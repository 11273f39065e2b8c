"""What on this host stands in the way of networks, found out by looking and trying."""

import contextlib
import errno
import os
from ipaddress import IPv4Network, IPv6Network

from bulkhead.errors import BulkheadError
from bulkhead.linux import conntrack, netns
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.netlink import Netlink
from bulkhead.network import host
from bulkhead.network.files import host_resolution
from bulkhead.network.firewall import Firewall, Rules
from bulkhead.network.model import Finding

_FORWARD = nft.HOOKS["forward"]
_LEGACY = "/proc/net/ip_tables_names"


def _try_all() -> None:
    """Make a namespace with a bridge, a cable and our whole table; all of it goes with the thread.

    OSError says which part the kernel refused.
    """
    with netns.current() as outside:
        netns.unshare()
        with rt.connect() as route, nft.connect() as netlink:
            mac = rt.mac_bytes("02:42:00:00:00:01")
            route.transact([rt.add_bridge("bhtry", mac=mac, mtu=1500)])
            index = rt.link(route, "bhtry").index
            with netns.create() as other:
                cable = rt.add_veth(
                    "bhtry1",
                    master=index,
                    mtu=1500,
                    peer_name="eth0",
                    peer_netns_fd=other.fileno(),
                    peer_mac=rt.mac_bytes("02:42:00:00:00:02"),
                    isolated=True,
                )
                route.transact(cable)
            rules = Rules("bhtry", IPv4Network("192.0.2.0/24"), IPv6Network("2001:db8::/64"))
            Firewall("bulkhead_try", "").up(netlink, rules)
        netns.enter(outside.fileno())


def examine(netlink: Netlink, ours: str) -> list[Finding]:
    """Every finding; `ours` is our table's name."""
    return [
        _kernel(),
        _forwarding(),
        *_firewalls(netlink, ours),
        _tracking(netlink),
        _legacy(),
        _resolvers(),
    ]


def _kernel() -> Finding:
    check = "network: bridges, cables and nftables"
    try:
        netns.in_thread(_try_all)
    except (OSError, BulkheadError) as error:
        lacks = isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES)
        remedy = (
            "run the engine as root"
            if lacks
            else "load the kernel modules bridge, veth, nf_tables, nft_fib_inet, nft_masq, nft_nat"
        )
        return Finding(check, "missing", str(error), remedy)
    return Finding(check, "ok", "tried in a namespace of its own")


def _forwarding() -> Finding:
    check = "network: forwarding"
    if host.read(host.FORWARD4) == "1":
        return Finding(check, "ok", "on")
    path = "/proc/sys/net/" + host.FORWARD4
    if os.access(path, os.W_OK):
        return Finding(check, "ok", "off; switched on while a workload is on a bridge")
    return Finding(
        check, "missing", f"off, and {path} cannot be written", "sysctl -w net.ipv4.ip_forward=1"
    )


def _firewalls(netlink: Netlink, ours: str) -> list[Finding]:
    """Other tables that drop what is forwarded: their word holds against ours."""
    check = "network: firewall"
    try:
        chains = nft.chains(netlink)
    except OSError as error:
        return [Finding(check, "warn", f"cannot be read: {error}", "run the engine as root")]
    families = {nft.INET: "inet", nft.IPV4: "ip", nft.IPV6: "ip6", nft.BRIDGE: "bridge"}
    docker = {(one.family, one.table) for one in chains if one.name == "DOCKER-USER"}
    found = []
    for one in chains:
        if one.hook != _FORWARD or one.kind != "filter" or one.policy != nft.DROP:
            continue
        if one.table == ours or one.family not in families:
            continue
        place = f"{families[one.family]} {one.table} {one.name}"
        if (one.family, one.table) in docker:
            found.append(
                Finding(check, "ok", f"{place} drops by default; let through by DOCKER-USER")
            )
            continue
        found.append(
            Finding(
                check,
                "warn",
                f"chain {place} drops by default what is forwarded, workloads' packets too",
                f'nft insert rule {place} iifname "bh*" accept; '
                f'nft insert rule {place} oifname "bh*" ct state established,related accept; '
                f'nft insert rule {place} oifname "bh*" ct status dnat accept',
            )
        )
    return found or [Finding(check, "ok", "no other table drops forwarded packets by default")]


def _tracking(netlink: Netlink) -> Finding:
    check = "network: connection tracking"
    try:
        conntrack.tracked_udp(netlink, 4, 53)
    except OSError as error:
        return Finding(
            check,
            "warn",
            f"cannot be read ({error}): UDP clients may be led to where a port led before",
            "modprobe nf_conntrack_netlink",
        )
    return Finding(check, "ok", "flows of ports that are no longer published are forgotten")


def _legacy() -> Finding:
    check = "network: iptables-legacy"
    names = ""
    with contextlib.suppress(OSError), open(_LEGACY, encoding="ascii") as file:
        names = file.read()
    if "filter" not in names.split():
        return Finding(check, "ok", "not in use")
    return Finding(
        check,
        "warn",
        "legacy filter tables are in use; what they drop cannot be seen by nftables",
        "check `iptables-legacy -S FORWARD`, or move to iptables-nft",
    )


def _resolvers() -> Finding:
    check = "network: name servers"
    found = host_resolution().servers
    if found:
        return Finding(check, "ok", ", ".join(found))
    return Finding(
        check, "warn", "/etc/resolv.conf names no server", "add one, or run with --dns ADDRESS"
    )
