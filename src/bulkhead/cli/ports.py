"""The values of --publish and --expose."""

from typing import Any

from bulkhead.cli.options import UsageError

Bindings = dict[str, list[dict[str, str]]]


def _range(text: str, spec: str) -> range:
    low, dash, high = text.partition("-")
    try:
        found = range(int(low), int(high if dash else low) + 1)
    except ValueError:
        raise UsageError(f"invalid containerPort: {text} (in {spec})") from None
    if not found or found[0] < 0 or found[-1] > 65535 or not low.isdecimal():
        raise UsageError(f"invalid port range: {text} (in {spec})")
    return found


def _protocol(text: str, spec: str) -> tuple[str, str]:
    rest, _, protocol = text.partition("/")
    protocol = protocol.lower() or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise UsageError(f"invalid proto: {protocol} (in {spec})")
    return rest, protocol


def _split(spec: str) -> tuple[str, str, str]:
    """(address, host ports, container ports) of `[ADDRESS:][HOST]:CONTAINER`; IPv6 in brackets."""
    address = ""
    rest = spec
    if spec.startswith("["):
        address, _, rest = spec[1:].partition("]:")
        if not rest:
            raise UsageError(f"invalid IP address: {spec}")
    elif spec.count(":") >= 2:
        address, _, rest = spec.partition(":")
        if ":" in rest and rest.count(":") > 1:
            address, host, container = spec.rsplit(":", 2)
            return address, host, container
    host, _, container = rest.rpartition(":")
    return address, host, container


def publish(specs: list[str]) -> tuple[dict[str, dict[str, Any]], Bindings]:
    """(ExposedPorts, PortBindings) of all -p values; UsageError in docker's words."""
    exposed: dict[str, dict[str, Any]] = {}
    bindings: Bindings = {}
    for spec in specs:
        text, protocol = _protocol(spec, spec)
        if "=" in text:
            raise UsageError(f"invalid publish specification: {spec}; use [ADDRESS:]HOST:CONTAINER")
        address, host, container = _split(text)
        if address:
            import ipaddress

            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise UsageError(f"invalid IP address: {address} (in {spec})") from None
        if not container:
            raise UsageError(f"no port specified: {spec}<empty>")
        inner = _range(container, spec)
        outer = _range(host, spec) if host else None
        if outer is not None and len(outer) != len(inner):
            if len(inner) != 1:
                raise UsageError(f"invalid ranges specified for container and host Ports: "
                                 f"{container} and {host}")  # fmt: skip
            # One container port, any free host port of the range.
            key = f"{inner[0]}/{protocol}"
            exposed[key] = {}
            bindings.setdefault(key, []).append({"HostIp": address, "HostPort": host})
            continue
        for at, port in enumerate(inner):
            key = f"{port}/{protocol}"
            exposed[key] = {}
            taken = str(outer[at]) if outer is not None else ""
            bindings.setdefault(key, []).append({"HostIp": address, "HostPort": taken})
    return exposed, bindings


def expose(specs: list[str]) -> dict[str, dict[str, Any]]:
    """ExposedPorts of all --expose values."""
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        text, protocol = _protocol(spec, spec)
        if ":" in text:
            raise UsageError(f"invalid port format for --expose: {spec}")
        for port in _range(text, spec):
            found[f"{port}/{protocol}"] = {}
    return found
