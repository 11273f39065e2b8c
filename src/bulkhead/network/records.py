"""Networks as they are kept: one JSON document each, named by id, kind "network".

The default bridge has a document too once its subnet is chosen; "host" and "none" never have one.
"""

import datetime
import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import msgspec

from bulkhead.errors import Invalid, Unsupported
from bulkhead.linux.rtnetlink import mac_bytes
from bulkhead.network.ipam import Pool, parse_address, parse_subnet

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*\Z")
_LINK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}\Z")
PREFIX = "com.docker.network."
BRIDGE = PREFIX + "bridge."
RESERVED = ("bridge", "host", "none", "default", "container")


class Subnet(msgspec.Struct, frozen=True):
    """One IPAM configuration; the gateway is always known once the network is kept."""

    subnet: str
    gateway: str = ""
    ip_range: str = ""
    auxiliary: dict[str, str] = {}

    def pool(self) -> Pool:
        """A fresh pool for this configuration; Invalid if it contradicts itself."""
        within = None
        if self.ip_range:
            within = parse_range(self.ip_range)
        subnet = parse_subnet(self.subnet)
        if within is not None and not _inside(within, subnet):
            raise Invalid(f"ip-range {self.ip_range} is not in the subnet {self.subnet}")
        return Pool(
            subnet,
            gateway=parse_address(self.gateway, "gateway") if self.gateway else None,
            within=within,
            auxiliary=[parse_address(one, "auxiliary address") for one in self.auxiliary.values()],
        )


def parse_range(text: str) -> IPv4Network | IPv6Network:
    """An --ip-range; Invalid if it is no prefix."""
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise Invalid(f"invalid ip-range {text}: {error}") from None


def _inside(inner: IPv4Network | IPv6Network, outer: IPv4Network | IPv6Network) -> bool:
    if isinstance(inner, IPv4Network) and isinstance(outer, IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, IPv6Network) and isinstance(outer, IPv6Network):
        return inner.subnet_of(outer)
    return False


class Network(msgspec.Struct):
    """A network of driver bridge."""

    id: str
    name: str
    created: str
    link: str
    default: bool = False
    ipv4: Subnet | None = None
    ipv6: Subnet | None = None
    internal: bool = False
    attachable: bool = False
    icc: bool = True
    masquerade: bool = True
    host_ipv4: str = ""
    host_ipv6: str = ""
    host_binding: str = ""
    mtu: int = 0
    routed4: bool = False
    routed6: bool = False
    labels: dict[str, str] = {}
    options: dict[str, str] = {}
    ipam_options: dict[str, str] = {}
    container_prefix: str = "eth"

    def encode(self) -> str:
        """As the text that is kept."""
        return msgspec.json.encode(self).decode()

    def describe(self) -> dict[str, Any]:
        """Docker's Network map without `Containers`."""
        return {
            "Name": self.name,
            "Id": self.id,
            "Created": self.created,
            "Scope": "local",
            "Driver": "bridge",
            "EnableIPv4": self.ipv4 is not None or self.default,
            "EnableIPv6": self.ipv6 is not None,
            "IPAM": {
                "Driver": "default",
                "Options": self.ipam_options or None,
                "Config": [_config(one) for one in (self.ipv4, self.ipv6) if one is not None],
            },
            "Internal": self.internal,
            "Attachable": self.attachable,
            "Ingress": False,
            "ConfigFrom": {"Network": ""},
            "ConfigOnly": False,
            "Containers": {},
            "Options": self.options,
            "Labels": self.labels,
        }


def _config(subnet: Subnet) -> dict[str, Any]:
    made: dict[str, Any] = {"Subnet": subnet.subnet}
    if subnet.ip_range:
        made["IPRange"] = subnet.ip_range
    if subnet.gateway:
        made["Gateway"] = subnet.gateway
    if subnet.auxiliary:
        made["AuxiliaryAddresses"] = subnet.auxiliary
    return made


def decode(text: str) -> Network:
    """The network kept as `text`."""
    return msgspec.json.decode(text, type=Network)


def now() -> str:
    """This moment as Docker writes it."""
    stamp = datetime.datetime.now(datetime.UTC)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def pseudo(name: str, identity: str) -> dict[str, Any]:
    """Docker's Network map of "host" and "none"."""
    driver = "host" if name == "host" else "null"
    return {
        "Name": name, "Id": identity, "Created": "0001-01-01T00:00:00Z", "Scope": "local",
        "Driver": driver, "EnableIPv4": True, "EnableIPv6": False,
        "IPAM": {"Driver": "default", "Options": None, "Config": []},
        "Internal": False, "Attachable": False, "Ingress": False, "ConfigFrom": {"Network": ""},
        "ConfigOnly": False, "Containers": {}, "Options": {}, "Labels": {},
    }  # fmt: skip


def _boolean(options: Mapping[str, str], key: str, default: bool) -> bool:
    value = options.get(key)
    if value is None or value == "":
        return default
    lowered = str(value).lower()
    if lowered in {"1", "t", "true"}:
        return True
    if lowered in {"0", "f", "false"}:
        return False
    raise Invalid(f"network option {key}: {value} is neither true nor false")


_MODES = {"": False, "nat": False, "nat-unprotected": False, "routed": True}


def _routed(options: Mapping[str, str], key: str) -> bool:
    mode = options.get(key, "")
    if mode not in _MODES:
        raise Unsupported(f"network option {key}={mode} is not supported: use nat or routed")
    return _MODES[mode]


def _mtu(options: Mapping[str, str]) -> int:
    value = options.get(PREFIX + "driver.mtu") or "0"
    if (
        not value.isascii()
        or not value.isdigit()
        or not (value == "0" or 68 <= int(value) <= 65535)
    ):
        raise Invalid(f"network option {PREFIX}driver.mtu: {value} is not an MTU (68 to 65535)")
    return int(value)


def apply_options(network: Network, options: Mapping[str, str]) -> None:
    """Take over Docker's com.docker.network.* options; Invalid names the bad one."""
    network.options = {str(key): str(value) for key, value in options.items()}
    network.icc = _boolean(options, BRIDGE + "enable_icc", True)
    network.masquerade = _boolean(options, BRIDGE + "enable_ip_masquerade", True)
    network.host_binding = options.get(BRIDGE + "host_binding_ipv4", "")
    network.host_ipv4 = options.get(PREFIX + "host_ipv4", "")
    network.host_ipv6 = options.get(PREFIX + "host_ipv6", "")
    for key, value in (
        (BRIDGE + "host_binding_ipv4", network.host_binding),
        (PREFIX + "host_ipv4", network.host_ipv4),
        (PREFIX + "host_ipv6", network.host_ipv6),
    ):
        if value:
            parse_address(value, f"network option {key}")
    network.mtu = _mtu(options)
    network.routed4 = _routed(options, BRIDGE + "gateway_mode_ipv4")
    network.routed6 = _routed(options, BRIDGE + "gateway_mode_ipv6")
    network.container_prefix = options.get(PREFIX + "container_iface_prefix") or "eth"
    link = options.get(BRIDGE + "name", "")
    if link:
        if not _LINK.match(link):
            raise Invalid(f"network option {BRIDGE}name: {link} is not an interface name")
        network.link = link


def from_docker(body: Mapping[str, Any]) -> tuple[Network, bool, bool]:
    """The network that a NetworkCreate body asks for, and which families still want a subnet.

    Returns (network, wants IPv4 subnet, wants IPv6 subnet). Errors: Invalid, Unsupported.
    """
    name = str(body.get("Name") or "")
    if not _NAME.match(name):
        raise Invalid(
            f"invalid network name {name!r}: letters, digits, '_', '.' and '-', starting with a "
            "letter or digit"
        )
    if name in RESERVED:
        raise Invalid(f"operation is not permitted on predefined {name} network")
    driver = body.get("Driver") or "bridge"
    if driver != "bridge":
        raise Unsupported(
            f"network driver {driver} is not supported: use bridge, or --network host or none"
        )
    for key in ("Ingress", "ConfigOnly"):
        if body.get(key):
            raise Unsupported(f"network {name}: {key} networks are not supported")
    identity = os.urandom(32).hex()
    network = Network(id=identity, name=name, created=now(), link=f"bh-{identity[:12]}")
    network.internal = bool(body.get("Internal"))
    network.attachable = bool(body.get("Attachable"))
    network.labels = {str(key): str(value) for key, value in (body.get("Labels") or {}).items()}
    apply_options(network, body.get("Options") or {})
    ipam = body.get("IPAM") or {}
    if (ipam.get("Driver") or "default") != "default":
        raise Unsupported(f"IPAM driver {ipam.get('Driver')} is not supported: use default")
    network.ipam_options = dict(ipam.get("Options") or {})
    for config in ipam.get("Config") or ():
        _take_subnet(network, config)
    want4 = body.get("EnableIPv4") is not False and network.ipv4 is None
    want6 = bool(body.get("EnableIPv6")) and network.ipv6 is None
    if not want4 and not want6 and network.ipv4 is None and network.ipv6 is None:
        raise Invalid(f"network {name}: IPv4 or IPv6 must be enabled")
    return network, want4, want6


def _take_subnet(network: Network, config: Mapping[str, Any]) -> None:
    """One entry of IPAM.Config; entries without a subnet are accepted only if wholly empty."""
    if not config.get("Subnet"):
        if any(config.values()):
            raise Invalid("every ip-range, gateway or aux-address needs a subnet")
        return
    asked = Subnet(
        subnet=str(parse_subnet(config["Subnet"])),
        gateway=str(config.get("Gateway") or "").split("/")[0],
        ip_range=str(config.get("IPRange") or ""),
        auxiliary={
            str(key): str(value)
            for key, value in (
                config.get("AuxiliaryAddresses") or config.get("AuxAddress") or {}
            ).items()
        },
    )
    pool = asked.pool()
    kept = msgspec.structs.replace(asked, gateway=str(pool.gateway))
    if pool.subnet.version == 4:
        if network.ipv4 is not None:
            raise Invalid("a bridge network has at most one IPv4 subnet")
        network.ipv4 = kept
    else:
        if network.ipv6 is not None:
            raise Invalid("a bridge network has at most one IPv6 subnet")
        network.ipv6 = kept


def check_mac(mac: str) -> bytes:
    """The bytes of a MAC address of the Engine API; Invalid if it is none."""
    try:
        return mac_bytes(mac)
    except ValueError as error:
        raise Invalid(f"invalid MAC address: {error}") from None
