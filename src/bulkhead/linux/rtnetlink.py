"""Links, addresses, routes and neighbours as rtnetlink messages; rtnetlink(7).

Functions named like verbs return `Message`s, to be sent in one batch with `Netlink.transact`;
`links`, `addresses` and `routes` ask.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_address

from bulkhead.linux.netlink import (
    F_CREATE,
    F_EXCL,
    F_REPLACE,
    NETLINK_ROUTE,
    Message,
    Netlink,
    attribute,
    nested,
    string,
    table,
    text,
    u8,
    u32,
)

Interface = IPv4Interface | IPv6Interface
Prefix = IPv4Network | IPv6Network

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_GETSTATS = 94
IFF_UP = 1
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_STATS = struct.Struct("=BxxxII")
_STATS_64 = struct.Struct("=8Q")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_NET_NS_FD, _IFLA_IFALIAS, _IFLA_AF_SPEC, _IFLA_PROTINFO = 28, 20, 26, 12
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_DATA, _INFO_SLAVE_KIND = 1, 2, 5, 4
_VETH_PEER = 1
_BRPORT_MODE, _BRPORT_LEARNING, _BRPORT_ISOLATED = 4, 8, 33
_BR_MCAST_SNOOPING = 23
_BR_VLAN_DEFAULT_PVID = 39
_INET6_ADDR_GEN_MODE = 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 3, 4, 8
IFA_F_NODAD = 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 5, 6, 15
_RT_TABLE_MAIN, _RTPROT_BOOT, _SCOPE_UNIVERSE, _SCOPE_LINK, _RTN_UNICAST = 254, 3, 0, 253, 1


def connect() -> Netlink:
    """A socket for these messages in the calling thread's network namespace."""
    return Netlink(NETLINK_ROUTE)


def mac_bytes(mac: str) -> bytes:
    """The six bytes of "02:42:0a:01:02:03"; ValueError if it is not a unicast MAC address."""
    value = bytes.fromhex(mac.replace("-", ":").replace(":", ""))
    if len(value) != 6 or value[0] & 1 or not any(value):
        raise ValueError(f"not a unicast MAC address: {mac}")
    return value


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as the kernel describes it."""

    index: int
    name: str
    kind: str
    up: bool
    master: int
    mtu: int
    mac: str
    alias: str


def _link(index: int, flags: int, change: int, *parts: bytes) -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, index, flags, change) + b"".join(parts)


def add_veth(
    name: str,
    *,
    master: int,
    mtu: int,
    peer_name: str,
    peer_netns_fd: int,
    peer_mac: bytes,
    up: bool = True,
    isolated: bool = False,
) -> list[Message]:
    """A pair: `name` here, enslaved to `master` (0: to nothing), its peer in another namespace.

    The peer has its name and address from the start (but is down: the kernel refuses to raise it
    before its partner exists); nothing is moved between namespaces, which would cost an RCU grace
    period each.
    """
    state = IFF_UP if up else 0
    peer = _link(
        0,
        0,
        0,
        text(_IFLA_IFNAME, peer_name),
        u32(_IFLA_NET_NS_FD, peer_netns_fd),
        attribute(_IFLA_ADDRESS, peer_mac),
        u32(_IFLA_MTU, mtu),
    )
    info = [text(_INFO_KIND, "veth"), nested(_INFO_DATA, attribute(_VETH_PEER, peer))]
    parts = [text(_IFLA_IFNAME, name), u32(_IFLA_MTU, mtu), nested(_IFLA_LINKINFO, *info)]
    if master:
        parts.append(u32(_IFLA_MASTER, master))
    made = [
        Message(_NEWLINK, F_CREATE | F_EXCL, _link(0, state, state, *parts), f"create veth {name}")
    ]
    if isolated:
        made.append(isolate_port(name))
    return made


def isolate_port(name: str, *, isolated: bool = True) -> Message:
    """Let bridge port `name` talk to the bridge itself but (not) to other isolated ports."""
    data = nested(
        _IFLA_LINKINFO,
        text(_INFO_SLAVE_KIND, "bridge"),
        nested(_INFO_SLAVE_DATA, u8(_BRPORT_ISOLATED, int(isolated))),
    )
    return Message(
        _NEWLINK, 0, _link(0, 0, 0, text(_IFLA_IFNAME, name), data), f"isolate bridge port {name}"
    )


def hairpin_port(name: str) -> Message:
    """Let bridge port `name` get back what it sent: its own published port, with br_netfilter."""
    data = nested(
        _IFLA_LINKINFO,
        text(_INFO_SLAVE_KIND, "bridge"),
        nested(_INFO_SLAVE_DATA, u8(_BRPORT_MODE, 1)),
    )
    return Message(
        _NEWLINK, 0, _link(0, 0, 0, text(_IFLA_IFNAME, name), data), f"hairpin bridge port {name}"
    )


def no_learning_port(name: str) -> Message:
    """Let a bridge not conclude from frames arriving at port `name` who is behind it."""
    data = nested(
        _IFLA_LINKINFO,
        text(_INFO_SLAVE_KIND, "bridge"),
        nested(_INFO_SLAVE_DATA, u8(_BRPORT_LEARNING, 0)),
    )
    body = _link(0, 0, 0, text(_IFLA_IFNAME, name), data)
    return Message(_NEWLINK, 0, body, f"no learning on bridge port {name}")


def add_bridge(name: str, *, mac: bytes, mtu: int, up: bool = True) -> Message:
    """A bridge without STP; multicast snooping off, as it delays IPv6 neighbour discovery."""
    info = (text(_INFO_KIND, "bridge"), nested(_INFO_DATA, u8(_BR_MCAST_SNOOPING, 0)))
    parts = [text(_IFLA_IFNAME, name), attribute(_IFLA_ADDRESS, mac), nested(_IFLA_LINKINFO, *info)]
    if mtu:
        parts.append(u32(_IFLA_MTU, mtu))
    state = IFF_UP if up else 0
    return Message(
        _NEWLINK, F_CREATE | F_EXCL, _link(0, state, state, *parts), f"create bridge {name}"
    )


def set_alias(name: str, alias: str) -> Message:
    """Mark an interface; the kernel ignores an alias in the message that creates it."""
    parts = (text(_IFLA_IFNAME, name), text(_IFLA_IFALIAS, alias))
    return Message(_NEWLINK, 0, _link(0, 0, 0, *parts), f"set the alias of {name}")


def no_link_local(index: int = 0, name: str = "") -> Message:
    """Keep the kernel from giving an interface, while it is down, an IPv6 link-local address."""
    parts = [text(_IFLA_IFNAME, name)] if name else []
    mode = nested(_IFLA_AF_SPEC, nested(socket.AF_INET6, u8(_INET6_ADDR_GEN_MODE, 1)))
    body = _link(index, 0, 0, *parts, mode)
    return Message(_NEWLINK, 0, body, f"no IPv6 link-local address on {name or index}")


def add_dummy(name: str) -> Message:
    """A dummy interface, up."""
    parts = (text(_IFLA_IFNAME, name), nested(_IFLA_LINKINFO, text(_INFO_KIND, "dummy")))
    return Message(
        _NEWLINK, F_CREATE | F_EXCL, _link(0, IFF_UP, IFF_UP, *parts), f"create dummy {name}"
    )


def delete_link(index: int = 0, name: str = "") -> Message:
    """Remove an interface, named by index or by name."""
    parts = (text(_IFLA_IFNAME, name),) if name else ()
    return Message(_DELLINK, 0, _link(index, 0, 0, *parts), f"delete link {name or index}")


def set_link(
    index: int = 0,
    *,
    name: str = "",
    up: bool | None = None,
    mtu: int = 0,
    master: int | None = None,
    mac: bytes = b"",
    rename: str = "",
) -> Message:
    """Change an interface named by index or name; `master` 0 releases it from its bridge."""
    parts = []
    if name or rename:
        parts.append(text(_IFLA_IFNAME, rename or name))
    if mtu:
        parts.append(u32(_IFLA_MTU, mtu))
    if master is not None:
        parts.append(u32(_IFLA_MASTER, master))
    if mac:
        parts.append(attribute(_IFLA_ADDRESS, mac))
    change = 0 if up is None else IFF_UP
    body = _link(index, IFF_UP if up else 0, change, *parts)
    return Message(_NEWLINK, 0, body, f"change link {name or index}")


def add_address(index: int, address: Interface, *, nodad: bool = True) -> Message:
    """Give interface `index` an address with its prefix; IPv6 without duplicate detection."""
    packed = address.ip.packed
    body = [attribute(_IFA_LOCAL, packed), attribute(_IFA_ADDRESS, packed)]
    if address.version == 4 and address.network.prefixlen < 31:
        body.append(attribute(_IFA_BROADCAST, address.network.broadcast_address.packed))
    flags = IFA_F_NODAD if address.version == 6 and nodad else 0
    head = _ADDRESS.pack(_family(address.version), address.network.prefixlen, flags, 0, index)
    return Message(_NEWADDR, F_CREATE | F_REPLACE, head + b"".join(body), f"add address {address}")


def delete_address(index: int, address: Interface) -> Message:
    """Take an address from interface `index`."""
    head = _ADDRESS.pack(_family(address.version), address.network.prefixlen, 0, 0, index)
    return Message(
        _DELADDR, 0, head + attribute(_IFA_LOCAL, address.ip.packed), f"delete address {address}"
    )


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def add_route(
    *,
    index: int,
    gateway: str = "",
    prefix: Prefix | None = None,
    version: int = 4,
    metric: int = 0,
) -> Message:
    """A route to `prefix` (None: default) by `gateway` or directly on interface `index`."""
    version = prefix.version if prefix else (ip_address(gateway).version if gateway else version)
    scope = _SCOPE_UNIVERSE if gateway or version == 6 else _SCOPE_LINK
    length = prefix.prefixlen if prefix else 0
    head = _ROUTE.pack(
        _family(version), length, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, scope, _RTN_UNICAST, 0
    )
    parts = [u32(_RTA_OIF, index)]
    if prefix and length:
        parts.append(attribute(_RTA_DST, prefix.network_address.packed))
    if gateway:
        parts.append(attribute(_RTA_GATEWAY, ip_address(gateway).packed))
    if metric:
        parts.append(u32(_RTA_PRIORITY, metric))
    what = f"add route {prefix or 'default'} via {gateway or index}"
    return Message(_NEWROUTE, F_CREATE | F_REPLACE, head + b"".join(parts), what)


def delete_default_route(index: int, version: int) -> Message:
    """Remove the default route through interface `index`."""
    head = _ROUTE.pack(_family(version), 0, 0, 0, _RT_TABLE_MAIN, 0, 255, 0, 0)
    return Message(_DELROUTE, 0, head + u32(_RTA_OIF, index), "delete default route")


def links(netlink: Netlink) -> list[Link]:
    """Every interface of the namespace."""
    replies = netlink.dump(Message(_GETLINK, 0, _link(0, 0, 0), "list links"))
    return [_parse_link(reply.payload) for reply in replies]


def link(netlink: Netlink, name: str) -> Link:
    """The interface called `name`; NetlinkError(ENODEV) if there is none."""
    body = _link(0, 0, 0, text(_IFLA_IFNAME, name))
    return _parse_link(netlink.request(Message(_GETLINK, 0, body, f"link {name}")).payload)


def sent(netlink: Netlink) -> list[int]:
    """For each interface of the namespace the packets that it has sent, or failed to send."""
    head = _STATS.pack(socket.AF_UNSPEC, 0, 1)  # IFLA_STATS_LINK_64 (linux/if_link.h)
    counts = []
    for reply in netlink.dump(Message(_GETSTATS, 0, head, "list statistics")):
        _, transmitted, _, _, _, errors, _, dropped = _STATS_64.unpack_from(reply.payload, 16)
        counts.append(transmitted + errors + dropped)
    return counts


def _parse_link(payload: bytes) -> Link:
    _af, _type, index, flags, _change = _LINK.unpack_from(payload)
    found = table(payload, 16)
    info = table(found[_IFLA_LINKINFO]) if _IFLA_LINKINFO in found else {}
    mac = found.get(_IFLA_ADDRESS, b"")
    return Link(
        index=index,
        name=string(found.get(_IFLA_IFNAME, b"")),
        kind=string(info.get(_INFO_KIND, b"")),
        up=bool(flags & IFF_UP),
        master=_u32(found.get(_IFLA_MASTER)),
        mtu=_u32(found.get(_IFLA_MTU)),
        mac=mac.hex(":"),
        alias=string(found.get(_IFLA_IFALIAS, b"")),
    )


def _u32(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


@dataclass(frozen=True, slots=True)
class Address:
    """An address on an interface."""

    index: int
    address: Interface


@dataclass(frozen=True, slots=True)
class Route:
    """A route: destination, interface, gateway ("" if direct), table."""

    prefix: Prefix
    index: int
    gateway: str
    table: int
    kind: int


def addresses(netlink: Netlink) -> list[Address]:
    """Every address of the namespace."""
    head = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    result = []
    for reply in netlink.dump(Message(_GETADDR, 0, head, "list addresses")):
        family, length, _flags, _scope, index = _ADDRESS.unpack_from(reply.payload)
        found = table(reply.payload, 8)
        raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if not raw or family not in (socket.AF_INET, socket.AF_INET6):
            continue
        kind = IPv4Interface if family == socket.AF_INET else IPv6Interface
        result.append(Address(index, kind((raw, length))))
    return result


def routes(netlink: Netlink) -> list[Route]:
    """Every unicast route of the namespace, of all tables but "local"."""
    result = []
    for family in (socket.AF_INET, socket.AF_INET6):
        head = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for reply in netlink.dump(Message(_GETROUTE, 0, head, "list routes")):
            parsed = _parse_route(reply.payload)
            if parsed is not None:
                result.append(parsed)
    return result


def _parse_route(payload: bytes) -> Route | None:
    family, length, _src, _tos, short, _proto, _scope, kind, _flags = _ROUTE.unpack_from(payload)
    found = table(payload, 12)
    number = _u32(found.get(_RTA_TABLE)) or short
    if kind != _RTN_UNICAST or number == 255:
        return None
    raw = found.get(_RTA_DST) or bytes(4 if family == socket.AF_INET else 16)
    prefix: Prefix
    prefix = IPv4Network((raw, length)) if family == socket.AF_INET else IPv6Network((raw, length))
    gateway = found.get(_RTA_GATEWAY)
    return Route(
        prefix, _u32(found.get(_RTA_OIF)), str(ip_address(gateway)) if gateway else "", number, kind
    )
