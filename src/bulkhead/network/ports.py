"""Published ports: what is asked for, and sockets that really hold the host's ports.

A port is taken by binding it, so that another program's port is noticed and no other program can
take ours; TCP sockets listen, and whoever holds them (network/helper.py) serves the connections the
firewall cannot redirect: to ::1, and over IPv6 to a workload that has IPv4 only.
"""

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from bulkhead.errors import Conflict, Invalid, Unavailable, Unsupported
from bulkhead.network.model import parse_port

_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_BACKLOG = 512
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Wish:
    """One binding asked for: `low` 0 means any free port, else one of `low` to `high`."""

    protocol: str
    port: int
    host_address: str
    low: int
    high: int


@dataclass(slots=True)
class Published:
    """One port of the host that is ours; `address` is never empty ("0.0.0.0" or "::" for all)."""

    protocol: str
    port: int
    address: str
    host_port: int
    held: socket.socket

    @property
    def role(self) -> str:
        """Its name towards network/helper.py."""
        return f"{self.protocol} {self.address} {self.host_port}"


def wishes(
    ports: Mapping[str, Sequence[Mapping[str, str]]],
    exposed: Iterable[str],
    *,
    publish_all: bool,
    default_address: str = "",
) -> list[Wish]:
    """What is asked for, in order; Invalid names the bad port."""
    made = []
    for text, bindings in ports.items():
        port, protocol = parse_port(text)
        for binding in bindings or ({},):
            low, high = _host_range(binding.get("HostPort") or "")
            address = _host_address(binding.get("HostIp") or default_address)
            made.append(Wish(protocol, port, address, low, high))
    if publish_all:
        named = {parse_port(text) for text in ports}
        for text in exposed:
            port, protocol = parse_port(text)
            if (port, protocol) not in named:
                made.append(Wish(protocol, port, _host_address(default_address), 0, 0))
    return made


def _host_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not text or text == "0":
        return 0, 0
    last = last or first
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise Invalid(f"invalid host port: {text}")
    low, high = int(first), int(last)
    if not 0 < low <= high < 65536:
        raise Invalid(f"invalid host port: {text}: must be from 1 to 65535")
    return low, high


def _host_address(text: str) -> str:
    text = text.strip("[]")
    if not text:
        return ""
    try:
        return str(ip_address(text))
    except ValueError:
        raise Invalid(f"invalid host address for a port: {text}") from None


def take(wanted: Iterable[Wish]) -> list[Published]:
    """Bind every wish, or none: Conflict names the first port that is taken."""
    with contextlib.ExitStack() as undo:
        made: list[Published] = []
        for wish in wanted:
            for one in _take(wish):
                undo.callback(one.held.close)
                made.append(one)
        undo.pop_all()
    return made


def _take(wish: Wish) -> list[Published]:
    """The sockets of one wish: of both families when no address is given, on the same port."""
    addresses = [wish.host_address] if wish.host_address else ["0.0.0.0", "::"]
    if wish.low:
        candidates: Iterable[int] = range(wish.low, wish.high + 1)
    else:
        candidates = (0,) * _TRIES
    taken = ""
    for candidate in candidates:
        made: list[Published] = []
        port = candidate
        with contextlib.ExitStack() as undo:
            for address in addresses:
                held = _bind(wish.protocol, address, port, optional=bool(made))
                if held is None:
                    continue
                if isinstance(held, str):
                    taken = held
                    break
                undo.callback(held.close)
                port = held.getsockname()[1]
                made.append(Published(wish.protocol, wish.port, address, port, held))
            else:
                undo.pop_all()
                return made
    if not wish.low:
        raise Unavailable(f"no free {wish.protocol} port on this host to publish")
    if wish.low != wish.high:
        raise Conflict(
            f"Bind for {taken.rpartition(':')[0]}:{wish.low}-{wish.high} failed: "
            "all ports are allocated"
        )
    raise Conflict(f"Bind for {taken} failed: port is already allocated")


def _bind(protocol: str, address: str, port: int, *, optional: bool) -> socket.socket | str | None:
    """A bound socket; the text of the place if it is taken; None if this host lacks the family."""
    six = ":" in address
    shown = f"[{address}]:{port}" if six else f"{address}:{port}"
    try:
        made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, _KINDS[protocol])
    except OSError as error:
        if optional and error.errno == errno.EAFNOSUPPORT:
            return None
        raise Unsupported(f"publishing on {shown}: {error.strerror}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(made.close)
        made.setblocking(False)
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "tcp":
            # Old connections in TIME_WAIT are no obstacle; another listener still is.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((address, port))
            if protocol == "tcp":
                made.listen(_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return shown
            if optional and error.errno == errno.EADDRNOTAVAIL:
                return None
            if error.errno == errno.EADDRNOTAVAIL:
                raise Invalid(f"Bind for {shown} failed: this host has no such address") from error
            raise Unsupported(f"Bind for {shown} failed: {error.strerror}") from error
        undo.pop_all()
    return made
