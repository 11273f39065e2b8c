"""`kernel ls add pull rm`."""

import os

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT_LONG, JSON, Option, Parsed
from bulkhead.cli.output import Listing

LISTING = Listing(
    {"Name": "NAME", "Kind": "KIND", "Release": "RELEASE", "Source": "SOURCE", "Path": "PATH"},
    ("Name", "Kind", "Release", "Source"),
    quiet="Name",
)


def ls(context: Context, parsed: Parsed) -> None:
    """`bulkhead kernel ls`."""
    LISTING.show(context, parsed, list(context.call("kernel.list")))


def add(context: Context, parsed: Parsed) -> None:
    """`bulkhead kernel add NAME FILE`."""
    name, file = parsed.args
    modules = parsed["modules"]
    wanted = {
        "name": name,
        "file": os.path.abspath(file),
        "modules": os.path.abspath(modules) if modules else "",
    }
    context.out(context.call("kernel.add", wanted)["Name"])


def pull(context: Context, parsed: Parsed) -> None:
    """`bulkhead kernel pull NAME`."""
    made = context.call("kernel.pull", {"name": parsed.args[0]})
    context.out(f"{made['Name']}: {made['Release']}")


def rm(context: Context, parsed: Parsed) -> None:
    """`bulkhead kernel rm`."""
    for name in parsed.args:
        context.call("kernel.remove", {"name": name})
        context.out(name)


COMMANDS = {
    "kernel ls": Command(
        "kernel ls", "List guest kernels", ls,
        options=(
            FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display kernel names"),
        ),
        examples=("bulkhead kernel ls",),
    ),
    "kernel add": Command(
        "kernel add", "Add a guest kernel from a file", add, arguments="NAME FILE",
        options=(Option("--modules", "string", "Directory of its modules (with modules.dep)"),),
        examples=("bulkhead kernel add mine ./vmlinux --modules /lib/modules/6.12.0",),
        least=2, most=2,
    ),
    "kernel pull": Command(
        "kernel pull", "Fetch a guest kernel from the distribution", pull, arguments="NAME",
        examples=("bulkhead kernel pull cloud",), least=1, most=1,
    ),
    "kernel rm": Command(
        "kernel rm", "Remove one or more guest kernels", rm, arguments="NAME [NAME...]",
        examples=("bulkhead kernel rm cloud",), least=1, most=None,
    ),
}  # fmt: skip
