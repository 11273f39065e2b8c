"""`diff`, `port`, `top` and `explain`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT, JSON, Parsed
from bulkhead.cli.output import dump, one, table
from bulkhead.errors import NotFound

_KINDS = {0: "C", 1: "A", 2: "D"}


def diff(context: Context, parsed: Parsed) -> None:
    """`bulkhead diff`."""
    for change in context.call("workload.changes", {"id": parsed.args[0]}) or ():
        context.out(f"{_KINDS[change['Kind']]} {change['Path']}")


def port(context: Context, parsed: Parsed) -> None:
    """`bulkhead port CONTAINER [PORT[/PROTO]]`."""
    found = context.call("workload.inspect", {"id": parsed.args[0]})
    ports: dict[str, Any] = (found.get("NetworkSettings") or {}).get("Ports") or {}
    wanted = parsed.args[1] if len(parsed.args) > 1 else ""
    if wanted and "/" not in wanted:
        wanted += "/tcp"
    shown = False
    for inner in sorted(ports, key=lambda p: (int(p.partition("/")[0]), p)):
        for binding in ports[inner] or ():
            address = binding.get("HostIp") or "0.0.0.0"
            outer = f"[{address}]" if ":" in address else address
            line = f"{outer}:{binding['HostPort']}"
            if not wanted:
                context.out(f"{inner} -> {line}")
            elif wanted == inner:
                context.out(line)
                shown = True
    if wanted and not shown:
        raise NotFound(f"No public port '{wanted}' published for {parsed.args[0]}")


def top(context: Context, parsed: Parsed) -> None:
    """`bulkhead top CONTAINER [ps OPTIONS]`."""
    params: dict[str, Any] = {"id": parsed.args[0]}
    if len(parsed.args) > 1:
        params["ps_args"] = " ".join(parsed.args[1:])
    found = context.call("workload.top", params)
    context.out(table(found["Titles"], found["Processes"] or ()))


def explain(context: Context, parsed: Parsed) -> None:
    """`bulkhead explain`: what the kernel says, section by section."""
    found = context.call("workload.explain", {"id": parsed.args[0]})
    if one(context, parsed, found):
        return
    for section, value in found.items():
        context.out(f"{section}")
        for line in _lines(value, 1):
            context.out(line)


def _lines(value: Any, depth: int) -> list[str]:
    indent = "  " * depth
    if isinstance(value, dict):
        lines = []
        for key, inner in value.items():
            if isinstance(inner, (dict, list)) and inner:
                lines.append(f"{indent}{key}")
                lines.extend(_lines(inner, depth + 1))
            else:
                lines.append(f"{indent}{key}: {_plain(inner)}")
        return lines
    if isinstance(value, list):
        lines = []
        for inner in value:
            if isinstance(inner, dict):
                lines.append(indent + "  ".join(f"{k}={_plain(v)}" for k, v in inner.items()))
            elif isinstance(inner, list):
                lines.append(indent + "  ".join(_plain(v) for v in inner))
            else:
                lines.append(f"{indent}{_plain(inner)}")
        return lines
    return [f"{indent}{line}" for line in _plain(value).splitlines()]


def _plain(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return dump(value) if value else "none"
    if value is None or value == "":
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


COMMANDS = {
    "diff": Command(
        "diff", "Inspect changes to files or directories on a container's filesystem", diff,
        arguments="CONTAINER", least=1, most=1, examples=("bulkhead diff web",),
        completes="container",
    ),
    "port": Command(
        "port", "List port mappings or a specific mapping for the container", port,
        arguments="CONTAINER [PRIVATE_PORT[/PROTO]]", least=1, most=2,
        examples=("bulkhead port web", "bulkhead port web 80/tcp"), completes="container",
    ),
    "top": Command(
        "top", "Display the running processes of a container", top,
        arguments="CONTAINER [ps OPTIONS]", least=1, most=None, interspersed=False,
        examples=("bulkhead top web", "bulkhead top web -o pid,comm"), completes="container",
    ),
    "explain": Command(
        "explain", "Show the kernel's view of a container", explain, arguments="CONTAINER",
        options=(FORMAT, JSON), least=1, most=1,
        examples=("bulkhead explain web", "bulkhead explain --json web"), completes="container",
    ),
}  # fmt: skip
