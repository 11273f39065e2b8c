"""`network create ls rm inspect connect disconnect prune`."""

from typing import Any

from bulkhead.cli import units
from bulkhead.cli.command import Command, Context
from bulkhead.cli.commands.inspect import inspect_objects
from bulkhead.cli.options import (
    FILTER,
    FORCE_PRUNE,
    FORMAT,
    FORMAT_LONG,
    JSON,
    NO_TRUNC,
    QUIET_IDS,
    Option,
    Parsed,
    UsageError,
)
from bulkhead.cli.output import Listing, filters
from bulkhead.errors import NotFound

LISTING = Listing(
    {
        "ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "IPv6": "IPV6",
        "Internal": "INTERNAL", "Labels": "LABELS", "CreatedAt": "CREATED AT",
    },
    ("ID", "Name", "Driver", "Scope"),
)  # fmt: skip


def _pools(parsed: Parsed) -> list[dict[str, Any]]:
    """IPAM pools: each --subnet with the --gateway, --ip-range and --aux-address inside it."""
    import ipaddress

    pools: list[dict[str, Any]] = []
    nets: list[Any] = []
    for text in parsed["subnet"]:
        try:
            nets.append(ipaddress.ip_network(text, strict=False))
        except ValueError as error:
            raise UsageError(f'invalid argument "{text}" for "--subnet" flag: {error}') from None
        pools.append({"Subnet": text})

    def owner(text: str, flag: str) -> dict[str, Any]:
        try:
            address = ipaddress.ip_interface(text).ip
        except ValueError as error:
            raise UsageError(f'invalid argument "{text}" for "--{flag}" flag: {error}') from None
        for pool, net in zip(pools, nets, strict=True):
            if address in net:
                return pool
        raise UsageError(f"no matching subnet for {flag} {text}")

    for text in parsed["ip-range"]:
        owner(text, "ip-range")["IPRange"] = text
    for text in parsed["gateway"]:
        owner(text, "gateway")["Gateway"] = text
    for name, text in parsed["aux-address"].items():
        owner(text, "aux-address").setdefault("AuxiliaryAddresses", {})[name] = text
    return pools


def create(context: Context, parsed: Parsed) -> None:
    """`bulkhead network create`."""
    body: dict[str, Any] = {
        "Name": parsed.args[0],
        "Driver": parsed["driver"],
        "Internal": parsed["internal"],
        "Attachable": parsed["attachable"],
        "Options": dict(parsed["opt"]),
        "Labels": dict(text.partition("=")[::2] for text in parsed["label"]),
        "IPAM": {"Driver": parsed["ipam-driver"], "Config": _pools(parsed)},
    }
    if parsed["ipam-opt"]:
        body["IPAM"]["Options"] = dict(parsed["ipam-opt"])
    if "ipv6" in parsed:
        body["EnableIPv6"] = parsed["ipv6"]
    if "ipv4" in parsed:
        body["EnableIPv4"] = parsed["ipv4"]
    found = context.call("network.create", body)
    context.out(found["Id"] if isinstance(found, dict) else found)


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead network ls`."""
    found = context.call("network.list", {"filters": filters(parsed)})
    rows = [
        {
            "ID": n["Id"] if parsed["no-trunc"] else n["Id"][:12],
            "Name": n["Name"],
            "Driver": n["Driver"],
            "Scope": n.get("Scope") or "local",
            "IPv6": str(bool(n.get("EnableIPv6"))).lower(),
            "Internal": str(bool(n.get("Internal"))).lower(),
            "Labels": ",".join(f"{k}={v}" for k, v in sorted((n.get("Labels") or {}).items())),
            "CreatedAt": units.local_time(units.parse_time(n.get("Created") or "")),
        }
        for n in sorted(found, key=lambda n: n["Name"])
    ]
    LISTING.show(context, parsed, rows)


def rm(context: Context, parsed: Parsed) -> int:
    """`bulkhead network rm`."""

    def act(name: str) -> str | None:
        try:
            context.call("network.remove", {"name": name})
        except NotFound:
            if not parsed["force"]:
                raise
            return None
        return name

    return context.each(parsed.args, act)


def inspect(context: Context, parsed: Parsed) -> int:
    """`bulkhead network inspect`."""
    return inspect_objects(context, parsed, ("network",))


def connect(context: Context, parsed: Parsed) -> None:
    """`bulkhead network connect NETWORK CONTAINER`."""
    endpoint: dict[str, Any] = {}
    addresses: dict[str, Any] = {}
    if parsed["ip"]:
        addresses["IPv4Address"] = parsed["ip"]
    if parsed["ip6"]:
        addresses["IPv6Address"] = parsed["ip6"]
    if parsed["link-local-ip"]:
        addresses["LinkLocalIPs"] = list(parsed["link-local-ip"])
    if addresses:
        endpoint["IPAMConfig"] = addresses
    if parsed["alias"]:
        endpoint["Aliases"] = list(parsed["alias"])
    if parsed["driver-opt"]:
        endpoint["DriverOpts"] = dict(t.partition("=")[::2] for t in parsed["driver-opt"])
    context.call(
        "network.connect",
        {"network": parsed.args[0], "container": parsed.args[1], "endpoint": endpoint},
    )


def disconnect(context: Context, parsed: Parsed) -> None:
    """`bulkhead network disconnect NETWORK CONTAINER`."""
    context.call(
        "network.disconnect",
        {"network": parsed.args[0], "container": parsed.args[1], "force": parsed["force"]},
    )


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead network prune`."""
    warning = "WARNING! This will remove all custom networks not used by at least one container."
    if not parsed["force"] and not context.confirm(warning):
        return 1
    report(context, context.call("network.prune", {"filters": filters(parsed)}))
    return 0


def report(context: Context, found: dict[str, Any]) -> None:
    """What a network prune removed."""
    deleted = found.get("NetworksDeleted") or []
    if deleted:
        context.out("Deleted Networks:")
        for name in deleted:
            context.out(name)
        context.out("")


_PRUNE_FILTER = Option("--filter", "list", "Only those that match (until=TIME, label=KEY[=VALUE])")

COMMANDS = {
    "network create": Command(
        "network create", "Create a network", create, arguments="NETWORK",
        options=(
            Option("--attachable", "bool", "Enable manual container attachment"),
            Option("--aux-address", "map", "Addresses the driver must not give out (NAME=IP)"),
            Option("-d, --driver", "string", "Driver to manage the network", default="bridge"),
            Option("--gateway", "strings", "IPv4 or IPv6 gateway for the subnet"),
            Option("--internal", "bool", "Restrict external access to the network"),
            Option("--ip-range", "strings", "Allocate container ip from a sub-range"),
            Option("--ipam-driver", "string", "IP address management driver", default="default"),
            Option("--ipam-opt", "map", "Set IPAM driver specific options"),
            Option("--ipv4", "bool", "Enable or disable IPv4 address assignment"),
            Option("--ipv6", "bool", "Enable or disable IPv6 address assignment"),
            Option("--label", "list", "Set metadata on a network"),
            Option("-o, --opt", "map", "Set driver specific options"),
            Option("--subnet", "strings", "Subnet in CIDR format"),
        ),
        examples=("bulkhead network create --subnet 10.9.0.0/24 back",), least=1, most=1,
    ),
    "network ls": Command(
        "network ls", "List networks", ls,
        options=(FILTER, FORMAT_LONG, JSON, NO_TRUNC, QUIET_IDS),
        examples=("bulkhead network ls --filter driver=bridge",),
    ),
    "network rm": Command(
        "network rm", "Remove one or more networks", rm, arguments="NETWORK [NETWORK...]",
        options=(Option("-f, --force", "bool", "Do not error if the network does not exist"),),
        examples=("bulkhead network rm back",), least=1, most=None, completes="network",
    ),
    "network inspect": Command(
        "network inspect", "Display detailed information on one or more networks", inspect,
        arguments="NETWORK [NETWORK...]",
        options=(FORMAT, JSON, Option("-v, --verbose", "bool", "No effect: there is no more")),
        examples=("bulkhead network inspect bridge",), least=1, most=None, completes="network",
    ),
    "network connect": Command(
        "network connect", "Connect a container to a network", connect,
        arguments="NETWORK CONTAINER",
        options=(
            Option("--alias", "strings", "Add network-scoped alias for the container"),
            Option("--driver-opt", "strings", "Driver options for the network"),
            Option("--ip", "string", 'IPv4 address (e.g., "172.30.100.104")'),
            Option("--ip6", "string", 'IPv6 address (e.g., "2001:db8::33")'),
            Option("--link-local-ip", "strings", "Add a link-local address for the container"),
        ),
        examples=("bulkhead network connect --alias db back postgres",), least=2, most=2,
        completes="network",
    ),
    "network disconnect": Command(
        "network disconnect", "Disconnect a container from a network", disconnect,
        arguments="NETWORK CONTAINER",
        options=(Option("-f, --force", "bool", "Force the container to disconnect"),),
        examples=("bulkhead network disconnect back postgres",), least=2, most=2,
        completes="network",
    ),
    "network prune": Command(
        "network prune", "Remove all unused networks", prune,
        options=(_PRUNE_FILTER, FORCE_PRUNE), examples=("bulkhead network prune -f",),
    ),
}  # fmt: skip
