"""Which addresses a network has and who holds them.

Subnets are chosen where the host has no route, outside of the ranges Docker and Podman choose from,
so that engines started later on the same host do not collide with ours. Addresses are given out in
turn, and one that was released is used again only when all others were: neighbours' ARP caches and
the host's connection tracking have forgotten its last holder by then.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)

from bulkhead.errors import Conflict, Invalid, Unavailable

Address = IPv4Address | IPv6Address
Prefix = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface

_HOME = IPv4Network("10.208.0.0/12")
"""First /16 blocks for default bridges, then /20 blocks for user-defined networks."""
_FALLBACKS = tuple(
    [IPv4Network(f"192.168.{third}.0/24") for third in range(96, 128)]
    + [IPv4Network(f"172.{second}.0.0/16") for second in range(31, 17, -1)]
)


def ipv4_candidates(*, default: bool, start: int) -> Iterator[IPv4Network]:
    """Subnets to try, best first; `start` spreads installations over the first choices."""
    blocks = list(_HOME.subnets(new_prefix=16))
    if default:
        first = start % 8
        yield from (blocks[(first + step) % 8] for step in range(8))
    else:
        small = [one for block in blocks[8:] for one in block.subnets(new_prefix=20)]
        first = start % len(small)
        yield from small[first:] + small[:first]
    yield from _FALLBACKS


def ipv6_candidates(identity: str, start: int) -> Iterator[IPv6Network]:
    """Unique local /64 subnets of the /48 that belongs to installation `identity` (40 hex digits
    or more), RFC 4193.
    """
    site = (0xFD << 120) | (int(identity[:10], 16) << 80)
    for step in range(0x10000):
        yield IPv6Network((site | (((start + step) & 0xFFFF) << 64), 64))


def choose(candidates: Iterable[Prefix], busy: Collection[Prefix]) -> Prefix:
    """The first candidate that overlaps nothing in `busy`; Unavailable if all do."""
    for candidate in candidates:
        if not any(
            candidate.version == other.version and candidate.overlaps(other) for other in busy
        ):
            return candidate
    raise Unavailable(
        "all predefined address pools have been fully subnetted; give the network a --subnet"
    )


def parse_subnet(text: str) -> Prefix:
    """A subnet of the Engine API; host bits, unusable sizes and special ranges are Invalid."""
    try:
        network = ip_network(text)
    except ValueError as error:
        raise Invalid(f"invalid subnet {text}: {error}") from None
    if network.is_multicast or network.is_loopback or network.network_address.is_unspecified:
        raise Invalid(f"invalid subnet {text}: not a range for hosts")
    if network.prefixlen > network.max_prefixlen - 2:
        raise Invalid(f"invalid subnet {text}: it has no room for a gateway and a workload")
    return network


def parse_address(text: str, what: str) -> Address:
    """An address of the Engine API; Invalid if it is none."""
    try:
        return ip_address(text)
    except ValueError:
        raise Invalid(f"invalid {what}: {text} is not an IP address") from None


class Pool:
    """The addresses of one subnet."""

    def __init__(
        self,
        subnet: Prefix,
        *,
        gateway: Address | None = None,
        within: Prefix | None = None,
        auxiliary: Iterable[Address] = (),
    ) -> None:
        self.subnet = subnet
        self._make: type[IPv4Address] | type[IPv6Address] = (
            IPv4Address if subnet.version == 4 else IPv6Address
        )
        base = int(subnet.network_address)
        end = int(subnet.broadcast_address)
        self._forbidden = {base} if subnet.version == 6 else {base, end}
        self._held: set[int] = set()
        for one in auxiliary:
            self._check_inside(one, "auxiliary address")
            self._forbidden.add(int(one))
        area = within or subnet
        self._low = int(area.network_address)
        self._high = int(area.broadcast_address)
        if gateway is None:
            number = self._low
            while number in self._forbidden:
                number += 1
            gateway = self._make(number)
        self._check_inside(gateway, "gateway")
        self.gateway: Address = gateway
        self._forbidden.add(int(gateway))
        self._next = self._low
        self._released: deque[int] = deque()

    def _check_inside(self, address: Address, what: str) -> None:
        if address.version != self.subnet.version or address not in self.subnet:
            raise Invalid(f"{what} {address} is not in the subnet {self.subnet}")

    @property
    def empty(self) -> bool:
        """Whether nobody holds an address."""
        return not self._held

    @property
    def held(self) -> int:
        """How many addresses are held."""
        return len(self._held)

    def take(self) -> Address:
        """A free address; Unavailable when there is none."""
        number = self._next
        while number <= self._high:
            if number not in self._forbidden and number not in self._held:
                self._next = number + 1
                self._held.add(number)
                return self._make(number)
            number += 1
        self._next = number
        while self._released:
            number = self._released.popleft()
            if number not in self._held:
                self._held.add(number)
                return self._make(number)
        raise Unavailable(f"no available IPv{self.subnet.version} addresses on {self.subnet}")

    def claim(self, address: Address) -> None:
        """Hold a particular address; Invalid if it cannot be given, Conflict if it is held."""
        if address.version != self.subnet.version or address not in self.subnet:
            raise Invalid(
                f"invalid address {address}: it does not belong to the network's subnet "
                f"{self.subnet}"
            )
        number = int(address)
        if number in self._held or number in self._forbidden:
            raise Conflict("Address already in use", address=str(address))
        self._held.add(number)

    def give(self, address: Address) -> None:
        """Release an address; one that is not held is ignored."""
        number = int(address)
        if number in self._held:
            self._held.discard(number)
            if self._low <= number < self._next:
                self._released.append(number)

    def interface(self, address: Address) -> Interface:
        """The address with the subnet's prefix length."""
        if isinstance(address, IPv4Address):
            return IPv4Interface((address, self.subnet.prefixlen))
        return IPv6Interface((address, self.subnet.prefixlen))


def mac_for(address: Address) -> str:
    """A locally administered MAC address that follows from an IPv4 address, or from IPv6's end."""
    tail = address.packed[-4:]
    return "02:42:" + tail.hex(":")
