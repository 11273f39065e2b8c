"""`images rmi tag history` and `image prune`."""

from typing import Any

from bulkhead.cli import units
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import (
    FILTER,
    FORCE_PRUNE,
    FORMAT_LONG,
    JSON,
    NO_TRUNC,
    QUIET_IDS,
    Option,
    Parsed,
)
from bulkhead.cli.output import Listing, Row, filters

_NONE = "<none>"

IMAGES = Listing(
    {
        "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID",
        "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE",
        "VirtualSize": "SIZE", "SharedSize": "SHARED SIZE", "UniqueSize": "UNIQUE SIZE",
        "Containers": "CONTAINERS",
    },
    ("Repository", "Tag", "ID", "CreatedSince", "Size"),
)  # fmt: skip

HISTORY = Listing(
    {
        "ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT",
        "CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT",
    },
    ("ID", "CreatedSince", "CreatedBy", "Size", "Comment"),
)  # fmt: skip


def split_tag(name: str) -> tuple[str, str]:
    """(repository, tag) of `repository:tag`; the tag is <none> when there is none."""
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return head, tag
    return name, _NONE


def rows(summary: dict[str, Any], *, full: bool, digests: bool = False) -> list[Row]:
    """One row per name of an image, or one without a name."""
    names = [n for n in summary.get("RepoTags") or () if n != "<none>:<none>"]
    found = {d.partition("@")[0]: d.partition("@")[2] for d in summary.get("RepoDigests") or ()}
    pairs = [split_tag(name) for name in names]
    if digests:
        tagged = {repository for repository, _ in pairs}
        pairs += [(repository, _NONE) for repository in found if repository not in tagged]
    elif not pairs and found:
        pairs = [(repository, _NONE) for repository in found]
    return [
        {
            "ID": summary["Id"] if full else units.short_id(summary["Id"]),
            "Repository": repository,
            "Tag": tag,
            "Digest": found.get(repository, _NONE),
            "CreatedSince": units.ago(summary.get("Created") or 0),
            "CreatedAt": units.local_time(summary.get("Created") or 0),
            "Size": units.short_size(summary.get("Size") or 0),
            "VirtualSize": units.short_size(summary.get("Size") or 0),
            "SharedSize": _optional_size(summary.get("SharedSize")),
            "UniqueSize": _optional_size(_unique(summary)),
            "Containers": _optional(summary.get("Containers")),
        }
        for repository, tag in pairs or [(_NONE, _NONE)]
    ]


def _unique(summary: dict[str, Any]) -> int | None:
    shared = summary.get("SharedSize")
    if shared is None or shared < 0:
        return None
    return int(summary.get("Size") or 0) - int(shared)


def _optional(value: int | None) -> str:
    return "N/A" if value is None or value < 0 else str(value)


def _optional_size(value: int | None) -> str:
    return "N/A" if value is None or value < 0 else units.short_size(value)


def images(context: Context, parsed: Parsed) -> None:
    """`bulkhead images [REPOSITORY[:TAG]]`."""
    wanted = filters(parsed)
    if parsed.args:
        wanted.setdefault("reference", []).append(parsed.args[0])
    found = context.call("image.list", {"all": parsed["all"], "filters": wanted})
    table = [
        row
        for summary in sorted(found, key=lambda s: -(s.get("Created") or 0))
        for row in rows(summary, full=parsed["no-trunc"], digests=parsed["digests"])
    ]
    if parsed["quiet"]:
        seen = dict.fromkeys(row["ID"] for row in table)
        table = [{"ID": identity} for identity in seen]
    columns = ("Repository", "Tag", "Digest", "ID", "CreatedSince", "Size")
    IMAGES.show(context, parsed, table, columns=columns if parsed["digests"] else None)


def report_removal(context: Context, found: list[dict[str, str]]) -> None:
    """`Untagged: …` and `Deleted: …` lines."""
    for entry in found or ():
        for key, value in entry.items():
            context.out(f"{key}: {value}")


def rmi(context: Context, parsed: Parsed) -> int:
    """`bulkhead rmi`."""

    def act(name: str) -> None:
        report_removal(
            context,
            context.call(
                "image.remove",
                {"name": name, "force": parsed["force"], "noprune": parsed["no-prune"]},
            ),
        )

    return context.each(parsed.args, act)


def tag(context: Context, parsed: Parsed) -> None:
    """`bulkhead tag SOURCE TARGET`."""
    context.call("image.tag", {"source": parsed.args[0], "target": parsed.args[1]})


def history(context: Context, parsed: Parsed) -> None:
    """`bulkhead history`."""
    found = context.call("image.history", {"name": parsed.args[0]})
    full, human = parsed["no-trunc"], parsed["human"]
    table = [
        {
            "ID": entry["Id"] if full or entry["Id"][0] == "<" else units.short_id(entry["Id"]),
            "CreatedSince": units.ago(entry["Created"]) if human
            else units.local_time(entry["Created"]),
            "CreatedAt": units.local_time(entry["Created"]),
            "CreatedBy": _created_by(entry.get("CreatedBy") or "", full=full),
            "Size": units.short_size(entry["Size"]) if human else str(entry["Size"]),
            "Comment": entry.get("Comment") or "",
        }
        for entry in found
    ]  # fmt: skip
    HISTORY.show(context, parsed, table)


def _created_by(text: str, *, full: bool) -> str:
    flat = text.replace("\t", " ")
    return flat if full else units.ellipsis_text(flat, 45)


def prune(context: Context, parsed: Parsed) -> int:
    """`bulkhead image prune`."""
    wanted = filters(parsed)
    warning = "WARNING! This will remove all dangling images."
    if parsed["all"]:
        warning = "WARNING! This will remove all images without at least one container "
        warning += "associated to them."
        wanted["dangling"] = ["false"]
    if not parsed["force"] and not context.confirm(warning):
        return 1
    report_prune(context, context.call("image.prune", {"filters": wanted}))
    return 0


def report_prune(context: Context, found: dict[str, Any], *, total: bool = True) -> None:
    """What an image prune removed."""
    deleted = found.get("ImagesDeleted") or []
    if deleted:
        context.out("Deleted Images:")
        for entry in deleted:
            for key, value in entry.items():
                context.out(f"{key.lower()}: {value}")
        context.out("")
    if total:
        freed = units.human_size(found.get("SpaceReclaimed") or 0)
        context.out(f"Total reclaimed space: {freed}")


COMMANDS = {
    "images": Command(
        "images", "List images", images, arguments="[REPOSITORY[:TAG]]",
        options=(
            Option("-a, --all", "bool", "Show all images (default hides intermediate images)"),
            Option("--digests", "bool", "Show digests"),
            FILTER, FORMAT_LONG, JSON, NO_TRUNC, QUIET_IDS,
        ),
        examples=("bulkhead images", "bulkhead images --filter dangling=true -q"),
        most=1, completes="image",
    ),
    "rmi": Command(
        "rmi", "Remove one or more images", rmi, arguments="IMAGE [IMAGE...]",
        options=(
            Option("-f, --force", "bool", "Force removal of the image"),
            Option("--no-prune", "bool", "Do not delete untagged parents"),
        ),
        examples=("bulkhead rmi debian:bookworm",), least=1, most=None, completes="image",
    ),
    "tag": Command(
        "tag", "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE", tag,
        arguments="SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]", least=2, most=2,
        examples=("bulkhead tag web:latest registry.example.com/web:1.0",), completes="image",
    ),
    "history": Command(
        "history", "Show the history of an image", history, arguments="IMAGE",
        options=(
            FORMAT_LONG, JSON, NO_TRUNC, QUIET_IDS,
            Option("-H, --human", "bool", "Print sizes and dates in human readable format",
                   default=True),
        ),
        examples=("bulkhead history --no-trunc debian:bookworm",), least=1, most=1,
        completes="image",
    ),
    "image prune": Command(
        "image prune", "Remove unused images", prune,
        options=(
            Option("-a, --all", "bool", "Remove all unused images, not just dangling ones"),
            Option("--filter", "list", "Only those that match (until=TIME, label=KEY[=VALUE])"),
            FORCE_PRUNE,
        ),
        examples=("bulkhead image prune -af",),
    ),
}  # fmt: skip
