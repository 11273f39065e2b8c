"""list, ps, events: what there is and what it uses."""

import json
import os
import subprocess
import time
from typing import Any

from bulkhead.errors import Invalid
from bulkhead.runtime import lifecycle
from bulkhead.runtime.main import Context
from bulkhead.runtime.records import state as spec_state


def _format(context: Context) -> str:
    wanted = context.text("format")
    if wanted not in ("table", "json"):
        raise Invalid(f"invalid format option {wanted!r}: table or json")
    return wanted


def list_(context: Context) -> int:
    """The containers below the root."""
    rows = []
    for identity in context.records.ids():
        record = context.records.load(identity)
        shown = spec_state(record, context.records.status(record))
        rows.append(
            shown | {"rootfs": record.rootfs, "created": record.created, "owner": record.owner}
        )
    if context.flag("quiet"):
        for row in rows:
            print(row["id"])
    elif _format(context) == "json":
        print(json.dumps(rows))
    else:
        _table(("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"), rows)
    return 0


def _table(names: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    lines = [names, *(tuple(str(row[name.lower()]) for name in names) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("   ".join(cells).rstrip())


def ps(context: Context) -> int:
    """The processes of a container, as ids or as ps(1) shows them."""
    identity, *options = context.arguments
    record = context.records.load(identity)
    pids = lifecycle.load(context.records, record).group.pids()
    if _format(context) == "json":
        print(json.dumps(pids))
        return 0
    done = subprocess.run(
        ["/bin/ps", *(options or ["-ef"])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Invalid(f"ps: {done.stderr.strip()}")
    head, *lines = done.stdout.splitlines()
    if "PID" not in head.split():
        raise Invalid("ps printed no column PID: choose options that do")
    column = head.split().index("PID")
    wanted = {str(pid) for pid in pids}
    print(head)
    for line in lines:
        if line.split()[column] in wanted:
            print(line)
    return 0


def events(context: Context) -> int:
    """Statistics as JSON lines, and a line for each kill for want of memory."""
    record = context.records.load(context.arguments[0])
    if context.records.status(record) == "stopped":
        raise Invalid(f"container with id {record.id} is not running")
    group = lifecycle.load(context.records, record).group
    interval_s = _seconds(context.text("interval"))
    kills = group.oom_kills()
    while True:
        _say("stats", record.id, _stats(group.stats()))
        if context.flag("stats"):
            return 0
        time.sleep(interval_s)
        if not os.path.exists(f"/proc/{record.pid}") or context.records.status(record) == "stopped":
            return 0
        now = group.oom_kills()
        if now > kills:
            _say("oom", record.id, None)
        kills = now


def _say(kind: str, identity: str, data: "dict[str, Any] | None") -> None:
    print(json.dumps({"type": kind, "id": identity} | ({"data": data} if data else {})), flush=True)


def _seconds(text: str) -> float:
    """A duration like "5s", "500ms", "1m"."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return float(number) * factor
    raise Invalid(f"--interval {text!r} is not a duration like 5s")


def _stats(docker: dict[str, Any]) -> dict[str, Any]:
    """Docker's statistics in the shape of this command's peers."""
    cpu, memory = docker["cpu_stats"], docker["memory_stats"]
    usage = cpu["cpu_usage"]
    return {
        "cpu": {
            "usage": {
                "total": usage["total_usage"],
                "percpu": usage.get("percpu_usage"),
                "kernel": usage["usage_in_kernelmode"],
                "user": usage["usage_in_usermode"],
            },
            "throttling": {
                "periods": cpu.get("throttling_data", {}).get("periods", 0),
                "throttledPeriods": cpu.get("throttling_data", {}).get("throttled_periods", 0),
                "throttledTime": cpu.get("throttling_data", {}).get("throttled_time", 0),
            },
        },
        "memory": {
            "usage": {
                "limit": memory.get("limit", 0),
                "usage": memory.get("usage", 0),
                "max": memory.get("max_usage", 0),
                "failcnt": memory.get("failcnt", 0),
            },
            "raw": memory.get("stats", {}),
        },
        "pids": docker.get("pids_stats", {}),
    }
