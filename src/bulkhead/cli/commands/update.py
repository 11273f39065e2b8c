"""`update`."""

from typing import Any

from bulkhead.cli.body import HOST_PLAIN, restart_policy
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed, UsageError
from bulkhead.cli.run_options import RESOURCES


def update(context: Context, parsed: Parsed) -> int:
    """`bulkhead update`: limits, restart policy and published ports of containers, at once."""
    body: dict[str, Any] = {
        name: parsed.values[flag] for flag, name in HOST_PLAIN.items() if flag in parsed.values
    }
    if "restart" in parsed:
        body["RestartPolicy"] = restart_policy(parsed["restart"])
    if "publish" in parsed:
        from bulkhead.cli.ports import publish

        body["PortBindings"] = publish([spec for spec in parsed["publish"] if spec])[1]
    if not body:
        raise UsageError("you must provide one or more flags when using this command")

    def act(name: str) -> str:
        found = context.call("workload.update", {"id": name, "body": body}) or {}
        for warning in found.get("Warnings") or ():
            context.err(f"WARNING: {warning}")
        return name

    return context.each(parsed.args, act)


COMMANDS = {
    "update": Command(
        "update", "Update configuration of one or more containers", update,
        arguments="CONTAINER [CONTAINER...]",
        options=(
            *RESOURCES,
            Option("-p, --publish", "list",
                   "Replace the published ports (an empty value: publish none)"),
        ),
        examples=("bulkhead update --memory 128m --cpus 1.5 web", "bulkhead update -p 8081:80 web"),
        least=1, most=None, completes="container",
    )
}  # fmt: skip
