"""The kernel's table of tracked connections, by ctnetlink: entries found and forgotten.

linux/netfilter/nfnetlink_conntrack.h has the messages. Address translation is decided once per
entry, so that an entry made under other rules has to go for new rules to apply.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from bulkhead.linux.netlink import (
    Message,
    Netlink,
    NetlinkError,
    attribute,
    nested,
    table,
    u8,
    u32,
)

_SUBSYSTEM = 1
_GET, _DELETE = 1, 2
_HEAD = struct.Struct(">BBH")
_ORIGINAL, _REPLY, _STATUS, _ID, _ZONE, _FILTER = 1, 2, 3, 12, 18, 25
_IP, _PROTO = 1, 2
_SOURCE, _DESTINATION = {4: 1, 6: 3}, {4: 2, 6: 4}
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_BY_PROTOCOL, _BY_DESTINATION_PORT = 1 << 3, 1 << 5
SOURCE_TRANSLATED, DESTINATION_TRANSLATED = 1 << 4, 1 << 5


@dataclass(frozen=True, slots=True)
class Tracked:
    """An entry: where its packets were sent to, who answers them, and whether either was changed.

    `key` is for `forget`.
    """

    destination: str
    answerer: tuple[str, int]
    status: int
    key: Message


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _message(kind: int, version: int, what: str, *parts: bytes) -> Message:
    head = _HEAD.pack(_family(version), 0, 0)
    return Message(_SUBSYSTEM << 8 | kind, 0, head + b"".join(parts), what)


def tracked_udp(netlink: Netlink, version: int, port: int) -> list[Tracked]:
    """Every UDP entry whose packets were sent to `port`; `netlink` is of protocol netfilter.

    Kernels since 5.8 choose them themselves, older ones tell the whole table. OSError EINVAL if the
    kernel cannot tell at all.
    """
    number = port.to_bytes(2, "big")
    udp = u8(_NUMBER, socket.IPPROTO_UDP)
    wanted = nested(_ORIGINAL, nested(_PROTO, udp, attribute(_DESTINATION_PORT, number)))
    chosen = nested(_FILTER, u32(1, _BY_PROTOCOL | _BY_DESTINATION_PORT))
    question = _message(_GET, version, "list tracked connections", wanted, chosen)
    found = []
    for reply in netlink.dump(question):
        entry = table(reply.payload, 4)
        original, answer = table(entry[_ORIGINAL]), table(entry[_REPLY])
        there = table(original[_PROTO])
        if there.get(_NUMBER) != bytes((socket.IPPROTO_UDP,)):
            continue
        if there.get(_DESTINATION_PORT) != number or reply.payload[0] != _family(version):
            continue
        key = [nested(_ORIGINAL, entry[_ORIGINAL]), attribute(_ID, entry[_ID])]
        if _ZONE in entry:
            key.append(attribute(_ZONE, entry[_ZONE]))
        found.append(
            Tracked(
                destination=str(ip_address(table(original[_IP])[_DESTINATION[version]])),
                answerer=(
                    str(ip_address(table(answer[_IP])[_SOURCE[version]])),
                    int.from_bytes(table(answer[_PROTO])[_SOURCE_PORT], "big"),
                ),
                status=int.from_bytes(entry[_STATUS], "big"),
                key=_message(_DELETE, version, "forget a tracked connection", *key),
            )
        )
    return found


def forget(netlink: Netlink, entries: Iterable[Tracked]) -> None:
    """Remove entries; those that are gone already are fine."""
    for one in entries:
        try:
            netlink.transact([one.key])
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
