"""Addresses, published ports and cables that pass from one workload to another.

The heir is prepared with the addresses of the one it follows, the hardware address too, on cables
whose outer ends hang on no bridge yet. The switch is one exchange of bridge ports: for everybody
else on the network nothing changes but who answers. Before it new connections are held: their first
packets are dropped, and the client's kernel sends them again a second later (tcp(7)).

    begin(old)       the addresses stay ours whoever gives them back
    prepare(heir)    AttachRequest.heir names the old one, `inherited` completes the request
    hold / lift      connections that begin
    detain / let_go  an old one that has ended keeps its cable on the bridge meanwhile
    exchange         heir and old one change places; again: back
    succeed          the ports, too, are the heir's from now on
    end(…)           who is left has the addresses alone
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from bulkhead.errors import Conflict, NotFound
from bulkhead.linux import netns
from bulkhead.linux import nftables as nft
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.netlink import Message, NetlinkError
from bulkhead.network import attached as shapes
from bulkhead.network import ports
from bulkhead.network.attached import Attached, Records
from bulkhead.network.bridges import Active, Bridges, Endpoint
from bulkhead.network.helperlink import HelperLink
from bulkhead.network.model import AttachRequest, EndpointRequest

TABLE = "bulkhead_hold"
_TCP = 6
_SYN, _ACK = 2, 16
_FLAGS = 13
"""Where a TCP header has them."""
SETTLE_S = 5.0


@dataclass(slots=True)
class Handover:
    """One that is under way; `addresses` by network."""

    old: str
    addresses: list[tuple[Active, str]]


class Handovers:
    """The handovers of one `NetworkManager`, whose parts these are."""

    def __init__(
        self,
        attached: dict[str, Attached],
        pids: dict[str, int],
        bridges: Bridges,
        records: Records,
        link: HelperLink,
        namespace: Callable[[str], AbstractContextManager[int]],
    ) -> None:
        self._attached = attached
        self._pids = pids
        self._bridges = bridges
        self._records = records
        self._link = link
        self._inside = namespace
        self._detained: dict[str, OwnedFd] = {}

    # -- addresses

    def begin(self, workload_id: str) -> Handover:
        """Keep the addresses of an attached workload, whatever becomes of it."""
        made = self._find(workload_id)
        found = []
        for endpoint, active in self._places(made):
            for text in (endpoint.ipv4, endpoint.ipv6):
                if text:
                    active.share(text)
                    found.append((active, text))
        return Handover(workload_id, found)

    def end(self, handover: Handover) -> None:
        """Undo `begin`."""
        for active, text in handover.addresses:
            active.settle(text)

    def inherited(self, request: AttachRequest, old: str) -> AttachRequest:
        """The request of the heir of `old`: same addresses; ports come with `succeed`."""
        made = self._find(old)
        wanted: dict[str, EndpointRequest] = {}
        for endpoint in made.endpoints:
            wanted[endpoint.network] = replace(
                endpoint.request, ipv4=endpoint.ipv4, ipv6=endpoint.ipv6, mac=endpoint.mac
            )
        mode = request.mode
        if made.kind != "bridge":
            return request
        return replace(
            request, mode=mode, endpoints=wanted, ports={}, publish_all=False, mac="", heir=old,
            confined=False,
        )  # fmt: skip

    def _find(self, workload_id: str) -> Attached:
        try:
            return self._attached[workload_id]
        except KeyError:
            raise NotFound(f"workload {workload_id} is not attached to any network") from None

    @contextlib.contextmanager
    def _namespace(self, workload_id: str) -> Iterator[int]:
        held = self._detained.get(workload_id)
        if held is not None:
            yield held.fileno()
            return
        with self._inside(workload_id) as namespace:
            yield namespace

    def _places(self, made: Attached) -> list[tuple[Endpoint, Active]]:
        return [
            (one, self._bridges.active[one.network])
            for one in made.endpoints
            if one.network in self._bridges.active
        ]

    # -- connections that begin

    def hold(self, workload_id: str) -> None:
        """Drop the first packets of connections to the workload from now on."""
        made = self._find(workload_id)
        guest = made.request.guest
        names = [one.name for one in made.endpoints]
        if not names:
            return
        with self._namespace(workload_id) as namespace:
            netns.inside(namespace, lambda: _hold(names, guest=guest))

    def lift(self, workload_id: str) -> None:
        """Let them in again; a namespace that is gone has none."""
        try:
            made = self._find(workload_id)
            if not made.endpoints:
                return
            with self._namespace(workload_id) as namespace:
                netns.inside(namespace, lambda: _lift(guest=made.request.guest))
        except (Conflict, NotFound):
            return

    def sent(self, workload_id: str) -> int:
        """How many packets the workload has sent over its cables."""
        total = 0
        for endpoint in self._find(workload_id).endpoints:
            path = f"/sys/class/net/{endpoint.host_name}/statistics/rx_packets"
            with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
                total += int(file.read())
        return total

    # -- the old one ends

    def detain(self, workload_id: str) -> None:
        """Keep its namespace, and all that the network knows of it, beyond its end."""
        with self._namespace(workload_id) as namespace:
            self._detained[workload_id] = OwnedFd(os.dup(namespace))

    def detained(self, workload_id: str) -> bool:
        """Whether `release` is to wait for `let_go`."""
        return workload_id in self._detained

    def let_go(self, workload_id: str) -> bool:
        """It is detained no longer; whether it was, and `release` is to follow."""
        held = self._detained.pop(workload_id, None)
        if held is not None:
            held.close()
        return held is not None

    # -- the switch

    def exchange(self, old: str, heir: str) -> None:
        """Take the cables of `old` off their bridges and put those of `heir` there."""
        before, made = self._find(old), self._find(heir)
        messages = [
            rt.set_link(name=endpoint.host_name, master=0) for endpoint, _ in self._places(before)
        ]
        messages += self._plugs(made, published=bool(made.ports or before.ports))
        if messages:
            self._bridges.route.transact(messages)

    def plug(self, workload_id: str) -> None:
        """Put its cables on their bridges, if they are not there."""
        made = self._find(workload_id)
        if messages := self._plugs(made, published=bool(made.ports)):
            self._bridges.route.transact(messages)

    def _plugs(self, made: Attached, *, published: bool) -> list[Message]:
        messages = []
        for endpoint, active in self._places(made):
            messages.append(rt.set_link(name=endpoint.host_name, master=active.index, up=True))
            if not active.network.icc:
                messages.append(rt.isolate_port(endpoint.host_name))
            if published:
                messages.append(rt.hairpin_port(endpoint.host_name))
        return messages

    def succeed(self, old: str, heir: str) -> None:
        """The published ports of `old` are those of `heir`, who is an heir no longer.

        Conflict if another program was quicker than we with a port.
        """
        before, made = self._find(old), self._find(heir)
        taken = self._taken(before)
        made.ports, before.ports = before.ports, []
        made.publishing = before.publishing
        for endpoint in made.endpoints:
            known = next(one for one in before.endpoints if one.network == endpoint.network)
            endpoint.request = known.request
        asked = before.request
        made.request = replace(
            made.request, heir="", ports=asked.ports, publish_all=asked.publish_all,
            endpoints=asked.endpoints, mac=asked.mac,
        )  # fmt: skip
        self._told(made, [(one.role, one.held) for one in taken])

    def _taken(self, before: Attached) -> list[ports.Published]:
        """The sockets that hold the ports of `before`, anew: the helper's end with the old one.

        The firewall redirects all the while, so that only who comes by ::1 can meet the moment.
        """
        if not before.ports:
            return []
        held = before.ports
        if not self.detained(before.request.workload_id):
            before.ports = []
            self._told(before, [])
        self._link.settle(SETTLE_S)
        try:
            wanted = [
                ports.Wish(one.protocol, one.port, one.address, one.host_port, one.host_port)
                for one in held
            ]
            taken = ports.take(wanted)
        finally:
            before.ports = held
        return taken

    def _told(self, made: Attached, sockets: shapes.Sockets) -> None:
        """Let file and helper know of it."""
        self._records.write(made)
        self._link.set(made, sockets)
        identity = made.request.workload_id
        pid = self._pids.get(identity)
        if pid is not None and made.served:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._records.write_pid(identity, pid)
            self._link.started(identity, pid)


def _hold(names: list[str], *, guest: bool) -> None:
    """In the namespace: a table that drops what begins a connection."""
    batch = nft.Batch(nft.BRIDGE if guest else nft.INET, TABLE)
    batch.add_table("bulkhead move: new connections wait")
    batch.add_base_chain("in", "filter", "prerouting", -200)
    for name in names:
        batch.add_rule(
            "in",
            [
                *nft.interface_is(nft.META_IIFNAME, name),
                nft.meta(nft.META_L4PROTO),
                nft.compare(bytes((_TCP,))),
                nft.payload(2, _FLAGS, 1),
                nft.mask(1, bytes((_SYN | _ACK,))),
                nft.compare(bytes((_SYN,))),
                nft.verdict(nft.DROP),
            ],
        )
    with nft.connect() as netlink:
        batch.commit(netlink)


def _lift(*, guest: bool) -> None:
    with nft.connect() as netlink:
        batch = nft.Batch(nft.BRIDGE if guest else nft.INET, TABLE)
        batch.delete_table()
        with contextlib.suppress(NetlinkError):
            batch.commit(netlink)
