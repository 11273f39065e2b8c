"""`move`: a workload behind another boundary."""

from collections.abc import Generator
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed, UsageError


def _followed(
    context: Context, stream: Generator[Any, None, Any], *, quiet: bool
) -> dict[str, Any]:
    """Show what happens; the result."""
    while True:
        try:
            item = next(stream)
        except StopIteration as end:
            result: dict[str, Any] = end.value
            return result
        if not quiet:
            context.err(item["Step"])


def move(context: Context, parsed: Parsed) -> None:
    """`bulkhead move WORKLOAD --to BOUNDARY`."""
    if not parsed["to"]:
        raise UsageError("--to is missing: container, sandbox or microvm")
    stream = context.stream(
        "workload.move",
        {
            "id": parsed.args[0],
            "to": parsed["to"],
            "kernel": parsed["kernel"],
            "timeout_s": float(parsed["timeout"]),
            "drain_s": float(parsed["drain"]),
            "stop_first": parsed["stop-first"],
        },
    )
    found = _followed(context, stream, quiet=parsed["quiet"])
    if not parsed["quiet"]:
        context.err(f"{found['Name']} is behind the boundary {found['Boundary']} ({found['Way']})")
        if found["Held"]:
            context.err(f"new connections waited {found['Held']:.3f} s")
        if found["Gap"]:
            context.err(f"nobody answered for {found['Gap']:.3f} s")
        if found["Cut"]:
            context.err("connections that did not end in time were cut")
    context.out(found["Id"])


COMMANDS = {
    "move": Command(
        "move", "Put a workload behind another boundary", move, arguments="WORKLOAD",
        options=(
            Option("--drain", "int", "Seconds for open connections to end", default=10),
            Option("--kernel", "string", "Guest kernel (default: the boundary's own)"),
            Option("-q, --quiet", "bool", "Print the new id only"),
            Option("--stop-first", "bool",
                   "Stop the old one before the new one starts, also without a writable volume"),
            Option("--timeout", "int", "Seconds for the new one to become ready", default=60),
            Option("--to", "string", "Boundary: container, sandbox or microvm"),
        ),
        examples=(
            "bulkhead move web --to microvm",
            "bulkhead move db --to sandbox --timeout 120",
        ),
        least=1, most=1, completes="container",
    ),
}  # fmt: skip
