"""`events`."""

from datetime import datetime
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FILTER, FORMAT_LONG, JSON, Option, Parsed
from bulkhead.cli.output import filters, unescape
from bulkhead.cli.template import Template, to_json
from bulkhead.cli.units import moment


def line(event: dict[str, Any]) -> str:
    """One event as docker prints it: time, type, action, id, attributes."""
    nanoseconds = event.get("timeNano") or event.get("time", 0) * 10**9
    at = datetime.fromtimestamp(nanoseconds // 10**9).astimezone()
    stamp = f"{at:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 10**9:09d}{at:%z}"
    actor = event.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    shown = ", ".join(f"{key}={attributes[key]}" for key in sorted(attributes))
    tail = f" ({shown})" if shown else ""
    return (
        f"{stamp[:-2]}:{stamp[-2:]} {event['Type']} {event['Action']} {actor.get('ID', '')}{tail}"
    )


def events(context: Context, parsed: Parsed) -> None:
    """`bulkhead events`: until --until, or for ever."""
    import sys

    params: dict[str, Any] = {"filters": filters(parsed)}
    for name in ("since", "until"):
        if parsed[name]:
            params[name] = moment(parsed[name])
    wanted = "json" if context.json or parsed["json"] else parsed["format"]
    template = Template(unescape(wanted)) if wanted and wanted != "json" else None
    for event in context.stream("system.events", params):
        if template is not None:
            context.out(template.render(event))
        else:
            context.out(to_json(event) if wanted else line(event))
        sys.stdout.flush()


COMMANDS = {
    "events": Command(
        "events", "Get real time events from the engine", events,
        options=(
            FILTER, FORMAT_LONG, JSON,
            Option("--since", "string", "Show all events created since timestamp"),
            Option("--until", "string", "Stream events until this timestamp"),
        ),
        examples=("bulkhead events --since 1h --until 0s", "bulkhead events -f event=die"),
    )
}  # fmt: skip
