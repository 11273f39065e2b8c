"""`builder df|prune|mounts|export|import`: the build cache."""

import os
import sys
from typing import Any

from bulkhead.cli import units
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import FORMAT_LONG, JSON, NO_TRUNC, Option, Parsed
from bulkhead.cli.output import Listing, filters
from bulkhead.errors import Invalid, NotFound

LISTING = Listing(
    {"ID": "CACHE ID", "Type": "CACHE TYPE", "Size": "SIZE", "CreatedAt": "CREATED",
     "LastUsedAt": "LAST USED", "UsageCount": "USAGE", "Description": "DESCRIPTION"},
    ("ID", "Type", "Size", "LastUsedAt", "UsageCount", "Description"),
    quiet="ID",
)  # fmt: skip
MOUNTS = Listing(
    {"ID": "ID", "Size": "SIZE", "LastUsed": "LAST USED"}, ("ID", "Size", "LastUsed"), quiet="ID"
)


def usage(context: Context, parsed: Parsed) -> None:
    """`bulkhead builder df`."""
    full = parsed["no-trunc"]
    rows = []
    for one in context.call("build.usage"):
        description = one["Description"]
        rows.append(
            {
                "ID": one["ID"] if full else one["ID"][:12],
                "Type": one["Type"],
                "Size": units.short_size(one["Size"]),
                "CreatedAt": one["CreatedAt"],
                "LastUsedAt": one["LastUsedAt"][:19],
                "UsageCount": str(one["UsageCount"]),
                "Description": description if full else units.ellipsis_text(description, 60),
            }
        )
    LISTING.show(context, parsed, rows)


def mounts(context: Context, parsed: Parsed) -> None:
    """`bulkhead builder mounts`."""
    rows = [
        {
            "ID": one["ID"],
            "Size": units.short_size(one["Size"]),
            "LastUsed": units.local_time(int(one["LastUsed"])),
        }
        for one in context.call("build.mounts")
    ]
    MOUNTS.show(context, parsed, rows)


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead builder prune`."""
    warning = "WARNING! This will remove all build cache but cache mounts."
    if parsed["all"]:
        warning = "WARNING! This will remove all build cache."
    if not parsed["force"] and not context.confirm(warning):
        return 1
    params: dict[str, Any] = {"all": parsed["all"], "filters": filters(parsed)}
    if parsed["keep-storage"]:
        params["keep"] = parsed["keep-storage"]
    found = context.call("build.prune", params)
    if found["CachesDeleted"]:
        context.out("Deleted build cache objects:")
        for identity in found["CachesDeleted"]:
            context.out(identity)
        context.out("")
    context.out(f"Total reclaimed space: {units.human_size(found['SpaceReclaimed'])}")
    return 0


def export(context: Context, parsed: Parsed) -> None:
    """`bulkhead builder export ID`."""
    path = parsed["output"]
    if not path and os.isatty(1):
        raise Invalid("cowardly refusing to write an archive to a terminal. Use the -o flag")
    sys.stdout.flush()
    fd = 1
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        context.call("build.mount_export", {"id": parsed.args[0]}, (fd,))
    finally:
        if path:
            os.close(fd)


def import_(context: Context, parsed: Parsed) -> None:
    """`bulkhead builder import ID`."""
    path = parsed["input"]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else 0
    except OSError as error:
        raise NotFound(f"open {path}: {error.strerror}") from None
    try:
        context.call("build.mount_import", {"id": parsed.args[0]}, (fd,))
    finally:
        if path:
            os.close(fd)


COMMANDS = {
    "builder df": Command(
        "builder df", "Show what the build cache holds", usage,
        options=(
            FORMAT_LONG, JSON, NO_TRUNC, Option("-q, --quiet", "bool", "Only display IDs"),
        ),
        examples=("bulkhead builder df",),
    ),
    "builder mounts": Command(
        "builder mounts", "List cache mounts", mounts,
        options=(FORMAT_LONG, JSON, Option("-q, --quiet", "bool", "Only display IDs")),
        examples=("bulkhead builder mounts",),
    ),
    "builder prune": Command(
        "builder prune", "Remove build cache", prune,
        options=(
            Option("-a, --all", "bool", "Remove all build cache, also cache mounts"),
            Option("--filter", "list", "Only those that match (until=24h, id=…, type=…)"),
            Option("-f, --force", "bool", "Do not prompt for confirmation"),
            Option("--keep-storage", "bytes", "Amount of disk space to keep for cache"),
        ),
        examples=("bulkhead builder prune -f --keep-storage 5g",),
    ),
    "builder export": Command(
        "builder export", "Write the files of a cache mount to a tar archive", export,
        arguments="ID",
        options=(
            Option("-o, --output", "string", "Write to a file, instead of STDOUT",
                   complete="file"),
        ),
        examples=("bulkhead builder export -o pip.tar /root/.cache/pip",), least=1, most=1,
    ),
    "builder import": Command(
        "builder import", "Fill a cache mount from a tar archive", import_, arguments="ID",
        options=(
            Option("-i, --input", "string", "Read from a file, instead of STDIN",
                   complete="file"),
        ),
        examples=("bulkhead builder import -i pip.tar /root/.cache/pip",), least=1, most=1,
    ),
}  # fmt: skip
