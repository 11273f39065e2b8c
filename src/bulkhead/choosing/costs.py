"""What a boundary costs on this host: read from the last comparison, `<root>/compare.json`.

`bulkhead compare` writes the file; nothing here is guessed when it is missing. Its shape:

    {"version": 1, "made": "2026-11-21T22:00:00Z", "image": "debian:bookworm",
     "host": {"kernel": "6.18.0", "cpus": 2, "memory_bytes": 25000000000, "kvm": false},
     "boundaries": {"container": {"start_warm_ms": {"median": 41.0, "low": 39.5, "high": 43.1,
                                                    "rounds": 15}, …}, …},
     "peers": {"docker": {…}, …}}

Figures have their unit at the end of their name. Those that are read here are in `FIGURES`; others
are kept as they are. `low` and `high` bound the median at 95%.
"""

import os
from typing import Any

import msgspec

from bulkhead.errors import Invalid
from bulkhead.home import Home

FILE = "compare.json"
MOST_BYTES = 16 << 20

FIGURES = {
    "start_cold_ms": "start, cold",
    "start_warm_ms": "start, warm",
    "start_clone_ms": "start, clone",
    "ready_ms": "start to ready",
    "stop_ms": "stop",
    "memory_mib": "memory of the boundary itself, each",
    "density": "how many fit",
    "disk_mib": "disk, each",
    "churn_per_s": "starts a second",
    "syscall_ns": "a system call",
    "cpu_ratio": "computing time, bare = 1",
    "disk_ratio": "disk throughput, bare = 1",
    "network_ratio": "network throughput, bare = 1",
    "surface_syscalls": "system calls that reach the host's kernel",
}
"""Name of a figure: what it is."""


class Figure(msgspec.Struct, frozen=True):
    """One measured figure."""

    median: float
    low: float | None = None
    high: float | None = None
    rounds: int = 0


class Comparison(msgspec.Struct, frozen=True):
    """The file."""

    version: int
    boundaries: dict[str, dict[str, Figure]]
    made: str = ""
    image: str = ""
    host: dict[str, Any] = {}
    peers: dict[str, dict[str, Figure]] = {}

    def figure(self, boundary: str, name: str) -> float | None:
        """The median, None if it was not measured."""
        found = self.boundaries.get(boundary, {}).get(name)
        return found.median if found else None


def load(home: Home) -> Comparison | None:
    """The last comparison, None if there is none; Invalid for a file that is not one."""
    where = home.in_root(FILE)
    try:
        with open(where, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Invalid(f"the comparison {where} cannot be read: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=Comparison)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise Invalid(f"{where} is no comparison: {error}") from None
    if found.version != 1:
        raise Invalid(f"{where}: version {found.version} is not known: there is 1")
    return found


def host_memory() -> int:
    """The host's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


NOTHING = "nothing was measured on this host yet: `bulkhead compare` does"
"""What is said where there is no comparison."""


def shown(comparison: Comparison | None, boundary: str, other: str = "") -> list[str]:
    """Lines on what a boundary costs here, beside another one."""
    if comparison is None or boundary not in comparison.boundaries:
        return [NOTHING if comparison is None else f"{boundary} was not measured: {NOTHING}"]
    lines = []
    for name, what in FIGURES.items():
        figure = comparison.boundaries[boundary].get(name)
        if figure is None:
            continue
        unit = name.rpartition("_")[2] if name != "density" else ""
        unit = {"s": "/s", "mib": "MiB", "ratio": "", "syscalls": ""}.get(unit, unit)
        text = f"{what}: {figure.median:g} {unit}".rstrip()
        if figure.low is not None and figure.high is not None:
            text += f" ({figure.low:g} to {figure.high:g})"
        beside = comparison.figure(other, name) if other else None
        if beside is not None:
            text += f"; {other} {beside:g} {unit}".rstrip()
        lines.append(text)
    return [*lines, f"measured {comparison.made} with {comparison.image or 'no image named'}"]
