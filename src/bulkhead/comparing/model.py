"""What a comparison is: figures of subjects by metric, and what could not be had and why."""

import csv
import io
import math
import os
import tempfile
from typing import Any

import msgspec

from bulkhead.comparing.samples import Estimate, median
from bulkhead.errors import Invalid, NotFound
from bulkhead.home import Home

FILE = "compare.json"
"""In the installation's root: the last comparison, which `advise` reads."""

VERSION = 1


class Metric(msgspec.Struct, frozen=True):
    """One thing that is measured."""

    key: str
    group: str
    title: str
    unit: str
    explains: str
    better: str = "less"
    """"less", "more", or "" where neither is better."""


class Figure(msgspec.Struct, frozen=True):
    """One metric of one subject: the median, and where a repetition's median is expected."""

    subject: str
    metric: str
    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()
    note: str = ""


class Gap(msgspec.Struct, frozen=True):
    """What could not be measured, and why; `metric` empty: the whole subject."""

    subject: str
    metric: str
    reason: str


class Comparison(msgspec.Struct):
    """A whole run."""

    version: int
    created: str
    """RFC 3339, UTC."""
    seconds: float
    host: dict[str, str]
    image: str
    command: list[str]
    subjects: dict[str, str]
    """Name → what it is, with versions."""
    metrics: list[Metric]
    figures: list[Figure] = msgspec.field(default_factory=list)
    gaps: list[Gap] = msgspec.field(default_factory=list)

    def figure(self, subject: str, metric: str) -> Figure | None:
        """That figure if it was measured."""
        for one in self.figures:
            if one.subject == subject and one.metric == metric:
                return one
        return None

    def add(
        self, subject: str, metric: str, found: "list[float] | Estimate", note: str = ""
    ) -> None:
        """Take samples in (their median is the figure), or an estimate made elsewhere."""
        if isinstance(found, list):
            self.figures.append(_figure(subject, metric, median(found), tuple(found), note))
        else:
            self.figures.append(_figure(subject, metric, found, (), note))

    def miss(self, subject: str, metric: str, reason: str) -> None:
        """Say that it could not be had."""
        self.gaps.append(Gap(subject, metric, " ".join(reason.split())[:300]))


def _figure(
    subject: str, metric: str, found: Estimate, samples: tuple[float, ...], note: str
) -> Figure:
    if not all(map(math.isfinite, (found.value, found.low, found.high))):
        raise ValueError(f"{subject}: {metric} is not a number")
    return Figure(subject, metric, found.value, found.low, found.high, samples, note)


def as_json(comparison: Comparison) -> bytes:
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n"


def as_csv(comparison: Comparison) -> str:
    """A line for each figure; times, sizes and rates in the unit that the line names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["subject", "metric", "unit", "median", "low", "high", "samples", "note"])
    units = {metric.key: metric.unit for metric in comparison.metrics}
    for one in comparison.figures:
        row = [f"{value:.6g}" for value in (one.value, one.low, one.high)]
        writer.writerow(
            [one.subject, one.metric, units[one.metric], *row, len(one.samples), one.note]
        )
    return out.getvalue()


_BRIEF = {
    "start.cold": "start_cold_ms", "start.first": "start_warm_ms", "start.ready": "ready_ms",
    "stop": "stop_ms", "memory": "memory_mib", "density": "density", "image.disk": "disk_mib",
    "churn": "churn_per_s", "surface.filter": "surface_syscalls",
}  # fmt: skip
_OWN = ("container", "sandbox", "microvm", "vm")


def brief(comparison: Comparison) -> dict[str, Any]:
    """What `advise` reads (choosing.costs): figures by name, with their units in it."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {"boundaries": {}, "peers": {}}
    for one in comparison.figures:
        kind = "boundaries" if one.subject in _OWN else "peers"
        if name := _BRIEF.get(one.metric):
            found[kind].setdefault(one.subject, {})[name] = {
                "median": round(one.value, 3), "low": round(one.low, 3), "high": round(one.high, 3),
                "rounds": len(one.samples),
            }  # fmt: skip
    for subject in list(found["boundaries"]):
        for metric, name in (("cpu", "cpu_ratio"), ("disk.write", "disk_ratio")):
            own, bare = (comparison.figure(which, metric) for which in (subject, "host"))
            if own is not None and bare is not None and bare.value:
                ratio = {"median": round(own.value / bare.value, 3)}
                found["boundaries"][subject][name] = ratio
    return {"made": comparison.created, **found}


def keep(home: Home, comparison: Comparison) -> str:
    """Write it as the installation's last one, whole or not at all; its path."""
    os.makedirs(home.root, mode=0o711, exist_ok=True)
    path = home.in_root(FILE)
    with tempfile.NamedTemporaryFile(dir=home.root, prefix=f".{FILE}.", delete=False) as file:
        try:
            whole = msgspec.to_builtins(comparison) | brief(comparison)
            file.write(msgspec.json.format(msgspec.json.encode(whole), indent=2))
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def last(home: Home) -> Comparison:
    """The installation's last comparison; NotFound without one, Invalid if it cannot be read."""
    path = home.in_root(FILE)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise NotFound("nothing was compared on this host yet: run 'bulkhead compare'") from None
    try:
        found = msgspec.json.decode(data, type=Comparison)
    except msgspec.MsgspecError as error:
        raise Invalid(f"{path}: {error}; run 'bulkhead compare' again") from None
    if found.version != VERSION:
        raise Invalid(f"{path}: is of version {found.version}; run 'bulkhead compare' again")
    return found
