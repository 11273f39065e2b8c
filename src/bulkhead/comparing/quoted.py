"""Figures that are commonly quoted, beside those of this host."""

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from bulkhead.comparing.model import Comparison, Figure


@dataclass(frozen=True, slots=True)
class Verdict:
    """What this host says to a quoted figure."""

    claim: str
    source: str
    here: str
    """What was measured, in words."""
    verdict: str
    """"borne out", "not borne out" or "cannot be said here: …"."""


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One for each quoted figure (quoted.toml)."""
    text = resources.files("bulkhead.comparing").joinpath("quoted.toml").read_text()
    return [_verdict(comparison, entry) for entry in tomllib.loads(text)["figure"]]


def _verdict(comparison: Comparison, entry: dict[str, Any]) -> Verdict:
    said = ""
    if "over" in entry:
        over, under = (comparison.figure(entry[key], entry["metric"]) for key in ("over", "under"))
        values = [] if over is None or under is None else [_ratio(over, under)]
        here = [f"{entry['over']} ÷ {entry['under']}: {value:.3g}" for value in values]
    else:
        found = [comparison.figure(name, entry["metric"]) for name in entry["subjects"]]
        there = [one for one in found if one is not None]
        unit = next((m.unit for m in comparison.metrics if m.key == entry["metric"]), "")
        values = [one.value for one in there]
        here = [f"{one.subject}: {one.value:.3g} {unit}".rstrip() for one in there]
    if not values:
        said = "cannot be said here: not measured"
    elif all(entry.get("low", 0.0) <= one <= entry.get("high", float("inf")) for one in values):
        said = "borne out"
    elif entry.get("needs") == "kvm" and comparison.host.get("KVM") != "usable":
        said = "cannot be said here: no KVM, guests are emulated"
    elif any(entry.get("low", 0.0) <= one <= entry.get("high", float("inf")) for one in values):
        said = "borne out in part"
    else:
        said = "not borne out"
    if values and "remark" in entry:
        here.append(f"({entry['remark']})")
    return Verdict(entry["claim"], entry["source"], " · ".join(here) or "–", said)


def _ratio(over: Figure, under: Figure) -> float:
    return over.value / under.value if under.value else float("inf")
