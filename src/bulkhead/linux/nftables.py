"""nftables by nfnetlink: tables, chains, maps, elements and rules, encoded here; no nft program.

nft(8) explains the language, linux/netfilter/nf_tables.h the messages. A `Batch` collects requests
that the kernel carries out all or not at all. Rules are lists of expressions, each the encoding of
one instruction for the kernel's virtual machine; registers 8 to 23 hold 4 bytes each (1 to 4 are
names for groups of four of them).
"""

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from bulkhead.linux.netlink import (
    F_APPEND,
    F_CREATE,
    NETLINK_NETFILTER,
    Message,
    Netlink,
    NetlinkError,
    Reply,
    attribute,
    attributes,
    be32,
    nested,
    string,
    table,
    text,
)

INET = 1
IPV4 = 2
IPV6 = 10
BRIDGE = 7

_SUBSYSTEM = 10
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _GETCHAIN, _DELCHAIN = 3, 4, 5
_NEWRULE, _GETRULE, _DELRULE = 6, 7, 8
_NEWSET, _GETSET, _DELSET = 9, 10, 11
_NEWELEM, _GETELEM, _DELELEM = 12, 13, 14
_HEAD = struct.Struct(">BBH")

HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
DROP, ACCEPT = 0, 1
_JUMP, _GOTO, _RETURN = -3, -4, -5
_VERDICT_TYPE = 0xFFFFFF00
_SET_MAP = 8

PROTO, SERVICE, IPV4_ADDR, IPV6_ADDR, IFNAME = 12, 13, 7, 8, 41
"""nft(8)'s numbers of data types, so that it lists our maps readably."""
_SIZES = {PROTO: 1, SERVICE: 2, IPV4_ADDR: 4, IPV6_ADDR: 16, IFNAME: 16}

EXPRESSION = bytes
R0 = 8
"""The first 4-byte register."""


def connect() -> Netlink:
    """A socket for these messages in the calling thread's network namespace."""
    return Netlink(NETLINK_NETFILTER)


def _message(kind: int, family: int, flags: int, what: str, *parts: bytes) -> Message:
    head = _HEAD.pack(family, 0, 0)
    return Message(_SUBSYSTEM << 8 | kind, flags, head + b"".join(parts), what)


def _expression(name: str, *parts: bytes) -> EXPRESSION:
    return nested(1, text(1, name), nested(2, *parts))


def _data(kind: int, value: bytes) -> bytes:
    return nested(kind, attribute(1, value))


def meta(key: int, register: int = R0) -> EXPRESSION:
    """Load packet metadata."""
    return _expression("meta", be32(1, register), be32(2, key))


META_IIFNAME, META_OIFNAME, META_NFPROTO, META_L4PROTO = 6, 7, 15, 16
_META_PROTOCOL = 1
ETHER_IPV4, ETHER_ARP = 0x0800, 0x0806


def compare(value: bytes, *, equal: bool = True, register: int = R0) -> EXPRESSION:
    """Go on only if the register (does not) hold `value`."""
    return _expression("cmp", be32(1, register), be32(2, 0 if equal else 1), _data(3, value))


def payload(base: int, offset: int, size: int, register: int = R0) -> EXPRESSION:
    """Load packet bytes; base 0 is the Ethernet header, 1 the network header, 2 the transport's."""
    return _expression("payload", be32(1, register), be32(2, base), be32(3, offset), be32(4, size))


def mask(size: int, value: bytes, register: int = R0) -> EXPRESSION:
    """Clear the register's bits that are not in `value`."""
    return _expression(
        "bitwise",
        be32(1, register),
        be32(2, register),
        be32(3, size),
        _data(4, value),
        _data(5, bytes(size)),
    )


def lookup(name: str, *, register: int = R0, into: int | None = None) -> EXPRESSION:
    """Look the register up in a set or map, break if absent; `into` 0 takes a verdict."""
    parts = [text(1, name), be32(2, register)]
    if into is not None:
        parts.append(be32(3, into))
    return _expression("lookup", *parts)


def local_destination() -> list[EXPRESSION]:
    """Go on only if the packet's destination is an address of this host (fib daddr type local)."""
    return [
        _expression("fib", be32(1, R0), be32(2, 3), be32(3, 2)),
        compare(struct.pack("=I", 2)),
    ]


def conntrack(key: int, bits: int) -> list[EXPRESSION]:
    """Go on only if one of `bits` is set in the connection's state (key 0) or status (key 2)."""
    return [
        _expression("ct", be32(1, R0), be32(2, key)),
        mask(4, struct.pack("=I", bits)),
        compare(bytes(4), equal=False),
    ]


CT_STATE, CT_STATUS = 0, 2
CT_ESTABLISHED_RELATED = 2 | 4
CT_STATUS_DNAT = 32


def verdict(code: int) -> EXPRESSION:
    """End with DROP or ACCEPT."""
    return _expression("immediate", be32(1, 0), nested(2, nested(2, be32(1, code))))


def jump(chain: str) -> EXPRESSION:
    """Continue in `chain`, then return."""
    code = be32(1, _JUMP & 0xFFFFFFFF)
    return _expression("immediate", be32(1, 0), nested(2, nested(2, code, text(2, chain))))


def leave() -> EXPRESSION:
    """Return to the calling chain."""
    return verdict(_RETURN & 0xFFFFFFFF)


def masquerade() -> EXPRESSION:
    """Replace the source by the address of the outgoing interface."""
    return _expression("masq")


def source_nat(version: int, register: int) -> EXPRESSION:
    """Replace the source by the address in the register."""
    family = IPV4 if version == 4 else IPV6
    return _expression("nat", be32(1, 0), be32(2, family), be32(3, register), be32(4, register))


def immediate(value: bytes, register: int = R0) -> EXPRESSION:
    """Load a constant."""
    return _expression("immediate", be32(1, register), _data(2, value))


def destination_nat(version: int, address: int, port: int) -> EXPRESSION:
    """Redirect to the address and port in the two registers."""
    family = IPV4 if version == 4 else IPV6
    return _expression(
        "nat", be32(1, 1), be32(2, family), be32(3, address), be32(4, address), be32(5, port),
        be32(6, port),
    )  # fmt: skip


def counter() -> EXPRESSION:
    """Count packets and bytes."""
    return _expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8)))


def interface_is(key: int, name: str, *, equal: bool = True) -> list[EXPRESSION]:
    """Go on only if the incoming or outgoing interface is (not) called `name`."""
    return [meta(key), compare(interface(name), equal=equal)]


def family_is(version: int) -> list[EXPRESSION]:
    """Go on only for IPv4 or only for IPv6 packets."""
    return [meta(META_NFPROTO), compare(bytes((IPV4 if version == 4 else IPV6,)))]


def address_in(
    network: IPv4Network | IPv6Network, *, source: bool, inside: bool = True
) -> list[EXPRESSION]:
    """Go on only if source or destination is (not) in `network`; for packets of that family."""
    size = network.max_prefixlen // 8
    if network.version == 4:
        offset = 12 if source else 16
    else:
        offset = 8 if source else 24
    made = [payload(1, offset, size)]
    if network.prefixlen < network.max_prefixlen:
        made.append(mask(size, network.netmask.packed))
    made.append(compare(network.network_address.packed, equal=inside))
    return made


def ether_type_is(number: int) -> list[EXPRESSION]:
    """Go on only for frames of that Ethernet type; in the bridge family."""
    return [meta(_META_PROTOCOL), compare(number.to_bytes(2, "big"))]


def arp_address_is(address: IPv4Address, *, sender: bool) -> list[EXPRESSION]:
    """Go on only if an ARP packet names `address` as its sender, or as whom it looks for."""
    return [payload(1, 14 if sender else 24, 4), compare(address.packed)]


def ether_source_is(mac: bytes) -> list[EXPRESSION]:
    """Go on only for frames from that MAC address."""
    return [payload(0, 6, 6), compare(mac)]


def ether_to_many() -> list[EXPRESSION]:
    """Go on only for frames to a group or to all."""
    return [payload(0, 0, 1), mask(1, b"\1"), compare(b"\0", equal=False)]


def interface(name: str) -> bytes:
    """An interface's name as the 16 bytes that registers hold."""
    return name.encode().ljust(16, b"\0")


def joined(*fields: bytes) -> bytes:
    """A concatenation: each field padded to whole registers."""
    return b"".join(one + b"\0" * (-len(one) & 3) for one in fields)


def to_chain(chain: str, *, back: bool = True) -> bytes:
    """A map element's verdict: jump to `chain` (and come back), or go there for good."""
    code = be32(1, (_JUMP if back else _GOTO) & 0xFFFFFFFF)
    return nested(2, nested(2, code, text(2, chain)))


def to_verdict(code: int) -> bytes:
    """A map element's verdict DROP or ACCEPT."""
    return nested(2, nested(2, be32(1, code)))


def to_value(value: bytes) -> bytes:
    """A map element's data."""
    return _data(2, value)


@dataclass(frozen=True, slots=True)
class MapType:
    """What a map goes from and to: data types; `values` () means verdicts."""

    keys: tuple[int, ...]
    values: tuple[int, ...] = ()


def _type_number(types: Sequence[int]) -> int:
    number = 0
    for one in types:
        number = number << 6 | one
    return number


def _type_size(types: Sequence[int]) -> int:
    if len(types) == 1:
        return _SIZES[types[0]]
    return sum((_SIZES[one] + 3) & ~3 for one in types)


class Batch:
    """Requests on one table, carried out together by `commit`."""

    def __init__(self, family: int, name: str) -> None:
        self.family = family
        self.table = name
        self._messages: list[Message] = []
        self._sets = 0

    def _add(self, kind: int, flags: int, what: str, *parts: bytes) -> None:
        self._messages.append(
            _message(kind, self.family, flags, f"nftables {self.table}: {what}", *parts)
        )

    def add_table(self, comment: str = "") -> None:
        """Make the table unless it exists."""
        parts = [text(1, self.table)]
        if comment:
            parts.append(attribute(6, _comment(comment)))
        self._add(_NEWTABLE, F_CREATE, "create table", *parts)

    def delete_table(self) -> None:
        """Remove the table and all in it."""
        self._add(_DELTABLE, 0, "delete table", text(1, self.table))

    def add_chain(self, name: str) -> None:
        """Make a chain that others jump to."""
        self._add(_NEWCHAIN, F_CREATE, f"create chain {name}", text(1, self.table), text(3, name))

    def add_base_chain(self, name: str, kind: str, hook: str, priority: int) -> None:
        """Make a chain that the kernel calls at `hook`; policy accept."""
        place = nested(4, be32(1, HOOKS[hook]), be32(2, priority & 0xFFFFFFFF))
        self._add(
            _NEWCHAIN,
            F_CREATE,
            f"create chain {name}",
            text(1, self.table),
            text(3, name),
            place,
            be32(5, ACCEPT),
            text(7, kind),
        )

    def flush_chain(self, name: str) -> None:
        """Remove a chain's rules."""
        self._add(_DELRULE, 0, f"flush chain {name}", text(1, self.table), text(2, name))

    def delete_chain(self, name: str) -> None:
        """Remove a chain nothing refers to, with its rules."""
        self.flush_chain(name)
        self._add(_DELCHAIN, 0, f"delete chain {name}", text(1, self.table), text(3, name))

    def add_map(self, name: str, kind: MapType) -> None:
        """Make a map."""
        self._sets += 1
        # Only for nft(8)'s listing: names are in host order (1), all else is big-endian (2).
        order = 1 if kind.keys == (IFNAME,) else 2
        self._add(
            _NEWSET,
            F_CREATE,
            f"create map {name}",
            text(1, self.table),
            text(2, name),
            be32(3, _SET_MAP),
            be32(4, _type_number(kind.keys)),
            be32(5, _type_size(kind.keys)),
            be32(6, _type_number(kind.values) if kind.values else _VERDICT_TYPE),
            be32(7, _type_size(kind.values) if kind.values else 0),
            be32(10, self._sets),
            attribute(13, struct.pack("=BBI", 0, 4, order)),
        )

    def add_elements(self, name: str, elements: Iterable[tuple[bytes, bytes]]) -> None:
        """Put (key, `to_…`) pairs into a map."""
        listed = [nested(1, _data(1, key), value) for key, value in elements]
        self._elements(_NEWELEM, F_CREATE, f"add to map {name}", name, listed)

    def delete_elements(self, name: str, keys: Iterable[bytes]) -> None:
        """Take keys out of a map; each must be there."""
        listed = [nested(1, _data(1, key)) for key in keys]
        self._elements(_DELELEM, 0, f"take from map {name}", name, listed)

    def _elements(self, kind: int, flags: int, what: str, name: str, listed: list[bytes]) -> None:
        # An attribute is at most 64 KiB long, so that many elements need several messages.
        for start in range(0, len(listed), 400):
            part = nested(3, *listed[start : start + 400])
            self._add(kind, flags, what, text(1, self.table), text(2, name), part)

    def flush_map(self, name: str) -> None:
        """Take everything out of a map."""
        self._add(_DELELEM, 0, f"flush map {name}", text(1, self.table), text(2, name))

    def add_rule(
        self, chain: str, expressions: Iterable[EXPRESSION], *, first: bool = False, note: str = ""
    ) -> None:
        """Append (or with `first` prepend) a rule; `note` is kept as its comment."""
        parts = [text(1, self.table), text(2, chain), nested(4, *expressions)]
        if note:
            parts.append(attribute(7, _comment(note)))
        flags = F_CREATE if first else F_CREATE | F_APPEND
        self._add(_NEWRULE, flags, f"add rule to {chain}", *parts)

    def delete_rule(self, chain: str, handle: int) -> None:
        """Remove the rule with that handle."""
        place = attribute(3, struct.pack(">Q", handle))
        self._add(
            _DELRULE, 0, f"delete rule of {chain}", text(1, self.table), text(2, chain), place
        )

    def commit(self, netlink: Netlink) -> None:
        """Carry everything out, or nothing: NetlinkError names the request that was refused."""
        head = _HEAD.pack(socket.AF_UNSPEC, 0, _SUBSYSTEM)
        messages, self._messages = self._messages, []
        netlink.batch(Message(0x10, 0, head, "nftables"), messages, Message(0x11, 0, head, ""))


def _comment(value: str) -> bytes:
    """User data as nft(8) and iptables-nft keep comments: type 0, length, text."""
    raw = value.encode()[:250] + b"\0"
    return bytes((0, len(raw))) + raw


@dataclass(frozen=True, slots=True)
class Table:
    """A table: family, name and comment."""

    family: int
    name: str
    comment: str


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; `hook` is -1 and `policy` ACCEPT if it is no base chain."""

    family: int
    table: str
    name: str
    hook: int
    kind: str
    policy: int


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule's handle and comment."""

    handle: int
    comment: str


def _user_comment(data: bytes) -> str:
    if len(data) >= 2 and data[0] == 0:
        return string(data[2 : 2 + data[1]])
    return ""


def tables(netlink: Netlink) -> list[Table]:
    """Every table of the namespace."""
    result = []
    for reply in netlink.dump(_message(_GETTABLE, 0, 0, "list tables")):
        found = table(reply.payload, 4)
        result.append(
            Table(reply.payload[0], string(found.get(1, b"")), _user_comment(found.get(6, b"")))
        )
    return result


def chains(netlink: Netlink) -> list[Chain]:
    """Every chain of the namespace."""
    return [_parse_chain(reply) for reply in netlink.dump(_message(_GETCHAIN, 0, 0, "list chains"))]


def chain_exists(netlink: Netlink, family: int, table_name: str, name: str) -> bool:
    """Whether there is such a chain."""
    try:
        netlink.request(
            _message(_GETCHAIN, family, 0, f"chain {name}", text(1, table_name), text(3, name))
        )
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def _parse_chain(reply: Reply) -> Chain:
    found = table(reply.payload, 4)
    hook = -1
    if 4 in found:
        hook = int.from_bytes(table(found[4]).get(1, b"\0\0\0\0"), "big")
    return Chain(
        family=reply.payload[0],
        table=string(found.get(1, b"")),
        name=string(found.get(3, b"")),
        hook=hook,
        kind=string(found.get(7, b"")),
        policy=int.from_bytes(found[5], "big") if 5 in found else ACCEPT,
    )


def rules(netlink: Netlink, family: int, table_name: str, chain: str) -> list[Rule]:
    """The rules of one chain, in order; none if the chain does not exist."""
    question = _message(_GETRULE, family, 0, "list rules", text(1, table_name), text(2, chain))
    try:
        replies = netlink.dump(question)
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    result = []
    for reply in replies:
        found = table(reply.payload, 4)
        if string(found.get(2, b"")) != chain:
            continue
        handle = int.from_bytes(found.get(3, b""), "big")
        result.append(Rule(handle, _user_comment(found.get(7, b""))))
    return result


def element_keys(netlink: Netlink, family: int, table_name: str, name: str) -> list[bytes]:
    """The keys in a map; none if it does not exist."""
    question = _message(_GETELEM, family, 0, f"list map {name}", text(1, table_name), text(2, name))
    try:
        replies = netlink.dump(question)
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    keys = []
    for reply in replies:
        listed = table(reply.payload, 4).get(3, b"")
        for _, element in attributes(listed):
            key = table(element).get(1)
            if key:
                keys.append(table(key).get(1, b""))
    return keys
