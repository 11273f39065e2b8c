"""Where the Docker Engine API is served: addresses as `--host` takes them, and TLS.

Over TCP both sides show certificates, always: who reaches that port is root on this machine.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bulkhead.errors import Denied, Invalid, Unavailable

if TYPE_CHECKING:
    import ssl

_BACKLOG = 512
DEFAULT_PORT = 2376


@dataclass(frozen=True, slots=True)
class Places:
    """What the command line asks for; no address: the default one."""

    addresses: tuple[str, ...] = ()
    verify: bool = False
    authority: str = ""
    certificate: str = ""
    key: str = ""


NOWHERE = Places()


@dataclass(frozen=True, slots=True)
class Where:
    """One address: a path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0


def parse(address: str) -> Where:
    """The parts of "unix:///path" or "tcp://host:port"."""
    scheme, separator, rest = address.partition("://")
    if scheme == "unix" and separator and rest.startswith("/"):
        return Where(path=os.path.normpath(rest))
    if scheme == "tcp" and separator:
        host, _, port = rest.rpartition(":") if ":" in rest else (rest, "", str(DEFAULT_PORT))
        host = host.strip("[]")
        if port.isascii() and port.isdigit() and 0 <= int(port) < 1 << 16:
            return Where(host=host, port=int(port))
    raise Invalid(f"invalid host {address!r}: use unix:///PATH or tcp://ADDRESS:PORT")


def check(places: Places) -> None:
    """Refuse, before anything starts, what would not be safe or cannot work."""
    over_tcp = [address for address in places.addresses if not parse(address).path]
    if not over_tcp:
        return
    if not (places.verify and places.authority and places.certificate and places.key):
        raise Denied(
            f"the API is not served on {over_tcp[0]} without mutual TLS: give --tlsverify, "
            "--tlscacert, --tlscert and --tlskey"
        )
    context(places)()


def context(places: Places) -> "Callable[[], ssl.SSLContext]":
    """A maker of the TLS context, which it makes once; Invalid if the files are no certificates."""
    made: list[ssl.SSLContext] = []

    def make() -> "ssl.SSLContext":
        import ssl

        if not made:
            try:
                found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                found.minimum_version = ssl.TLSVersion.TLSv1_2
                found.load_cert_chain(places.certificate, places.key)
                found.load_verify_locations(cafile=places.authority)
                found.verify_mode = ssl.CERT_REQUIRED
            except (OSError, ssl.SSLError) as error:
                raise Invalid(
                    f"cannot load {places.certificate}, {places.key}, {places.authority}: {error}"
                ) from None
            made.append(found)
        return made[0]

    return make


def bind(where: Where) -> socket.socket:
    """A listening TCP socket."""
    host = where.host or "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, where.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{where.port}: {error.strerror}") from error
