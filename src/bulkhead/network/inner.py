"""What is set up inside a workload's network namespace for names: sockets and a redirection.

The resolver listens on free ports of 127.0.0.11; the namespace's own nftables table sends port 53
of that address there. Port 53 itself stays free, so that a workload can be a name server.

In a guest's namespace (network/tap.py) nobody else is, and it listens on port 53 of an address
beside the guest.
"""

import socket
from ipaddress import IPv4Address, IPv4Network

from bulkhead.linux import nftables as nft

ADDRESS = "127.0.0.11"
GUEST_ADDRESS = "169.254.53.53"
TABLE = "bulkhead_names"
_FREEBIND = 15


def resolver_sockets(
    udp_port: int = 0, tcp_port: int = 0, *, address: str = ADDRESS
) -> tuple[socket.socket, socket.socket]:
    """(UDP, TCP) sockets on our address in the calling thread's namespace."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # A guest's namespace gets the address only later; ip(7).
        udp.setsockopt(socket.IPPROTO_IP, _FREEBIND, 1)
        udp.bind((address, udp_port))
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            tcp.setsockopt(socket.IPPROTO_IP, _FREEBIND, 1)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind((address, tcp_port))
            tcp.listen(64)
        except BaseException:
            tcp.close()
            raise
    except BaseException:
        udp.close()
        raise
    return udp, tcp


def redirect(udp_port: int, tcp_port: int) -> None:
    """Send 127.0.0.11 port 53 to these ports, in the calling thread's namespace."""
    batch = nft.Batch(nft.INET, TABLE)
    batch.add_table("bulkhead: names are answered at 127.0.0.11")
    batch.add_base_chain("output", "nat", "output", -100)
    there = IPv4Network(ADDRESS)
    for number, port in ((17, udp_port), (6, tcp_port)):
        rule = [
            *nft.family_is(4),
            *nft.address_in(there, source=False),
            nft.meta(nft.META_L4PROTO),
            nft.compare(bytes((number,))),
            nft.payload(2, 2, 2),
            nft.compare((53).to_bytes(2, "big")),
            nft.immediate(IPv4Address(ADDRESS).packed, nft.R0),
            nft.immediate(port.to_bytes(2, "big"), nft.R0 + 1),
            nft.destination_nat(4, nft.R0, nft.R0 + 1),
        ]
        batch.add_rule("output", rule)
    with nft.connect() as netlink:
        batch.commit(netlink)


def prepare_guest() -> tuple[socket.socket, socket.socket]:
    """The sockets for a guest, in the calling thread's namespace."""
    return resolver_sockets(53, 53, address=GUEST_ADDRESS)


def prepare() -> tuple[socket.socket, socket.socket]:
    """Both, in the calling thread's namespace."""
    udp, tcp = resolver_sockets()
    try:
        redirect(udp.getsockname()[1], tcp.getsockname()[1])
    except BaseException:
        udp.close()
        tcp.close()
        raise
    return udp, tcp
