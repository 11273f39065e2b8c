"""Usage in the shape of Docker's ContainerStatsResponse, from either version's files.

Times are nanoseconds, sizes bytes. `precpu_stats` and `read` are the asker's to add.
"""

import os
from collections.abc import Mapping
from typing import Any

from bulkhead.isolation.cgroups import files

NO_LIMIT = 1 << 62
"""v1 says "no limit" by a number of pages near 2**63."""

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def system_cpu_ns() -> int:
    """All time the machine's processors spent, idle time included; proc_stat(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = file.readline().split()
    # user nice system idle iowait irq softirq steal; guest time is part of user time.
    return sum(int(field) for field in fields[1:9]) * _TICK_NS


def memory_total() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _online() -> int:
    return os.cpu_count() or 1


def _limit(value: int) -> int:
    """Docker shows the machine's memory where there is no limit."""
    total = memory_total()
    return value if 0 < value < total else total


def v1(folder: Mapping[str, str]) -> dict[str, Any]:
    """The statistics of a v1 group; `folder` maps controllers to its directories."""
    return {
        "cpu_stats": _cpu_v1(folder),
        "memory_stats": _memory_v1(folder["memory"]) if "memory" in folder else {},
        "pids_stats": _pids(folder["pids"]) if "pids" in folder else {},
        "blkio_stats": _blkio_v1(folder["blkio"]) if "blkio" in folder else _no_blkio(),
    }


def v2(folder: str) -> dict[str, Any]:
    """The statistics of a v2 group."""
    return {
        "cpu_stats": _cpu_v2(folder),
        "memory_stats": _memory_v2(folder),
        "pids_stats": _pids(folder),
        "blkio_stats": _blkio_v2(folder),
    }


def _cpu_v1(folder: Mapping[str, str]) -> dict[str, Any]:
    usage: dict[str, Any] = {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0}
    if "cpuacct" in folder:
        place = folder["cpuacct"]
        times = files.flat(files.get_or(f"{place}/cpuacct.stat", ""))
        usage = {
            "total_usage": files.number(f"{place}/cpuacct.usage"),
            "percpu_usage": [
                int(n) for n in files.get_or(f"{place}/cpuacct.usage_percpu", "").split()
            ],
            "usage_in_kernelmode": times.get("system", 0) * _TICK_NS,
            "usage_in_usermode": times.get("user", 0) * _TICK_NS,
        }
    throttled = files.flat(files.get_or(f"{folder['cpu']}/cpu.stat", "")) if "cpu" in folder else {}
    return {
        "cpu_usage": usage,
        "system_cpu_usage": system_cpu_ns(),
        "online_cpus": _online(),
        "throttling_data": {
            "periods": throttled.get("nr_periods", 0),
            "throttled_periods": throttled.get("nr_throttled", 0),
            "throttled_time": throttled.get("throttled_time", 0),
        },
    }


def _cpu_v2(folder: str) -> dict[str, Any]:
    values = files.flat(files.get_or(f"{folder}/cpu.stat", ""))
    return {
        "cpu_usage": {
            "total_usage": values.get("usage_usec", 0) * 1000,
            "usage_in_kernelmode": values.get("system_usec", 0) * 1000,
            "usage_in_usermode": values.get("user_usec", 0) * 1000,
        },
        "system_cpu_usage": system_cpu_ns(),
        "online_cpus": _online(),
        "throttling_data": {
            "periods": values.get("nr_periods", 0),
            "throttled_periods": values.get("nr_throttled", 0),
            "throttled_time": values.get("throttled_usec", 0) * 1000,
        },
    }


def _memory_v1(folder: str) -> dict[str, Any]:
    return {
        "usage": files.number(f"{folder}/memory.usage_in_bytes"),
        "max_usage": files.number(f"{folder}/memory.max_usage_in_bytes"),
        "stats": files.flat(files.get_or(f"{folder}/memory.stat", "")),
        "failcnt": files.number(f"{folder}/memory.failcnt"),
        "limit": _limit(files.number(f"{folder}/memory.limit_in_bytes")),
    }


def _memory_v2(folder: str) -> dict[str, Any]:
    values = files.get_or(f"{folder}/memory.stat", "")
    if not values:
        return {}
    found: dict[str, Any] = {
        "usage": files.number(f"{folder}/memory.current"),
        "stats": files.flat(values),
        "limit": _limit(files.number(f"{folder}/memory.max")),
    }
    peak = files.number(f"{folder}/memory.peak")
    if peak:
        found["max_usage"] = peak
    events = files.flat(files.get_or(f"{folder}/memory.events", ""))
    if events.get("max"):
        found["failcnt"] = events["max"]
    return found


def _pids(folder: str) -> dict[str, Any]:
    found = {"current": files.number(f"{folder}/pids.current")}
    limit = files.get_or(f"{folder}/pids.max", "")
    if limit:
        # Docker shows 2**64 - 1 for "max".
        found["limit"] = 2**64 - 1 if limit == "max" else int(limit)
    return found


_BLKIO_KEYS = (
    "io_service_bytes_recursive",
    "io_serviced_recursive",
    "io_queue_recursive",
    "io_service_time_recursive",
    "io_wait_time_recursive",
    "io_merged_recursive",
    "io_time_recursive",
    "sectors_recursive",
)


def _no_blkio() -> dict[str, Any]:
    return dict.fromkeys(_BLKIO_KEYS)


def _entry(device: str, operation: str, value: str) -> dict[str, Any]:
    major, _, minor = device.partition(":")
    return {"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}


def _blkio_v1(folder: str) -> dict[str, Any]:
    found = _no_blkio()
    for key, file in (
        ("io_service_bytes_recursive", "io_service_bytes_recursive"),
        ("io_serviced_recursive", "io_serviced_recursive"),
    ):
        # BFQ counts what goes through its scheduler, the throttling layer everything.
        text = files.get_or(f"{folder}/blkio.throttle.{file}", "")
        entries = [
            _entry(*fields) for line in text.splitlines() if len(fields := line.split()) == 3
        ]
        found[key] = entries
    return found


def _blkio_v2(folder: str) -> dict[str, Any]:
    found = _no_blkio()
    sizes: list[dict[str, Any]] = []
    counts: list[dict[str, Any]] = []
    for line in files.get_or(f"{folder}/io.stat", "").splitlines():
        device, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for target, operation, name in (
            (sizes, "read", "rbytes"),
            (sizes, "write", "wbytes"),
            (counts, "read", "rios"),
            (counts, "write", "wios"),
        ):
            if name in values:
                target.append(_entry(device, operation, values[name]))
    found["io_service_bytes_recursive"] = sizes
    found["io_serviced_recursive"] = counts
    return found
