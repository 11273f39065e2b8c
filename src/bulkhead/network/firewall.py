"""Our one nftables table: guards between bridges, source NAT, and published ports as map elements.

    table inet bulkhead_<16 hex of the state directory's hash>
      guard    prerouting -300   per bridge: no foreign source, nothing to 127.0.0.0/8
      dnat     prerouting -100   packets to this host's addresses: publish (not from internal)
      local    output -100       the same for the host's own packets
      publish                    maps any4 exact4 any6 exact6: protocol [address] port to both
      forward  forward 0         bridges are closed to each other and to uninvited packets
      snat     postrouting 100   masquerade what leaves, and what comes back in by a published port

A network adds chains of its own and one element to the maps `guard`, `leaving`, `entering`,
`masked` and `arriving`, a published port one element to a map: no rule is ever appended to a shared
chain, so that the cost of a packet does not grow with networks or ports. Accepting here overrides
nobody's drop: other tables' chains at the same hooks still decide, which is how a firewall governs
ours.
"""

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from bulkhead.linux import conntrack
from bulkhead.linux import nftables as nft
from bulkhead.linux.netlink import Netlink, NetlinkError

LOOPBACK4 = IPv4Network("127.0.0.0/8")
LOOPBACK6 = IPv6Network("::1/128")
_LINK_LOCAL6 = IPv6Network("fe80::/10")
_UNSPECIFIED6 = IPv6Network("::/128")
_PROTOCOLS = {"tcp": 6, "udp": 17}
_FILTER = "filter"
_DOCKER_USER = "DOCKER-USER"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the firewall must know of one network."""

    link: str
    subnet4: IPv4Network | None
    subnet6: IPv6Network | None
    internal: bool = False
    icc: bool = True
    masquerade: bool = True
    source4: str = ""
    source6: str = ""
    routed4: bool = False
    routed6: bool = False


@dataclass(frozen=True, slots=True)
class Redirect:
    """A published port: where packets arrive ("" is every address of the host), where they go."""

    protocol: str
    host_address: str
    host_port: int
    address: str
    port: int

    def place(self) -> tuple[str, bytes]:
        """The map and the key."""
        version = ip_address(self.address).version
        protocol = bytes((_PROTOCOLS[self.protocol],))
        port = self.host_port.to_bytes(2, "big")
        if not self.host_address:
            return f"any{version}", nft.joined(protocol, port)
        packed = ip_address(self.host_address).packed
        return f"exact{version}", nft.joined(protocol, packed, port)

    def concerns(self, entry: conntrack.Tracked) -> bool:
        """Whether a tracked connection to the port is one that this redirection decides."""
        if self.host_address and entry.destination != self.host_address:
            return False
        changed = entry.status & (conntrack.SOURCE_TRANSLATED | conntrack.DESTINATION_TRANSLATED)
        # A workload's own connection to that port of somebody else: masqueraded on its way out.
        return changed != conntrack.SOURCE_TRANSLATED

    def value(self) -> bytes:
        """The element's data."""
        packed = ip_address(self.address).packed
        return nft.to_value(nft.joined(packed, self.port.to_bytes(2, "big")))


class Firewall:
    """The table; made with the first network, removed with the last."""

    def __init__(self, name: str, comment: str) -> None:
        self.name = name
        self._comment = comment
        self._links: dict[str, bool] = {}

    @property
    def links(self) -> frozenset[str]:
        """The networks that are up, by link name."""
        return frozenset(self._links)

    def _batch(self) -> nft.Batch:
        return nft.Batch(nft.INET, self.name)

    def up(self, netlink: Netlink, rules: Rules) -> None:
        """Install a network's chains and elements, with the table itself if it is the first."""
        batch = self._batch()
        if not self._links:
            self._skeleton(batch)
        _network_chains(batch, rules)
        batch.commit(netlink)
        self._links[rules.link] = rules.internal

    def down(self, netlink: Netlink, link: str) -> None:
        """Remove a network, and the table with the last one."""
        if link not in self._links:
            return
        internal = self._links.pop(link)
        batch = self._batch()
        if not self._links:
            batch.delete_table()
        else:
            for name in ("guard", "leaving", "entering", "masked", "arriving"):
                batch.delete_elements(name, [nft.interface(link)])
            if internal:
                batch.delete_elements("unpublished", [nft.interface(link)])
            for prefix in ("from_", "out_", "in_", "mask_", "hair_"):
                batch.delete_chain(prefix + link)
        batch.commit(netlink)

    def rebuild(
        self, netlink: Netlink, networks: Iterable[Rules], redirects: Iterable[Redirect]
    ) -> None:
        """Replace the whole table, whatever is in it, by one for these networks and ports."""
        batch = self._batch()
        batch.add_table(self._comment)
        batch.delete_table()
        self._links = {}
        for rules in networks:
            if not self._links:
                self._skeleton(batch)
            _network_chains(batch, rules)
            self._links[rules.link] = rules.internal
        for one in redirects:
            name, key = one.place()
            batch.add_elements(name, [(key, one.value())])
        batch.commit(netlink)

    def publish(self, netlink: Netlink, redirects: Iterable[Redirect]) -> None:
        """Add published ports, all or none."""
        batch = self._batch()
        grouped: dict[str, list[tuple[bytes, bytes]]] = {}
        for one in redirects:
            name, key = one.place()
            grouped.setdefault(name, []).append((key, one.value()))
        for name, elements in grouped.items():
            batch.add_elements(name, elements)
        batch.commit(netlink)

    def unpublish(self, netlink: Netlink, redirects: Iterable[Redirect]) -> None:
        """Take published ports out, all or none."""
        batch = self._batch()
        grouped: dict[str, list[bytes]] = {}
        for one in redirects:
            name, key = one.place()
            grouped.setdefault(name, []).append(key)
        for name, keys in grouped.items():
            batch.delete_elements(name, keys)
        batch.commit(netlink)

    def remove_leftover(self, netlink: Netlink) -> None:
        """Remove the table an earlier engine on this state directory left behind."""
        if any(t.name == self.name and t.family == nft.INET for t in nft.tables(netlink)):
            batch = self._batch()
            batch.delete_table()
            batch.commit(netlink)
        self._links.clear()

    def others(self, netlink: Netlink) -> bool:
        """Whether another bulkhead or a Docker also has a table that wants forwarding."""
        prefix = self.name.split("_", 1)[0] + "_"
        if any(t.name.startswith(prefix) and t.name != self.name for t in nft.tables(netlink)):
            return True
        return any(
            nft.chain_exists(netlink, f, _FILTER, _DOCKER_USER) for f in (nft.IPV4, nft.IPV6)
        )

    def _skeleton(self, batch: nft.Batch) -> None:
        batch.add_table(self._comment)
        for name in ("guard", "leaving", "entering", "masked", "arriving", "unpublished"):
            batch.add_map(name, nft.MapType((nft.IFNAME,)))
        for version, kind in ((4, nft.IPV4_ADDR), (6, nft.IPV6_ADDR)):
            data = (kind, nft.SERVICE)
            batch.add_map(f"any{version}", nft.MapType((nft.PROTO, nft.SERVICE), data))
            batch.add_map(f"exact{version}", nft.MapType((nft.PROTO, kind, nft.SERVICE), data))
        batch.add_chain("publish")
        batch.add_base_chain("guard", "filter", "prerouting", -300)
        batch.add_base_chain("dnat", "nat", "prerouting", -100)
        batch.add_base_chain("local", "nat", "output", -100)
        batch.add_base_chain("forward", "filter", "forward", 0)
        batch.add_base_chain("snat", "nat", "postrouting", 100)
        _publish_rules(batch)
        incoming, outgoing = nft.meta(nft.META_IIFNAME), nft.meta(nft.META_OIFNAME)
        batch.add_rule("guard", [incoming, nft.lookup("guard", into=0)])
        batch.add_rule("dnat", [incoming, nft.lookup("unpublished", into=0)])
        batch.add_rule("dnat", [*nft.local_destination(), nft.jump("publish")])
        batch.add_rule("local", [*nft.local_destination(), nft.jump("publish")])
        known = nft.conntrack(nft.CT_STATE, nft.CT_ESTABLISHED_RELATED)
        invited = nft.conntrack(nft.CT_STATUS, nft.CT_STATUS_DNAT)
        batch.add_rule("forward", [*known, nft.verdict(nft.ACCEPT)])
        batch.add_rule("forward", [incoming, nft.lookup("leaving", into=0)])
        batch.add_rule("forward", [*invited, nft.verdict(nft.ACCEPT)])
        batch.add_rule("forward", [outgoing, nft.lookup("entering", into=0)])
        batch.add_rule("snat", [incoming, nft.lookup("masked", into=0)])
        batch.add_rule("snat", [outgoing, nft.lookup("arriving", into=0)])
        # A local client of a port published on 127.0.0.1: its source must become the bridge's.
        own = [*nft.family_is(4), *nft.address_in(LOOPBACK4, source=True)]
        batch.add_rule("snat", [*own, *invited, nft.masquerade()])


def _publish_rules(batch: nft.Batch) -> None:
    first = nft.R0
    for version, offset, size in ((4, 16, 4), (6, 24, 16)):
        words = size // 4
        protocol = nft.meta(nft.META_L4PROTO)
        target = nft.destination_nat(version, first, first + words)
        family = nft.family_is(version)
        if version == 6:
            # The kernel cannot redirect from ::1 (the relay serves it, network/helper.py).
            inside = nft.address_in(LOOPBACK6, source=False)
            batch.add_rule("publish", [*family, *inside, nft.leave()])
        exact = [
            *family,
            protocol,
            nft.payload(1, offset, size, first + 1),
            nft.payload(2, 2, 2, first + 1 + words),
            nft.lookup(f"exact{version}", into=first),
            target,
        ]
        wild = [
            *family,
            protocol,
            nft.payload(2, 2, 2, first + 1),
            nft.lookup(f"any{version}", into=first),
            target,
        ]
        batch.add_rule("publish", exact)
        batch.add_rule("publish", wild)


def _network_chains(batch: nft.Batch, rules: Rules) -> None:
    link = rules.link
    prefixes = ("from_", "out_", "in_", "mask_", "hair_")
    guard, out, into, mask, hair = (prefix + link for prefix in prefixes)
    for chain in (guard, out, into, mask, hair):
        batch.add_chain(chain)
    _guard_rules(batch, guard, rules)
    drop, accept = nft.verdict(nft.DROP), nft.verdict(nft.ACCEPT)
    invited = nft.conntrack(nft.CT_STATUS, nft.CT_STATUS_DNAT)
    same = nft.interface_is(nft.META_OIFNAME, link)
    if rules.icc:
        batch.add_rule(out, [*same, accept])
    else:
        batch.add_rule(out, [*same, *invited, accept])
        batch.add_rule(out, [*same, drop])
    if rules.internal:
        batch.add_rule(out, [drop])
        batch.add_rule(into, [drop])
    for version, routed in ((4, rules.routed4), (6, rules.routed6)):
        if not rules.internal:
            batch.add_rule(into, [*nft.family_is(version), accept if routed else drop])
    batch.add_rule(mask, [*same, *invited, nft.masquerade()])
    # The same once more by source: with br_netfilter such packets never leave the bridge, and have
    # no incoming interface here.
    for subnet in (rules.subnet4, rules.subnet6):
        if subnet is None:
            continue
        inside = [*nft.family_is(subnet.version), *nft.address_in(subnet, source=True)]
        batch.add_rule(hair, [*inside, *invited, nft.masquerade()])
    batch.add_rule(mask, [*same, nft.leave()])
    for version, routed, source in (
        (4, rules.routed4, rules.source4),
        (6, rules.routed6, rules.source6),
    ):
        if not rules.masquerade or routed or rules.internal:
            continue
        family = nft.family_is(version)
        if source:
            load = nft.immediate(ip_address(source).packed)
            batch.add_rule(mask, [*family, load, nft.source_nat(version, nft.R0)])
        else:
            batch.add_rule(mask, [*family, nft.masquerade()])
    key = nft.interface(link)
    batch.add_elements("guard", [(key, nft.to_chain(guard))])
    batch.add_elements("leaving", [(key, nft.to_chain(out))])
    batch.add_elements("entering", [(key, nft.to_chain(into))])
    batch.add_elements("masked", [(key, nft.to_chain(mask))])
    batch.add_elements("arriving", [(key, nft.to_chain(hair))])
    if rules.internal:
        batch.add_elements("unpublished", [(key, nft.to_verdict(nft.ACCEPT))])


def _guard_rules(batch: nft.Batch, chain: str, rules: Rules) -> None:
    drop = nft.verdict(nft.DROP)
    four, six = nft.family_is(4), nft.family_is(6)
    if rules.subnet4 is None:
        batch.add_rule(chain, [*four, drop])
    else:
        # route_localnet (for ports published on 127.0.0.1) would let these in: the kernel's own
        # check for martians is off then. CVE-2020-8558 was the lack of this rule elsewhere.
        batch.add_rule(chain, [*four, *nft.address_in(LOOPBACK4, source=False), drop])
        foreign = nft.address_in(rules.subnet4, source=True, inside=False)
        batch.add_rule(chain, [*four, *foreign, drop])
    if rules.subnet6 is None:
        batch.add_rule(chain, [*six, drop])
    else:
        for fine in (rules.subnet6, _LINK_LOCAL6, _UNSPECIFIED6):
            batch.add_rule(chain, [*six, *nft.address_in(fine, source=True), nft.leave()])
        batch.add_rule(chain, [*six, drop])


def forget_flows(netlink: Netlink, redirects: Iterable[Redirect], *, published: bool) -> None:
    """Let UDP packets that came to these ports before be judged anew.

    A client that goes on sending keeps the kernel's entry alive, and would be led for ever to where
    the port led when it began. With `published` entries that lead there already stay.
    """
    for one in redirects:
        if one.protocol != "udp":
            continue
        version = ip_address(one.address).version
        try:
            entries = conntrack.tracked_udp(netlink, version, one.host_port)
        except NetlinkError as error:
            if error.errno != errno.EINVAL:
                raise
            # A kernel without nf_conntrack_netlink, as doctor() says.
            return
        stale = [
            entry
            for entry in entries
            if one.concerns(entry) and not (published and entry.answerer == (one.address, one.port))
        ]
        conntrack.forget(netlink, stale)


def open_docker_user(netlink: Netlink, tag: str, links: Iterable[str]) -> None:
    """Make the rules tagged `tag` in Docker's DOCKER-USER chains, where they exist, be for `links`.

    Docker's own FORWARD chain drops what it does not know; DOCKER-USER is the place it keeps for
    others and never empties. Such a rule accepts for Docker's table only.
    """
    wanted = {f"{tag} {way} {link}": (way, link) for link in links for way in ("from", "to")}
    for family in (nft.IPV4, nft.IPV6):
        if not nft.chain_exists(netlink, family, _FILTER, _DOCKER_USER):
            continue
        present = {}
        batch = nft.Batch(family, _FILTER)
        changed = False
        for rule in nft.rules(netlink, family, _FILTER, _DOCKER_USER):
            if not rule.comment.startswith(tag + " "):
                continue
            if rule.comment in wanted and rule.comment not in present:
                present[rule.comment] = rule.handle
            else:
                batch.delete_rule(_DOCKER_USER, rule.handle)
                changed = True
        for note, (way, link) in wanted.items():
            if note in present:
                continue
            key = nft.META_IIFNAME if way == "from" else nft.META_OIFNAME
            # Written as iptables-nft writes it, so that `iptables -L` still understands the chain.
            match = nft.interface_is(key, link)
            rule_parts = [*match, nft.counter(), nft.verdict(nft.ACCEPT)]
            batch.add_rule(_DOCKER_USER, rule_parts, first=True, note=note)
            changed = True
        if changed:
            batch.commit(netlink)
