"""DHCP servers of machines: one socket per interface, in the machine's network namespace.

    <workload run directory>/leases.json     what the interfaces are told, for the next engine

While no engine runs nobody answers; clients ask again, and leases do not end.
"""

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from bulkhead.boundary.seam import Nic
from bulkhead.engine.records import Record
from bulkhead.errors import BulkheadError
from bulkhead.linux import netns
from bulkhead.network import dhcp
from bulkhead.network.tap import RESOLVER

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")
_PACKETS = 16
"""How many are answered before others have their turn."""


class Leases:
    """The servers of this engine's machines."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._open: dict[str, list[socket.socket]] = {}

    def begin(self, record: Record, netns_path: str, nics: Sequence[Nic], resolv: str) -> None:
        """Answer the machine that is about to start."""
        leases = [self._lease(record, nic, resolv) for nic in nics]
        path = f"{self._engine.home.workload_run(record.id)}/leases.json"
        with open(path, "wb") as file:
            file.write(msgspec.json.encode(leases))
        fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.inside(fd, lambda: dhcp.keep_inside([nic.name for nic in nics]))
        finally:
            os.close(fd)
        self._serve(record.id, netns_path, leases)

    def resume(self, record: Record) -> None:
        """Answer a machine that an earlier engine has started."""
        path = f"{self._engine.home.workload_run(record.id)}/leases.json"
        try:
            with open(path, "rb") as file:
                leases = msgspec.json.decode(file.read(), type=list[dhcp.Lease])
            self._serve(record.id, f"/proc/{record.pid}/ns/net", leases)
        except (OSError, msgspec.DecodeError, BulkheadError) as error:
            log.warning("%s gets no answers by DHCP: %s", record.name, error)

    def end(self, identity: str) -> None:
        """Its network goes."""
        for sock in self._open.pop(identity, ()):
            self._engine.loop.remove_reader(sock.fileno())
            sock.close()

    def close(self) -> None:
        """The engine ends."""
        for identity in list(self._open):
            self.end(identity)

    @staticmethod
    def _lease(record: Record, nic: Nic, resolv: str) -> dhcp.Lease:
        words = [line.split() for line in resolv.splitlines()]
        servers = [line[1] for line in words if line[:1] == ["nameserver"] and len(line) > 1]
        search = [line[1] for line in words if line[:1] == ["search"] and len(line) > 1]
        address = next((one for one in nic.addresses if ":" not in one), "")
        return dhcp.Lease(
            mac=nic.mac, address=address, server=RESOLVER, routes=nic.routes,
            nameservers=servers or [RESOLVER], domain=search[0] if search else "",
            hostname=record.config.hostname, mtu=nic.mtu,
        )  # fmt: skip

    def _serve(self, identity: str, netns_path: str, leases: Sequence[dhcp.Lease]) -> None:
        self.end(identity)
        made = self._open[identity] = []
        fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for number, lease in enumerate(leases):
                if lease.address:
                    interface = f"gb{number}"
                    sock = netns.inside(fd, functools.partial(dhcp.open_socket, interface))
                    made.append(sock)
                    self._engine.loop.add_reader(sock.fileno(), _answer, sock, lease)
        finally:
            os.close(fd)


def _answer(sock: socket.socket, lease: dhcp.Lease) -> None:
    """Answer what has come; the machine is hostile, so a few at a time and never an exception."""
    with contextlib.suppress(BlockingIOError, InterruptedError):
        for _ in range(_PACKETS):
            packet, _ = sock.recvfrom(2048)
            reply = dhcp.answer(packet, lease)
            if reply is not None:
                with contextlib.suppress(OSError):
                    sock.sendto(reply, ("255.255.255.255", dhcp.CLIENT))
