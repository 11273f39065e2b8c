"""`snapshot`, `snapshot ls`, `snapshot rm`, `restore`, `fork`."""

from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT_LONG, JSON, Option, Parsed
from bulkhead.cli.output import Listing
from bulkhead.cli.units import ago, human_size

LISTING = Listing(
    {
        "Name": "NAME",
        "Workload": "CONTAINER",
        "Image": "IMAGE",
        "CreatedSince": "CREATED",
        "SizeText": "SIZE",
    },
    ("Name", "Workload", "Image", "CreatedSince", "SizeText"),
    quiet="Name",
)


def snapshot(context: Context, parsed: Parsed) -> None:
    """`bulkhead snapshot CONTAINER [NAME]`."""
    identity, *rest = parsed.args
    wanted = {"id": identity, "name": rest[0] if rest else ""}
    context.out(context.call("snapshot.create", wanted)["Name"])


def restore(context: Context, parsed: Parsed) -> None:
    """`bulkhead restore [--name NAME] SNAPSHOT`."""
    wanted = {"snapshot": parsed.args[0], "name": parsed["name"]}
    context.out(context.call("snapshot.restore", wanted)["Id"])


def fork(context: Context, parsed: Parsed) -> None:
    """`bulkhead fork [--name NAME] CONTAINER`."""
    wanted = {"id": parsed.args[0], "name": parsed["name"]}
    context.out(context.call("snapshot.fork", wanted)["Id"])


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead snapshot ls`."""
    rows: list[dict[str, Any]] = []
    for one in context.call("snapshot.list"):
        since = ago(one["Created"])
        rows.append({**one, "CreatedSince": since, "SizeText": human_size(one["Size"])})
    LISTING.show(context, parsed, rows)


def rm(context: Context, parsed: Parsed) -> int:
    """`bulkhead snapshot rm`."""

    def act(name: str) -> str:
        context.call("snapshot.remove", {"name": name})
        return name

    return context.each(parsed.args, act)


_NAME = Option("--name", "string", "Name of the new container")

COMMANDS = {
    "snapshot": Command(
        "snapshot", "Save a running container with its memory (--boundary microvm)", snapshot,
        arguments="CONTAINER [NAME]",
        examples=("bulkhead snapshot web", "bulkhead snapshot web warmed-up"),
        least=1, most=2, completes="container",
    ),
    "restore": Command(
        "restore", "Start a new container from where a snapshot was taken", restore,
        arguments="SNAPSHOT", options=(_NAME,),
        examples=("bulkhead restore --name web2 warmed-up",), least=1, most=1,
    ),
    "fork": Command(
        "fork", "Start a new container from where a running one is", fork,
        arguments="CONTAINER", options=(_NAME,),
        examples=("bulkhead fork --name web2 web",), least=1, most=1, completes="container",
    ),
    "snapshot ls": Command(
        "snapshot ls", "List snapshots", ls,
        options=(
            FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display names"),
        ),
        examples=("bulkhead snapshot ls",),
    ),
    "snapshot rm": Command(
        "snapshot rm", "Remove one or more snapshots", rm, arguments="SNAPSHOT [SNAPSHOT...]",
        examples=("bulkhead snapshot rm warmed-up",), least=1, most=None,
    ),
}  # fmt: skip
