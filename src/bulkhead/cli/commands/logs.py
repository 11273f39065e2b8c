"""`logs`."""

import os
import sys
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed, UsageError
from bulkhead.cli.units import moment


def write_all(fd: int, data: bytes) -> None:
    """Write `data` to `fd`, whole."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def logs(context: Context, parsed: Parsed) -> None:
    """`bulkhead logs`: both streams, each to its own descriptor."""
    tail = parsed["tail"]
    if tail != "all" and not tail.lstrip("-").isdecimal():
        raise UsageError(f'invalid argument "{tail}" for "-n, --tail" flag: a number, or all')
    params: dict[str, Any] = {
        "id": parsed.args[0], "follow": parsed["follow"], "stdout": True, "stderr": True,
        "timestamps": parsed["timestamps"],
    }  # fmt: skip
    if tail != "all" and int(tail) >= 0:
        params["tail"] = int(tail)
    for name in ("since", "until"):
        if parsed[name]:
            params[name] = moment(parsed[name])
    sys.stdout.flush()
    for stream, data in context.stream("workload.logs", params):
        write_all(2 if stream == 2 else 1, data)


COMMANDS = {
    "logs": Command(
        "logs", "Fetch the logs of a container", logs, arguments="CONTAINER",
        options=(
            Option("--details", "bool", "No effect: there are no extra details", hidden=True),
            Option("-f, --follow", "bool", "Follow log output"),
            Option("--since", "string",
                   "Show logs since timestamp (e.g. 2013-01-02T13:23:37Z) or relative (e.g. 42m)"),
            Option("-n, --tail", "string", "Number of lines to show from the end of the logs",
                   default="all"),
            Option("-t, --timestamps", "bool", "Show timestamps"),
            Option("--until", "string", "Show logs before a timestamp or relative (e.g. 42m)"),
        ),
        examples=("bulkhead logs -f --tail 100 web", "bulkhead logs --since 10m web"),
        least=1, most=1, completes="container",
    )
}  # fmt: skip
