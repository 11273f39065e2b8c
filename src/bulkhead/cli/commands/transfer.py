"""`pull`, `push` and `image bootstrap`."""

import os
import sys
from typing import Any

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed
from bulkhead.cli.progress import Progress
from bulkhead.cli.pulling import follow
from bulkhead.cli.pulling import pull as pull_image

_TRUST = Option("--disable-content-trust", "bool", "No effect: not checked", hidden=True)
_QUIET = Option("-q, --quiet", "bool", "Suppress verbose output")
_PLATFORM = Option("--platform", "string", "Platform, as OS[/ARCH[/VARIANT]]")


def _named(image: str) -> str:
    """`image` with the tag that is meant."""
    return image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"


def _canonical(image: str) -> str:
    """docker.io/library/… spelled out, as pull prints it last."""
    from bulkhead.cli.credentials import registry_of

    if registry_of(image) != "docker.io":
        return image
    rest = image.removeprefix("docker.io/")
    return f"docker.io/{rest if '/' in rest else f'library/{rest}'}"


def pull(context: Context, parsed: Parsed) -> None:
    """`bulkhead pull`."""
    image, everything = parsed.args[0], bool(parsed["all-tags"])
    if _named(image) != image and not everything and not parsed["quiet"]:
        context.out("Using default tag: latest")
    sys.stdout.flush()
    pull_image(
        context,
        image,
        platform=parsed["platform"],
        quiet=parsed["quiet"],
        stream=sys.stdout,
        everything=everything,
    )
    context.out(_canonical(image if everything else _named(image)))


def push(context: Context, parsed: Parsed) -> None:
    """`bulkhead push`."""
    from bulkhead.cli.credentials import find

    image, everything = parsed.args[0], bool(parsed["all-tags"])
    params: dict[str, Any] = {"name": image, "all": everything}
    auth = find(context, image)
    if auth:
        params["auth"] = auth
    if _named(image) != image and not everything and not parsed["quiet"]:
        context.out("Using default tag: latest")
    sys.stdout.flush()
    follow(context, "image.push", params, Progress(sys.stdout, quiet=parsed["quiet"]))
    if parsed["quiet"]:
        context.out(_canonical(image if everything else _named(image)))


def bootstrap(context: Context, parsed: Parsed) -> None:
    """`bulkhead image bootstrap NAME`."""
    params: dict[str, Any] = {"name": parsed.args[0]}
    if parsed["include"]:
        params["include"] = [package for package in parsed["include"] if package]
    if parsed["mirror"]:
        params["mirror"] = parsed["mirror"]
    if parsed["platform"]:
        params["platform"] = parsed["platform"]
    if parsed["lock"]:
        params["lock"] = os.path.abspath(parsed["lock"])
    sys.stdout.flush()
    found = follow(context, "image.bootstrap", params, Progress(sys.stderr, quiet=parsed["quiet"]))
    if isinstance(found, dict) and found.get("Id"):
        context.out(found["Id"])


COMMANDS = {
    "pull": Command(
        "pull", "Download an image from a registry", pull, arguments="NAME[:TAG|@DIGEST]",
        options=(
            Option("-a, --all-tags", "bool", "Download all tagged images in the repository"),
            _TRUST, _PLATFORM, _QUIET,
        ),
        examples=("bulkhead pull debian:bookworm", "bulkhead pull --platform linux/arm64 alpine"),
        least=1, most=1, completes="image",
    ),
    "push": Command(
        "push", "Upload an image to a registry", push, arguments="NAME[:TAG]",
        options=(
            Option("-a, --all-tags", "bool", "Push all tags of an image to the repository"),
            _TRUST, _QUIET,
        ),
        examples=("bulkhead push registry.example.com/web:1.0",), least=1, most=1,
        completes="image",
    ),
    "image bootstrap": Command(
        "image bootstrap", "Make a minimal image from a distribution's packages", bootstrap,
        arguments="DISTRIBUTION:SUITE",
        options=(
            Option("--include", "strings", "More packages, by commas"),
            Option("--mirror", "string", "Where the packages come from, as URL"),
            Option("--lock", "string", "Lock file: written, or followed if it exists",
                   complete="file"),
            _PLATFORM, _QUIET,
        ),
        examples=(
            "bulkhead image bootstrap debian:bookworm",
            "bulkhead image bootstrap --platform linux/arm64 debian:bookworm",
            "bulkhead image bootstrap debian:bookworm --include nginx-light,curl",
        ),
        least=1, most=1,
    ),
}  # fmt: skip
