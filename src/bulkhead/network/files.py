"""The files /etc/hosts and /etc/resolv.conf of a workload; hosts(5), resolv.conf(5)."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from bulkhead.errors import Invalid

_LOCAL = (
    "127.0.0.1\tlocalhost\n"
    "::1\tlocalhost ip6-localhost ip6-loopback\n"
    "fe00::0\tip6-localnet\n"
    "ff00::0\tip6-mcastprefix\n"
    "ff02::1\tip6-allnodes\n"
    "ff02::2\tip6-allrouters\n"
)
_LOCAL4 = "127.0.0.1\tlocalhost\n"
_SYSTEMD = "/run/systemd/resolve/resolv.conf"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a resolv.conf says."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def parse_resolv(content: str) -> Resolution:
    """Read a resolv.conf; what it does not know it ignores, as libc does."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in content.splitlines():
        words = line.split()
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver":
            servers.append(words[1])
        elif words[0] in ("search", "domain"):
            search = tuple(words[1:])
        elif words[0] == "options":
            options += words[1:]
    return Resolution(tuple(servers), search, tuple(options))


def is_loopback(server: str) -> bool:
    """Whether a nameserver can be reached from the host's own namespace only."""
    return server.startswith("127.") or server == "::1" or "%" in server


def host_resolution(path: str = "/etc/resolv.conf") -> Resolution:
    """The host's resolvers.

    Where systemd-resolved listens on loopback and says elsewhere which servers it asks, these.
    """
    found = _read(path)
    if found.servers and all(is_loopback(one) for one in found.servers):
        upstream = _read(_SYSTEMD)
        if any(not is_loopback(one) for one in upstream.servers):
            return Resolution(upstream.servers, found.search or upstream.search, found.options)
    return found


_seen: dict[str, tuple[tuple[int, int, int], Resolution]] = {}


def _read(path: str) -> Resolution:
    """What the file says; read again only when it has changed."""
    try:
        state = os.stat(path)
        stamp = (state.st_mtime_ns, state.st_ino, state.st_size)
        known = _seen.get(path)
        if known is None or known[0] != stamp:
            with open(path, encoding="utf-8", errors="replace") as file:
                known = _seen[path] = (stamp, parse_resolv(file.read()))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return Resolution()
    return known[1]


def resolv_conf(
    servers: Iterable[str], search: Iterable[str], options: Iterable[str], *, ours: bool
) -> str:
    """The content; with `ours` the options gain ndots:0, as our names have no dots."""
    lines = [f"nameserver {server}" for server in servers]
    searched = [one for one in search if one]
    if searched and searched != ["."]:
        lines.append("search " + " ".join(searched))
    chosen = list(options)
    if ours and not any(one.startswith("ndots:") for one in chosen):
        chosen.append("ndots:0")
    if chosen:
        lines.append("options " + " ".join(chosen))
    return "\n".join(lines) + "\n"


def hosts(entries: Sequence[tuple[str, str]], own: Sequence[tuple[str, str]], *, ipv6: bool) -> str:
    """The content: localhost, then `entries` (address, name), then the workload's `own` names."""
    lines = [_LOCAL if ipv6 else _LOCAL4]
    lines += [f"{address}\t{name}\n" for address, name in (*entries, *own)]
    return "".join(lines)


def parse_extra_host(text: str, gateway: Sequence[str]) -> list[tuple[str, str]]:
    """(address, name) pairs of "NAME:ADDRESS" (or "=", or "host-gateway"); Invalid if malformed."""
    for separator in "=:":
        name, found, address = text.partition(separator)
        if found:
            break
    else:
        raise Invalid(f"invalid extra host {text!r}: must be NAME:ADDRESS")
    address = address.strip("[]")
    if not name or not address:
        raise Invalid(f"invalid extra host {text!r}: must be NAME:ADDRESS")
    if address == "host-gateway":
        if not gateway:
            raise Invalid(f"extra host {text!r}: there is no gateway in this network mode")
        return [(one, name) for one in gateway]
    try:
        return [(str(ip_address(address)), name)]
    except ValueError:
        raise Invalid(f"invalid extra host {text!r}: {address} is not an IP address") from None
