"""DHCP for machines whose inside is not ours: RFC 2131, 2132, 3442 (classless routes).

Each machine has a server of its own in its network namespace, which answers its one MAC address
with the one address that is the machine's anyway. Leases do not end. Packets never cross to the
network beyond (`keep_inside`), so nobody else can answer, and nobody else is answered.
"""

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from bulkhead.linux import nftables as nft

SERVER, CLIENT = 67, 68
_MAGIC = b"\x63\x82\x53\x63"
TABLE = "bulkhead_dhcp"
_FOREVER = 0xFFFFFFFF
_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK, _INFORM = 1, 2, 3, 5, 6, 8
_MOST = 1500
_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")


@dataclass(frozen=True, slots=True)
class Lease:
    """What one interface is told; of `routes`, those with the gateway "" are on the link."""

    mac: str
    address: str
    """With prefix length."""
    server: str
    routes: Sequence[tuple[str, str]] = ()
    nameservers: Sequence[str] = ()
    domain: str = ""
    hostname: str = ""
    mtu: int = 0


def open_socket(interface: str) -> socket.socket:
    """A server's socket on `interface` of the calling thread's network namespace."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.bind(("", SERVER))
    except BaseException:
        sock.close()
        raise
    return sock


def keep_inside(interfaces: Sequence[str]) -> None:
    """Let no DHCP pass these ports of the bridges in the calling thread's network namespace."""
    batch = nft.Batch(nft.BRIDGE, TABLE)
    batch.add_table("bulkhead: DHCP stays between a machine and us")
    for chain, hook, key in (
        ("in", "prerouting", nft.META_IIFNAME),
        ("out", "postrouting", nft.META_OIFNAME),
    ):
        batch.add_base_chain(chain, "filter", hook, 10)
        for name in interfaces:
            for port in (SERVER, CLIENT):
                batch.add_rule(chain, [
                    *nft.interface_is(key, name), *nft.ether_type_is(nft.ETHER_IPV4),
                    nft.payload(1, 9, 1), nft.compare(bytes([socket.IPPROTO_UDP])),
                    nft.payload(2, 2, 2), nft.compare(port.to_bytes(2, "big")),
                    nft.verdict(nft.DROP),
                ])  # fmt: skip
    with nft.connect() as netlink:
        batch.commit(netlink)


def answer(packet: bytes, lease: Lease) -> bytes | None:
    """The reply, to be broadcast; None for what is not a request of the lease's own interface."""
    if not _HEADER.size + 4 <= len(packet) <= _MOST:
        return None
    fields = _HEADER.unpack_from(packet)
    kind, hardware, length, identity, flags, current = (*fields[:3], *fields[4:5], *fields[6:8])
    mac = bytes.fromhex(lease.mac.replace(":", ""))
    if kind != 1 or hardware != 1 or length != 6 or fields[11][:6] != mac:
        return None
    if packet[_HEADER.size : _HEADER.size + 4] != _MAGIC:
        return None
    options = _options(packet[_HEADER.size + 4 :])
    own = IPv4Interface(lease.address)
    asked = options.get(53, b"")
    if asked == bytes([_DISCOVER]):
        said = _OFFER
    elif asked == bytes([_REQUEST]):
        wanted = options.get(50) or current
        if options.get(54, _packed(lease.server)) != _packed(lease.server):
            return None
        said = _ACK if wanted == own.ip.packed else _NAK
    elif asked == bytes([_INFORM]):
        said = _ACK
    else:
        return None
    given = b"\0" * 4 if said == _NAK or asked == bytes([_INFORM]) else own.ip.packed
    header = _HEADER.pack(
        2, 1, 6, 0, identity, 0, flags, b"\0" * 4 if said == _NAK else current, given,
        _packed(lease.server), b"\0" * 4, mac.ljust(16, b"\0"), b"", b"",
    )  # fmt: skip
    told = [_option(53, bytes([said])), _option(54, _packed(lease.server))]
    if said != _NAK:
        told += _settings(lease, own, timed=asked != bytes([_INFORM]))
    return (header + _MAGIC + b"".join(told) + b"\xff").ljust(300, b"\0")


def _settings(lease: Lease, own: IPv4Interface, *, timed: bool) -> list[bytes]:
    found = [_option(1, own.netmask.packed), _option(28, own.network.broadcast_address.packed)]
    if timed:
        found.append(_option(51, struct.pack("!I", _FOREVER)))
    for destination, gateway in lease.routes:
        if gateway and destination == "0.0.0.0/0":
            found.append(_option(3, _packed(gateway)))
    routes = b"".join(
        _route(destination, gateway)
        for destination, gateway in lease.routes
        if ":" not in destination
    )
    if routes:
        found.append(_option(121, routes))
    servers = b"".join(_packed(one) for one in lease.nameservers if ":" not in one)
    if servers:
        found.append(_option(6, servers))
    for number, text in ((12, lease.hostname), (15, lease.domain)):
        if text:
            found.append(_option(number, text.encode("ascii", "replace")[:255]))
    if lease.mtu:
        found.append(_option(26, struct.pack("!H", min(lease.mtu, 65535))))
    return found


def _route(destination: str, gateway: str) -> bytes:
    network = IPv4Network(destination)
    size = -(-network.prefixlen // 8)
    way = _packed(gateway) if gateway else b"\0" * 4
    return bytes([network.prefixlen]) + network.network_address.packed[:size] + way


def _packed(address: str) -> bytes:
    return IPv4Address(address).packed


def _option(number: int, data: bytes) -> bytes:
    return bytes([number, len(data)]) + data


def _options(data: bytes) -> dict[int, bytes]:
    """The options as far as they are whole; the first of each counts."""
    found: dict[int, bytes] = {}
    place = 0
    while place < len(data) and data[place] != 255:
        if data[place] == 0:
            place += 1
            continue
        if place + 1 >= len(data) or place + 2 + data[place + 1] > len(data):
            break
        found.setdefault(data[place], data[place + 2 : place + 2 + data[place + 1]])
        place += 2 + data[place + 1]
    return found
