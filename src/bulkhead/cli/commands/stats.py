"""`stats`."""

import sys
import time
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT_LONG, JSON, NO_TRUNC, Option, Parsed
from bulkhead.cli.output import Listing, Row
from bulkhead.cli.units import binary_size, short_size
from bulkhead.errors import BulkheadError, NotFound

LISTING = Listing(
    {
        "ID": "CONTAINER ID", "Container": "CONTAINER", "Name": "NAME", "CPUPerc": "CPU %",
        "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %", "NetIO": "NET I/O",
        "BlockIO": "BLOCK I/O", "PIDs": "PIDS",
    },
    ("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"),
)  # fmt: skip


def cpu_percent(stats: dict[str, Any]) -> float:
    """Of one CPU's time between this sample and the one before, as docker computes it."""
    now, before = stats.get("cpu_stats") or {}, stats.get("precpu_stats") or {}
    used = (now.get("cpu_usage") or {}).get("total_usage", 0)
    used -= (before.get("cpu_usage") or {}).get("total_usage", 0)
    system = (now.get("system_cpu_usage") or 0) - (before.get("system_cpu_usage") or 0)
    cpus = now.get("online_cpus") or len((now.get("cpu_usage") or {}).get("percpu_usage") or [1])
    if system <= 0 or used <= 0:
        return 0.0
    return float(used / system * cpus * 100.0)


def memory_used(stats: dict[str, Any]) -> int:
    """Without the page cache that can be dropped."""
    memory = stats.get("memory_stats") or {}
    usage = int(memory.get("usage") or 0)
    detail = memory.get("stats") or {}
    cache = detail.get("total_inactive_file", detail.get("inactive_file", 0)) or 0
    return usage - cache if cache < usage else usage


def _blocks(stats: dict[str, Any]) -> tuple[int, int]:
    read = write = 0
    for entry in (stats.get("blkio_stats") or {}).get("io_service_bytes_recursive") or ():
        operation = entry["op"].lower()
        read += entry["value"] if operation == "read" else 0
        write += entry["value"] if operation == "write" else 0
    return read, write


def row(stats: dict[str, Any], asked: str, *, full: bool) -> Row:
    """The columns of one sample."""
    memory = stats.get("memory_stats") or {}
    used, limit = memory_used(stats), int(memory.get("limit") or 0)
    networks = (stats.get("networks") or {}).values()
    received = sum(n.get("rx_bytes", 0) for n in networks)
    sent = sum(n.get("tx_bytes", 0) for n in networks)
    read, write = _blocks(stats)
    identity = stats.get("id") or ""
    return {
        "ID": identity if full else identity[:12],
        "Container": asked,
        "Name": (stats.get("name") or "").removeprefix("/"),
        "CPUPerc": f"{cpu_percent(stats):.2f}%",
        "MemUsage": f"{binary_size(used)} / {binary_size(limit)}",
        "MemPerc": f"{used / limit * 100 if limit else 0.0:.2f}%",
        "NetIO": f"{short_size(received)} / {short_size(sent)}",
        "BlockIO": f"{short_size(read)} / {short_size(write)}",
        "PIDs": str((stats.get("pids_stats") or {}).get("current") or 0),
    }


def _sample(context: Context, name: str) -> dict[str, Any] | None:
    """One sample of a container (with the one before inside it); None when it has gone."""
    found: dict[str, Any] | None = None
    for item in context.stream("workload.stats", {"id": name, "stream": False, "one_shot": False}):
        found = item
    return found


def _names(context: Context, parsed: Parsed) -> list[str]:
    if parsed.args:
        return list(parsed.args)
    found = context.call("workload.list", {"all": parsed["all"], "filters": {}})
    return [summary["Id"] for summary in found]


def stats(context: Context, parsed: Parsed) -> int:
    """`bulkhead stats`: redrawn each second, or once with --no-stream or --format json."""
    first = True
    while True:
        rows = []
        for name in _names(context, parsed):
            try:
                sample = _sample(context, name)
            except NotFound:
                if parsed.args and first:
                    raise
                continue
            except BulkheadError:
                if parsed.args:
                    raise
                continue
            if sample is not None:
                rows.append(row(sample, name, full=parsed["no-trunc"]))
        if not parsed["no-stream"] and sys.stdout.isatty():
            sys.stdout.write("\x1b[2J\x1b[H" if not parsed["format"] else "")
        LISTING.show(context, parsed, rows)
        sys.stdout.flush()
        if parsed["no-stream"]:
            return 0
        first = False
        time.sleep(1.0)


COMMANDS = {
    "stats": Command(
        "stats", "Display a live stream of container(s) resource usage statistics", stats,
        arguments="[CONTAINER...]",
        options=(
            Option("-a, --all", "bool", "Show all containers (default shows just running)"),
            FORMAT_LONG, JSON,
            Option("--no-stream", "bool",
                   "Disable streaming stats and only pull the first result"),
            NO_TRUNC,
        ),
        examples=("bulkhead stats --no-stream", "bulkhead stats web"), most=None,
        completes="container",
    )
}  # fmt: skip
