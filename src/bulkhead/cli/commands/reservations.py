"""`system reservations`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT, JSON, Parsed
from bulkhead.cli.output import one, table
from bulkhead.cli.units import binary_size


def _cpus(nano: int) -> str:
    return f"{nano / 10**9:.2f}".rstrip("0").rstrip(".")


def _totals(found: dict[str, Any]) -> list[list[str]]:
    cpus, memory, io = found["Cpus"], found["Memory"], found["Io"]
    note = f"{cpus['Pinned']} are workloads' own; {cpus['Shared']} shared" if cpus["Pinned"] else ""
    return [
        ["CPUs", *(_cpus(cpus[key]) for key in ("Capacity", "Reserved", "Free")), note],
        ["Memory", *(binary_size(memory[key]) for key in ("Capacity", "Reserved", "Free")), ""],
        ["Disk time", *(f"{io[key]}%" for key in ("Capacity", "Reserved", "Free")), io["Remedy"]],
    ]


def reservations(context: Context, parsed: Parsed) -> None:
    """`bulkhead system reservations`."""
    found = context.call("system.reservations")
    if one(context, parsed, found):
        return
    context.out(table(["RESOURCE", "CAPACITY", "RESERVED", "FREE", "NOTE"], _totals(found)))
    rows = [
        [
            held["Name"], held["State"], _cpus(held["NanoCpus"]), held["Pinned"] or "-",
            binary_size(held["Memory"]), f"{held['Io']}%",
        ]
        for held in found["Workloads"]
    ]  # fmt: skip
    if rows:
        context.out("")
        context.out(table(["NAME", "STATE", "CPUS", "OWN", "MEMORY", "DISK TIME"], rows))


COMMANDS = {
    "system reservations": Command(
        "system reservations", "Show what is reserved, and what is free", reservations,
        options=(FORMAT, JSON),
        examples=(
            "bulkhead system reservations",
            "bulkhead system reservations --format '{{.Cpus.Free}}'",
        ),
    ),
}  # fmt: skip
