"""The DNS server: local names by the asker's networks, everything else from the host's resolvers.

Each workload has two sockets of its own (UDP and TCP, opened in its network namespace), so that who
asks is known by where the question arrives and cannot be forged. Questions for others leave from
the host's namespace, each from a socket of its own with a random port and id.
"""

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from select import EPOLLERR, EPOLLHUP

from bulkhead.network import dns
from bulkhead.network.files import host_resolution
from bulkhead.network.loop import READ, WRITE, Loop, Timer
from bulkhead.network.names import Names

PATIENCE_S = 2.0
"""How long one upstream server may take before the next is asked."""
IDLE_S = 20.0
MOST_FORWARDED = 256
MOST_STREAMS = 64
_BURST = 32
_RECHECK_S = 5.0

Reply = Callable[[bytes], None]


@dataclass(slots=True)
class Asker:
    """One place where questions arrive. `networks` None: found by the source's address."""

    workload: str
    udp: socket.socket | None
    tcp: socket.socket | None
    servers: tuple[str, ...] = ()
    """Upstream servers; none: the host's."""
    forward: bool = True
    gateway: str = ""
    """For guests: the network at whose gateway this is."""
    forwarded: int = 0
    streams: set["Stream"] = field(default_factory=set)
    closed: bool = False


class Resolver:
    """Serves askers on one loop."""

    def __init__(self, loop: Loop, names: Names, *, port: int = 53) -> None:
        self._loop = loop
        self.names = names
        self._port = port
        self._host: tuple[str, ...] = ()
        self._host_stamp: object = None
        self._host_checked = -1e9

    # -- askers

    def open(self, asker: Asker) -> None:
        """Begin to serve its sockets, which this object owns from now on."""
        if asker.udp is not None:
            asker.udp.setblocking(False)
            self._loop.watch(asker.udp.fileno(), READ, lambda _: self._datagrams(asker))
        if asker.tcp is not None:
            asker.tcp.setblocking(False)
            self._loop.watch(asker.tcp.fileno(), READ, lambda _: self._accept(asker))

    def close(self, asker: Asker) -> None:
        """Stop serving it; close its sockets and connections."""
        asker.closed = True
        for one in (asker.udp, asker.tcp):
            if one is not None:
                self._loop.forget(one.fileno())
                one.close()
        for stream in list(asker.streams):
            stream.close()

    def _datagrams(self, asker: Asker) -> None:
        udp = asker.udp
        assert udp is not None
        for _ in range(_BURST):
            if asker.closed:
                return
            try:
                message, source = udp.recvfrom(65535)
            except OSError:
                # Nothing left; or an ICMP error for an earlier answer.
                return
            self.handle(asker, message, source[0], _datagram_reply(udp, source), stream=False)

    def _accept(self, asker: Asker) -> None:
        assert asker.tcp is not None
        try:
            connection, source = asker.tcp.accept()
        except OSError:
            return
        if len(asker.streams) >= MOST_STREAMS:
            connection.close()
            return
        connection.setblocking(False)
        asker.streams.add(Stream(self, self._loop, asker, connection, source[0]))

    # -- questions

    def handle(
        self, asker: Asker, message: bytes, source: str, reply: Reply, *, stream: bool
    ) -> None:
        """Answer one message, now or later; what deserves no answer gets none."""
        try:
            query = dns.parse_query(message)
        except dns.Malformed as bad:
            if bad.identity >= 0:
                reply(dns.refusal(bad.identity, dns.FORMERR))
            return
        if query.opcode != 0:
            reply(dns.answer(query, code=dns.NOTIMP, stream=stream))
            return
        if query.klass != dns.IN:
            reply(dns.answer(query, code=dns.REFUSED, stream=stream))
            return
        workload = asker.workload
        networks: tuple[str, ...] = self.names.networks(workload)
        if asker.gateway:
            known = self.names.asker(asker.gateway, source)
            if known is None:
                reply(dns.answer(query, code=dns.REFUSED, stream=stream))
                return
            workload, networks = known, self.names.networks(known)
        local = self._local(query, workload, networks, stream=stream)
        if local is not None:
            reply(local)
            return
        servers = asker.servers or self._host_servers()
        if not asker.forward or not servers or asker.forwarded >= MOST_FORWARDED:
            reply(dns.answer(query, code=dns.SERVFAIL, stream=stream))
            return
        Forward(self._loop, asker, query, message, servers, reply, stream, self._port)

    def _local(
        self, query: dns.Query, workload: str, networks: tuple[str, ...], *, stream: bool
    ) -> bytes | None:
        """The answer from our own names; None if the name is not ours to answer."""
        if query.kind == dns.PTR:
            address = dns.reverse_address(query.name)
            name = self.names.reverse(networks, address) if address else None
            if name is None:
                return None
            try:
                data = dns.encode_name(name)
            except ValueError:
                return dns.answer(query, code=dns.NXDOMAIN, stream=stream)
            return dns.answer(query, [(dns.PTR, data)], stream=stream)
        found = self.names.find(networks, query.name, workload)
        if found is None:
            return None
        four, six = found
        records = []
        if query.kind in (dns.A, dns.ANY):
            records += [(dns.A, one) for one in four]
        if query.kind in (dns.AAAA, dns.ANY):
            records += [(dns.AAAA, one) for one in six]
        if len(records) > 1:
            secrets.SystemRandom().shuffle(records)
        return dns.answer(query, records, stream=stream)

    def _host_servers(self) -> tuple[str, ...]:
        """The host's nameservers now; they change with its networks."""
        now = time.monotonic()
        if now - self._host_checked > _RECHECK_S:
            self._host_checked = now
            try:
                state = os.stat("/etc/resolv.conf")
                stamp: object = (state.st_mtime_ns, state.st_ino, state.st_size)
            except OSError:
                stamp = None
            if stamp != self._host_stamp or not self._host:
                self._host_stamp = stamp
                self._host = host_resolution().servers
        return self._host


def _datagram_reply(udp: socket.socket, source: tuple[str, int]) -> Reply:
    def reply(message: bytes) -> None:
        try:
            udp.sendto(message, source)
        except (OSError, ValueError):
            # The asker is gone or its queue is full: it will ask again.
            return

    return reply


class Stream:
    """One TCP connection of an asker: length-prefixed messages, answered in any order."""

    MOST_PENDING = 16
    MOST_BUFFERED = 1 << 18

    def __init__(
        self, resolver: Resolver, loop: Loop, asker: Asker, connection: socket.socket, source: str
    ) -> None:
        self._resolver = resolver
        self._loop = loop
        self._asker = asker
        self._connection = connection
        self._source = source
        self._input = bytearray()
        self._output = bytearray()
        self._pending = 0
        self._closed = False
        self._ended = False
        self._serving = False
        self._idle = loop.later(IDLE_S, self.close)
        self._watch()

    def _watch(self) -> None:
        events = 0
        if not self._ended and self._pending < self.MOST_PENDING:
            events |= READ
        if self._output:
            events |= WRITE
        self._loop.watch(self._connection.fileno(), events, self._ready)

    def close(self) -> None:
        """Drop the connection."""
        if self._closed:
            return
        self._closed = True
        self._idle.cancel()
        self._loop.forget(self._connection.fileno())
        self._connection.close()
        self._asker.streams.discard(self)

    def _ready(self, events: int) -> None:
        if events & (EPOLLHUP | EPOLLERR):
            self.close()
            return
        try:
            if events & WRITE and self._output:
                del self._output[: self._connection.send(self._output)]
            if events & ~WRITE and not self._ended:
                data = self._connection.recv(65536)
                self._ended = not data
                self._input += data
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._serve()

    def _serve(self) -> None:
        if self._serving:
            return
        self._serving = True
        while not self._closed and self._pending < self.MOST_PENDING and len(self._input) >= 2:
            size = int.from_bytes(self._input[:2], "big")
            if len(self._input) < 2 + size:
                break
            message = bytes(self._input[2 : 2 + size])
            del self._input[: 2 + size]
            self._pending += 1
            self._resolver.handle(self._asker, message, self._source, self._reply, stream=True)
        self._serving = False
        if self._closed:
            return
        if self._ended and not self._pending and not self._output:
            self.close()
            return
        if len(self._output) > self.MOST_BUFFERED:
            self.close()
            return
        self._watch()

    def _reply(self, message: bytes) -> None:
        self._pending -= 1
        if self._closed:
            return
        self._output += struct.pack(">H", len(message)) + message
        self._idle.cancel()
        self._idle = self._loop.later(IDLE_S, self.close)
        self._serve()


class Forward:
    """One question on its way to upstream servers, one after the other."""

    def __init__(
        self,
        loop: Loop,
        asker: Asker,
        query: dns.Query,
        message: bytes,
        servers: tuple[str, ...],
        reply: Reply,
        stream: bool,
        port: int,
    ) -> None:
        self._loop = loop
        self._asker = asker
        self._query = query
        self._message = message
        self._servers = list(servers[:4])
        self._reply = reply
        self._stream = stream
        self._port = port
        self._identity = 0
        self._socket: socket.socket | None = None
        self._timer: Timer | None = None
        self._output = b""
        self._input = bytearray()
        asker.forwarded += 1
        self._next()

    def _next(self) -> None:
        """Ask the next server, or give up."""
        self._drop()
        while self._servers and not self._asker.closed:
            server = self._servers.pop(0)
            try:
                self._ask(server)
            except (OSError, ValueError):
                self._drop()
                continue
            return
        self._finish(dns.answer(self._query, code=dns.SERVFAIL, stream=self._stream))

    def _ask(self, server: str) -> None:
        self._identity = secrets.randbits(16)
        message = dns.with_identity(self._message, self._identity)
        kind = socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM
        family, _, _, _, address = socket.getaddrinfo(
            server, self._port, type=kind, flags=socket.AI_NUMERICHOST
        )[0]
        self._socket = socket.socket(family, kind)
        self._socket.setblocking(False)
        self._input.clear()
        self._timer = self._loop.later(PATIENCE_S, self._next)
        if self._stream:
            self._output = struct.pack(">H", len(message)) + message
            if self._socket.connect_ex(address) not in (0, 115):
                raise OSError("cannot connect")
            self._loop.watch(self._socket.fileno(), READ | WRITE, self._stream_ready)
        else:
            self._socket.connect(address)
            self._socket.send(message)
            self._loop.watch(self._socket.fileno(), READ, self._datagram_ready)

    def _datagram_ready(self, _events: int) -> None:
        assert self._socket is not None
        try:
            response = self._socket.recv(65535)
        except BlockingIOError:
            return
        except OSError:
            self._next()
            return
        if dns.fits(response, self._query, self._identity):
            self._answered(response)

    def _stream_ready(self, events: int) -> None:
        assert self._socket is not None
        try:
            if self._output and events & WRITE:
                self._output = self._output[self._socket.send(self._output) :]
                if not self._output:
                    self._loop.watch(self._socket.fileno(), READ, self._stream_ready)
            if not events & ~WRITE:
                return
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._next()
            return
        self._input += data
        size = int.from_bytes(self._input[:2], "big")
        if len(self._input) >= 2 + size and len(self._input) > 2:
            response = bytes(self._input[2 : 2 + size])
            if dns.fits(response, self._query, self._identity):
                self._answered(response)
                return
        elif data:
            return
        self._next()

    def _answered(self, response: bytes) -> None:
        if response[3] & 15 in (dns.SERVFAIL, dns.REFUSED, dns.NOTIMP) and self._servers:
            self._next()
            return
        self._finish(dns.with_identity(response, self._query.identity))

    def _finish(self, response: bytes) -> None:
        self._drop()
        self._asker.forwarded -= 1
        if not self._asker.closed:
            self._reply(response)

    def _drop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None
