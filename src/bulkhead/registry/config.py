"""Which registries there are beside the defaults: mirrors, insecure ones, certificates.

    /etc/bulkhead/registries.json             for root, and for users without one of their own
    ~/.config/bulkhead/registries.json        ($XDG_CONFIG_HOME) for ordinary users
    $BULKHEAD_REGISTRIES                      a path that takes the place of both

    {
      "insecure": ["registry.lan:5000", "10.0.0.0/8"],
      "mirrors": {"docker.io": ["https://mirror.lan"]},
      "certificates": ["/etc/bulkhead/certs.d", "/etc/docker/certs.d"],
      "downloads": 3,
      "uploads": 5
    }

A certificate directory holds one directory per registry, `HOST[:PORT]/`, with `*.crt` (authorities
to trust beside the system's) and `NAME.cert` with `NAME.key` (a client certificate), as Docker has.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from bulkhead.errors import Invalid
from bulkhead.oci.reference import DEFAULT_DOMAIN

CERTIFICATES = ("/etc/bulkhead/certs.d", "/etc/docker/certs.d")
_HUB = "registry-1.docker.io"


class Registries(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file's content; `downloads` and `uploads` are how many blobs travel at once."""

    insecure: tuple[str, ...] = ()
    mirrors: dict[str, tuple[str, ...]] = {}
    certificates: tuple[str, ...] = CERTIFICATES
    downloads: int = 3
    uploads: int = 5


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server to ask: `host` with port, `schemes` to try in order.

    `verify` False: any certificate will do. `mirror`: its failures are passed over.
    """

    host: str
    schemes: tuple[str, ...] = ("https",)
    verify: bool = True
    mirror: bool = False
    certificates: tuple[str, ...] = ()


def path(environment: Mapping[str, str] | None = None) -> str:
    """The configuration file that counts here, existing or not."""
    environment = os.environ if environment is None else environment
    if chosen := environment.get("BULKHEAD_REGISTRIES"):
        return chosen
    if os.geteuid() != 0:
        base = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        own = f"{base}/bulkhead/registries.json"
        if os.path.exists(own):
            return own
    return "/etc/bulkhead/registries.json"


def load(file: str | None = None) -> Registries:
    """The configuration in `file`, else `path()`; defaults if there is none; Invalid if bad."""
    file = file or path()
    try:
        with open(file, "rb") as opened:
            data = opened.read()
    except FileNotFoundError:
        return Registries()
    try:
        config = msgspec.json.decode(data, type=Registries)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{file}: {error}") from error
    if not 1 <= config.downloads <= 64 or not 1 <= config.uploads <= 64:
        raise Invalid(f"{file}: downloads and uploads must be 1 to 64")
    return config


def split_host(host: str) -> tuple[str, int | None]:
    """Host without brackets, and port or None, of "host[:port]"."""
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name, int(rest[1:]) if rest.startswith(":") else None
    name, colon, port = host.partition(":")
    return name, int(port) if colon else None


def is_loopback(host: str) -> bool:
    """Whether "host[:port]" is this machine by name or number: nothing crosses a network."""
    return is_loopback_name(split_host(host)[0])


def is_loopback_name(name: str) -> bool:
    """`is_loopback` of a host without port and brackets."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _named_insecure(host: str, patterns: tuple[str, ...]) -> bool:
    name, _ = split_host(host)
    for pattern in patterns:
        if pattern in (host, name):
            return True
        try:
            if ipaddress.ip_address(name) in ipaddress.ip_network(pattern, strict=False):
                return True
        except ValueError:
            continue
    return False


def endpoint(host: str, config: Registries) -> Endpoint:
    """How to reach `host` (a reference's domain)."""
    if host == DEFAULT_DOMAIN:
        host = _HUB
    if _named_insecure(host, config.insecure):
        return Endpoint(host, ("https", "http"), False, False, config.certificates)
    schemes = ("https", "http") if is_loopback(host) else ("https",)
    return Endpoint(host, schemes, True, False, config.certificates)


def endpoints(domain: str, config: Registries) -> list[Endpoint]:
    """The servers to ask for `domain`'s content: its mirrors, then itself."""
    found: list[Endpoint] = []
    for url in config.mirrors.get(domain, ()):
        scheme, separator, rest = url.rstrip("/").partition("://")
        if not separator or scheme not in ("http", "https") or "/" in rest or not rest:
            raise Invalid(f"mirror {url!r} of {domain} is not of the form https://host[:port]")
        base = endpoint(rest, config)
        if scheme == "http" and "http" not in base.schemes:
            raise Invalid(f"mirror {url} of {domain} is plain HTTP: list {rest} under insecure")
        found.append(Endpoint(rest, (scheme,), base.verify, True, config.certificates))
    found.append(endpoint(domain, config))
    return found
