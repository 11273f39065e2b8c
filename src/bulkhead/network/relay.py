"""Carrying connections to published ports that the firewall cannot redirect.

That is: to ::1 (the kernel has no route_localnet for IPv6), and over IPv6 to workloads that have
IPv4 only. Whatever else arrives at a published port is redirected before it gets here.
"""

import socket
from dataclasses import dataclass, field

from bulkhead.network.loop import READ, WRITE, Loop, Timer

_CHUNK = 1 << 16
MOST_CONNECTIONS = 1024
MOST_FLOWS = 512
FLOW_IDLE_S = 90.0
CONNECT_S = 30.0
_PKTINFO4, _PKTINFO6 = 8, 50
_RECVPKTINFO6 = 49

Target = tuple[str, int]


@dataclass(slots=True)
class Door:
    """One held port and where it leads; `target` None: nothing there (yet)."""

    workload: str
    protocol: str
    held: socket.socket
    target: Target | None
    connections: set["Connection"] = field(default_factory=set)
    flows: dict[tuple[str, int], "Flow"] = field(default_factory=dict)


class Relay:
    """Serves doors on one loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def open(self, door: Door) -> None:
        """Begin to serve its socket, which this object owns from now on."""
        door.held.setblocking(False)
        fd = door.held.fileno()
        if door.protocol == "tcp":
            self._loop.watch(fd, READ, lambda _: self._accept(door))
            return
        six = door.held.family == socket.AF_INET6
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        door.held.setsockopt(level, _RECVPKTINFO6 if six else _PKTINFO4, 1)
        self._loop.watch(fd, READ, lambda _: self._datagram(door))

    def close(self, door: Door) -> None:
        """Stop serving it, close its socket and everything that came through it."""
        self._loop.forget(door.held.fileno())
        door.held.close()
        for connection in list(door.connections):
            connection.close()
        for flow in list(door.flows.values()):
            flow.close()

    def _accept(self, door: Door) -> None:
        try:
            client, _ = door.held.accept()
        except OSError:
            return
        if door.target is None or len(door.connections) >= MOST_CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        try:
            server = _toward(door.target, socket.SOCK_STREAM)
        except OSError:
            client.close()
            return
        door.connections.add(Connection(self._loop, door, client, server))

    def _datagram(self, door: Door) -> None:
        try:
            data, ancillary, _flags, client = door.held.recvmsg(65535, 256)
        except OSError:
            return
        if door.target is None:
            return
        key = (client[0], client[1])
        flow = door.flows.get(key)
        if flow is None:
            if len(door.flows) >= MOST_FLOWS:
                return
            try:
                server = _toward(door.target, socket.SOCK_DGRAM)
            except OSError:
                return
            flow = Flow(self._loop, door, client, key, server)
            door.flows[key] = flow
        flow.forward(data, _answer_from(ancillary))


def _toward(target: Target, kind: int) -> socket.socket:
    """A socket that is connecting, or for datagrams connected, to the target."""
    made = socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, kind)
    made.setblocking(False)
    try:
        code = made.connect_ex(target)
        if code not in (0, 115):
            raise OSError(code, "cannot connect")
    except BaseException:
        made.close()
        raise
    return made


def _answer_from(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """What makes an answer leave from the address the question was sent to; ip(7), ipv6(7)."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == _PKTINFO6 and len(data) >= 20:
            # The interface matters for link-local addresses only.
            index = data[16:20] if data[:2] == b"\xfe\x80" else bytes(4)
            return [(level, kind, data[:16] + index)]
        if level == socket.IPPROTO_IP and kind == _PKTINFO4 and len(data) >= 12:
            return [(level, kind, bytes(4) + data[8:12] + bytes(4))]
    return []


class _Side:
    """One end of a relayed connection, with what is still to be sent to it."""

    __slots__ = ("ended", "output", "shut", "socket")

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.output = b""
        self.ended = False
        self.shut = False


class Connection:
    """A client's TCP connection and ours to the workload; half-closed ends are passed on."""

    def __init__(
        self, loop: Loop, door: Door, client: socket.socket, server: socket.socket
    ) -> None:
        self._loop = loop
        self._door = door
        self._client = _Side(client)
        self._server = _Side(server)
        self._connected = False
        self._closed = False
        self._timer: Timer | None = loop.later(CONNECT_S, self.close)
        loop.watch(server.fileno(), WRITE, self._on_connect)

    def close(self) -> None:
        """Drop both."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for side in (self._client, self._server):
            self._loop.forget(side.socket.fileno())
            side.socket.close()
        self._door.connections.discard(self)

    def _on_connect(self, _events: int) -> None:
        if self._server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close()
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._watch()

    def _watch(self) -> None:
        for side, other, handler in (
            (self._client, self._server, self._on_client),
            (self._server, self._client, self._on_server),
        ):
            events = 0
            if not side.ended and not other.output:
                events |= READ
            if side.output:
                events |= WRITE
            self._loop.watch(side.socket.fileno(), events, handler)

    def _on_client(self, events: int) -> None:
        self._move(self._client, self._server, events)

    def _on_server(self, events: int) -> None:
        self._move(self._server, self._client, events)

    def _move(self, side: _Side, other: _Side, events: int) -> None:
        try:
            if side.output and events & WRITE:
                side.output = side.output[side.socket.send(side.output) :]
            if events & ~WRITE and not other.output:
                if side.ended:
                    # Nothing more can come or go this way: the peer has reset the connection.
                    self.close()
                    return
                data = side.socket.recv(_CHUNK)
                if data:
                    other.output = data[_try_send(other.socket, data) :]
                else:
                    side.ended = True
            for one, peer in ((side, other), (other, side)):
                if one.ended and not peer.output and not peer.shut:
                    peer.shut = True
                    peer.socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._watch()
            return
        except OSError:
            self.close()
            return
        if side.shut and other.shut:
            self.close()
            return
        self._watch()


def _try_send(end: socket.socket, data: bytes) -> int:
    try:
        return end.send(data)
    except BlockingIOError:
        return 0


class Flow:
    """The datagrams of one client: a socket of its own towards the workload."""

    def __init__(
        self,
        loop: Loop,
        door: Door,
        client: tuple[str, int],
        key: tuple[str, int],
        server: socket.socket,
    ) -> None:
        self._loop = loop
        self._door = door
        self._client = client
        self._key = key
        self._server = server
        self._from: list[tuple[int, int, bytes]] = []
        self._timer = loop.later(FLOW_IDLE_S, self.close)
        loop.watch(server.fileno(), READ, self._answer)

    def close(self) -> None:
        """Forget the client."""
        self._timer.cancel()
        if self._door.flows.get(self._key) is self:
            del self._door.flows[self._key]
            self._loop.forget(self._server.fileno())
            self._server.close()

    def forward(self, data: bytes, answer_from: list[tuple[int, int, bytes]]) -> None:
        """Pass a datagram on; one that cannot be sent is lost, as datagrams are."""
        self._from = answer_from
        self._timer.cancel()
        self._timer = self._loop.later(FLOW_IDLE_S, self.close)
        try:
            self._server.send(data)
        except OSError:
            return

    def _answer(self, _events: int) -> None:
        try:
            data = self._server.recv(65535)
            self._door.held.sendmsg([data], self._from, 0, self._client)
        except OSError:
            # An ICMP error of the workload's, or a client that is gone.
            return
