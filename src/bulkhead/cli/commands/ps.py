"""`ps`."""

from typing import Any

from bulkhead.cli import units
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FILTER, FORMAT_LONG, JSON, NO_TRUNC, QUIET_IDS, Option, Parsed
from bulkhead.cli.output import Listing, Row, filters

LISTING = Listing(
    {
        "ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT",
        "RunningFor": "CREATED", "Ports": "PORTS", "Status": "STATUS", "State": "STATE",
        "Size": "SIZE", "Names": "NAMES", "Labels": "LABELS", "Mounts": "MOUNTS",
        "LocalVolumes": "LOCAL VOLUMES", "Networks": "NETWORKS", "Boundary": "BOUNDARY",
    },
    ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names"),
)  # fmt: skip


def ports_text(ports: list[dict[str, Any]]) -> str:
    """`0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, 443/tcp`, neighbouring ports as ranges."""
    groups: dict[tuple[str, str, int | None], list[int]] = {}
    for port in sorted(
        ports,
        key=lambda p: (
            p["PrivatePort"],
            p.get("Type", ""),
            ":" in (p.get("IP") or ""),
            p.get("IP"),
        ),
    ):
        public = port.get("PublicPort")
        offset = public - port["PrivatePort"] if public else None
        key = (port.get("IP") or "", port.get("Type", "tcp"), offset)
        groups.setdefault(key, []).append(port["PrivatePort"])
    found = []
    for (address, protocol, offset), numbers in groups.items():
        for first, last in _runs(sorted(set(numbers))):
            inner = f"{first}" if first == last else f"{first}-{last}"
            if offset is None:
                found.append(f"{inner}/{protocol}")
                continue
            host = f"[{address}]" if ":" in address else address or "0.0.0.0"
            outer = f"{first + offset}" if first == last else f"{first + offset}-{last + offset}"
            found.append(f"{host}:{outer}->{inner}/{protocol}")
    return ", ".join(found)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def row(summary: dict[str, Any], *, full: bool) -> Row:
    """The columns of one ContainerSummary."""
    command = summary.get("Command") or ""
    names = [name.removeprefix("/") for name in summary.get("Names") or ()]
    mounts = [m.get("Name") or m.get("Source") or "" for m in summary.get("Mounts") or ()]
    size = units.short_size(summary.get("SizeRw") or 0)
    if summary.get("SizeRootFs"):
        size += f" (virtual {units.short_size(summary['SizeRootFs'])})"
    image = summary.get("Image") or "<no image>"
    networks = (summary.get("NetworkSettings") or {}).get("Networks") or {}
    labels = summary.get("Labels") or {}
    return {
        "ID": summary["Id"] if full else summary["Id"][:12],
        "Image": image if full or not image.startswith("sha256:") else units.short_id(image),
        "Command": f'"{command if full else units.ellipsis_text(command, 20)}"',
        "CreatedAt": units.local_time(summary.get("Created") or 0),
        "RunningFor": units.ago(summary.get("Created") or 0),
        "Ports": ports_text(summary.get("Ports") or []),
        "State": summary.get("State") or "",
        "Status": summary.get("Status") or "",
        "Size": size,
        "Names": ",".join(names),
        "Labels": ",".join(f"{key}={labels[key]}" for key in sorted(labels)),
        "Mounts": ",".join(m if full else units.ellipsis_text(m, 15) for m in mounts),
        "LocalVolumes": str(
            sum(1 for m in summary.get("Mounts") or () if m.get("Type") == "volume")
        ),
        "Networks": ",".join(sorted(networks)),
        "Boundary": summary.get("Boundary") or "container",
        "_labels": labels,
    }


def ps(context: Context, parsed: Parsed) -> None:
    """`bulkhead ps`."""
    last = 1 if parsed["latest"] else parsed["last"]
    format_text = parsed["format"]
    params: dict[str, Any] = {
        "all": bool(parsed["all"] or last > 0),
        "filters": filters(parsed),
        "size": bool(parsed["size"] or ".Size" in format_text),
    }
    if last > 0:
        params["limit"] = last
    found = context.call("workload.list", params)
    rows = [row(summary, full=parsed["no-trunc"]) for summary in found]
    if parsed["all-machines"]:
        from bulkhead.cli.commands.machine import tree

        rows = tree(context, rows, every=params["all"], plain=bool(format_text or context.json))
    columns = (*LISTING.columns, "Size") if parsed["size"] else None
    LISTING.show(context, parsed, rows, columns=columns)


COMMANDS = {
    "ps": Command(
        "ps",
        "List containers",
        ps,
        options=(
            Option("-a, --all", "bool", "Show all containers (default shows just running)"),
            Option("--all-machines", "bool", "Also show what runs in machines, below each"),
            FILTER,
            FORMAT_LONG,
            JSON,
            Option("-n, --last", "int", "Show n last created containers (includes all states)",
                   default=-1),
            Option("-l, --latest", "bool", "Show the latest created container (all states)"),
            NO_TRUNC,
            QUIET_IDS,
            Option("-s, --size", "bool", "Display total file sizes"),
        ),
        examples=(
            "bulkhead ps -a",
            "bulkhead ps --filter status=exited --format '{{.Names}}: {{.Status}}'",
        ),
    )
}  # fmt: skip
