"""`inspect` of anything; the network and volume forms use `inspect_objects` too."""

from collections.abc import Callable, Sequence
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT, JSON, Option, Parsed
from bulkhead.cli.output import dump, unescape
from bulkhead.cli.template import Template, to_json
from bulkhead.errors import BulkheadError, Invalid, NotFound

_ASK: dict[str, Callable[[str, bool], tuple[str, dict[str, Any]]]] = {
    "container": lambda name, size: ("workload.inspect", {"id": name, "size": size}),
    "image": lambda name, size: ("image.inspect", {"name": name}),
    "network": lambda name, size: ("network.inspect", {"name": name}),
    "volume": lambda name, size: ("volume.inspect", {"name": name}),
    "vm": lambda name, size: ("vm.inspect", {"id": name}),
}


def find(context: Context, name: str, kinds: Sequence[str], *, size: bool) -> Any:
    """The first of `kinds` that has `name`; NotFound in docker's words."""
    missing: NotFound | None = None
    for kind in kinds:
        method, params = _ASK[kind](name, size)
        try:
            return context.call(method, params)
        except NotFound as error:
            missing = error
        except Invalid:
            if len(kinds) == 1:
                raise
    if len(kinds) == 1 and missing is not None:
        raise missing
    raise NotFound(f"No such object: {name}")


def inspect_objects(context: Context, parsed: Parsed, kinds: Sequence[str]) -> int:
    """Print every named object; 1 if one is missing, the others printed all the same."""
    found, code = [], 0
    wanted = "json" if context.json or parsed["json"] else parsed["format"]
    size = bool(parsed.values.get("size"))
    for name in parsed.args:
        try:
            found.append(find(context, name, kinds, size=size))
        except BulkheadError as error:
            context.err(f"bulkhead: {error.message}")
            code = 1
    if not wanted:
        context.out(dump(found))
        return code
    template = None if wanted == "json" else Template(unescape(wanted))
    for value in found:
        context.out(template.render(value) if template else to_json(value))
    return code


def inspect(context: Context, parsed: Parsed) -> int:
    """`bulkhead inspect`."""
    kinds = (parsed["type"],) if parsed["type"] else tuple(_ASK)
    return inspect_objects(context, parsed, kinds)


COMMANDS = {
    "inspect": Command(
        "inspect", "Return low-level information on bulkhead objects", inspect,
        arguments="NAME|ID [NAME|ID...]",
        options=(
            FORMAT,
            JSON,
            Option("-s, --size", "bool", "Display total file sizes if the type is container"),
            Option("--type", "string", "Only inspect objects of the given type",
                   choices=tuple(_ASK)),
        ),
        examples=(
            "bulkhead inspect web",
            "bulkhead inspect -f '{{range .Mounts}}{{.Destination}} {{end}}' web",
        ),
        least=1, most=None, completes="container",
    )
}  # fmt: skip
