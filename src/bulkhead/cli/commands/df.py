"""`system df`."""

from typing import Any

from bulkhead.cli import units
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT_LONG, JSON, Option, Parsed
from bulkhead.cli.output import Listing, Row, table
from bulkhead.cli.template import to_json

LISTING = Listing(
    {
        "Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE",
        "Reclaimable": "RECLAIMABLE",
    },
    ("Type", "TotalCount", "Active", "Size", "Reclaimable"),
    quiet="Type",
)  # fmt: skip


def _row(kind: str, count: int, active: int, size: int, free: int) -> Row:
    percent = f" ({free * 100 // size}%)" if size else ""
    return {
        "Type": kind, "TotalCount": str(count), "Active": str(active),
        "Size": units.short_size(size), "Reclaimable": units.short_size(free) + percent,
    }  # fmt: skip


def rows(found: dict[str, Any]) -> list[Row]:
    """The four lines of the table, from the API's data."""
    images = found.get("Images") or []
    used = sum(i["Size"] - max(i.get("SharedSize") or 0, 0) for i in images if i.get("Containers"))
    total = int(found.get("LayersSize") or 0)
    containers = found.get("Containers") or []
    running = [c for c in containers if c.get("State") in ("running", "paused", "restarting")]
    written = sum(c.get("SizeRw") or 0 for c in containers)
    volumes = found.get("Volumes") or []
    linked = [v for v in volumes if (v.get("UsageData") or {}).get("RefCount", 0) > 0]

    def size(some: list[dict[str, Any]]) -> int:
        return sum(max((v.get("UsageData") or {}).get("Size", 0), 0) for v in some)

    cache = found.get("BuildCache") or []
    cached = sum(entry.get("Size") or 0 for entry in cache)
    active = sum(1 for i in images if (i.get("Containers") or 0) > 0)
    return [
        _row("Images", len(images), active, total, max(total - used, 0) if active else total),
        _row("Containers", len(containers), len(running), written,
             written - sum(c.get("SizeRw") or 0 for c in running)),
        _row("Local Volumes", len(volumes), len(linked), size(volumes),
             size(volumes) - size(linked)),
        _row("Build Cache", len(cache), 0, cached, cached),
    ]  # fmt: skip


def df(context: Context, parsed: Parsed) -> None:
    """`bulkhead system df`."""
    found = context.call("system.df")
    if parsed["verbose"] and not parsed["format"]:
        if context.json or parsed["json"]:
            context.out(to_json(found))
        else:
            _verbose(context, found)
        return
    LISTING.show(context, parsed, rows(found))


def _verbose(context: Context, found: dict[str, Any]) -> None:
    from bulkhead.cli.commands import images, ps, volume

    context.out("Images space usage:\n")
    lines = [row for image in found.get("Images") or () for row in images.rows(image, full=False)]
    columns = ("Repository", "Tag", "ID", "CreatedSince", "Size", "SharedSize", "UniqueSize",
               "Containers")  # fmt: skip
    context.out(images.IMAGES.text("", lines, columns))
    context.out("\nContainers space usage:\n")
    lines = [ps.row(entry, full=False) for entry in found.get("Containers") or ()]
    columns = ("ID", "Image", "Command", "LocalVolumes", "Size", "RunningFor", "Status", "Names")
    context.out(ps.LISTING.text("", lines, columns))
    context.out("\nLocal Volumes space usage:\n")
    lines = [volume.row(entry) for entry in found.get("Volumes") or ()]
    context.out(
        table(["VOLUME NAME", "LINKS", "SIZE"], [[r["Name"], r["Links"], r["Size"]] for r in lines])
    )


COMMANDS = {
    "system df": Command(
        "system df", "Show disk usage", df,
        options=(
            FORMAT_LONG, JSON,
            Option("-v, --verbose", "bool", "Show detailed information on space usage"),
        ),
        examples=("bulkhead system df -v",),
    )
}  # fmt: skip
