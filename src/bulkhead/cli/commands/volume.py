"""`volume create ls rm inspect prune`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.commands.inspect import inspect_objects
from bulkhead.cli.options import (
    FILTER,
    FORCE_PRUNE,
    FORMAT,
    FORMAT_LONG,
    JSON,
    Option,
    Parsed,
    UsageError,
)
from bulkhead.cli.output import Listing, filters
from bulkhead.cli.units import human_size, short_size
from bulkhead.errors import NotFound

LISTING = Listing(
    {
        "Driver": "DRIVER", "Name": "VOLUME NAME", "Scope": "SCOPE", "Mountpoint": "MOUNTPOINT",
        "Labels": "LABELS", "Links": "LINKS", "Size": "SIZE",
    },
    ("Driver", "Name"),
    quiet="Name",
)  # fmt: skip


def create(context: Context, parsed: Parsed) -> None:
    """`bulkhead volume create [NAME]`."""
    if parsed.args and "name" in parsed:
        raise UsageError("conflicting options: cannot specify a volume-name through both --name "
                         "and as a positional arg")  # fmt: skip
    name = parsed.args[0] if parsed.args else parsed["name"]
    body: dict[str, Any] = {
        "Name": name,
        "Driver": parsed["driver"],
        "DriverOpts": dict(parsed["opt"]),
        "Labels": dict(text.partition("=")[::2] for text in parsed["label"]),
    }
    context.out(context.call("volume.create", body)["Name"])


def _volumes(found: Any) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = (
        found.get("Volumes") or [] if isinstance(found, dict) else found or []
    )
    return sorted(volumes, key=lambda v: v["Name"])


def row(volume: dict[str, Any]) -> dict[str, Any]:
    """The columns of one volume."""
    usage = volume.get("UsageData") or {}
    size, links = usage.get("Size", -1), usage.get("RefCount", -1)
    return {
        "Driver": volume["Driver"],
        "Name": volume["Name"],
        "Scope": volume.get("Scope") or "local",
        "Mountpoint": volume.get("Mountpoint") or "",
        "Labels": ",".join(f"{k}={v}" for k, v in sorted((volume.get("Labels") or {}).items())),
        "Links": str(links) if links >= 0 else "N/A",
        "Size": short_size(size) if size >= 0 else "N/A",
    }


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead volume ls`."""
    found = _volumes(context.call("volume.list", {"filters": filters(parsed)}))
    LISTING.show(context, parsed, [row(volume) for volume in found])


def rm(context: Context, parsed: Parsed) -> int:
    """`bulkhead volume rm`."""

    def act(name: str) -> str:
        try:
            context.call("volume.remove", {"name": name, "force": parsed["force"]})
        except NotFound:
            if not parsed["force"]:
                raise
        return name

    return context.each(parsed.args, act)


def inspect(context: Context, parsed: Parsed) -> int:
    """`bulkhead volume inspect`."""
    return inspect_objects(context, parsed, ("volume",))


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead volume prune`."""
    wanted = filters(parsed)
    kind = "anonymous local volumes"
    if parsed["all"]:
        wanted["all"] = ["true"]
        kind = "local volumes"
    warning = f"WARNING! This will remove all {kind} not used by at least one container."
    if not parsed["force"] and not context.confirm(warning):
        return 1
    report(context, context.call("volume.prune", {"filters": wanted}))
    return 0


def report(context: Context, found: dict[str, Any], *, total: bool = True) -> None:
    """What a volume prune removed."""
    deleted = found.get("VolumesDeleted") or []
    if deleted:
        context.out("Deleted Volumes:")
        for name in deleted:
            context.out(name)
        context.out("")
    if total:
        context.out(f"Total reclaimed space: {human_size(found.get('SpaceReclaimed') or 0)}")


COMMANDS = {
    "volume create": Command(
        "volume create", "Create a volume", create, arguments="[VOLUME]",
        options=(
            Option("-d, --driver", "string", "Specify volume driver name", default="local"),
            Option("--label", "list", "Set metadata for a volume"),
            Option("--name", "string", "Specify volume name", hidden=True),
            Option("-o, --opt", "map", "Set driver specific options"),
        ),
        examples=(
            "bulkhead volume create --label app=db data",
            "bulkhead volume create --opt size=1g limited",
        ), most=1,
    ),
    "volume ls": Command(
        "volume ls", "List volumes", ls,
        options=(
            FILTER, FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display volume names"),
        ),
        examples=("bulkhead volume ls --filter dangling=true",),
    ),
    "volume rm": Command(
        "volume rm", "Remove one or more volumes", rm, arguments="VOLUME [VOLUME...]",
        options=(Option("-f, --force", "bool", "Force the removal of one or more volumes"),),
        examples=("bulkhead volume rm data",), least=1, most=None, completes="volume",
    ),
    "volume inspect": Command(
        "volume inspect", "Display detailed information on one or more volumes", inspect,
        arguments="VOLUME [VOLUME...]", options=(FORMAT, JSON),
        examples=("bulkhead volume inspect data",), least=1, most=None, completes="volume",
    ),
    "volume prune": Command(
        "volume prune", "Remove unused local volumes", prune,
        options=(
            Option("-a, --all", "bool", "Remove all unused volumes, not just anonymous ones"),
            Option("--filter", "list", "Only those that match (label=KEY[=VALUE])"),
            FORCE_PRUNE,
        ),
        examples=("bulkhead volume prune -af",),
    ),
}  # fmt: skip
