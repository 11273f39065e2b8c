"""RPC: images (`image.*`). All of it blocks, so all of it runs in threads."""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.streaming import with_progress
from bulkhead.errors import Invalid
from bulkhead.images.catalog import Image

METHODS = Table()
_AT_ONCE = 100
"""So many images whose descriptions are in memory are listed without a thread."""
_CHUNK = 1 << 20


class List(Params, frozen=True):
    """Which to list."""

    all: bool = False
    filters: dict[str, Any] | None = None
    shared_size: bool = False


class Named(Params, frozen=True):
    """An image."""

    name: str


class Pull(Named, frozen=True):
    """What to pull."""

    platform: str | None = None
    auth: dict[str, Any] | None = None
    all: bool = False


class Push(Named, frozen=True):
    """What to push."""

    auth: dict[str, Any] | None = None
    all: bool = False


class Tag(Params, frozen=True):
    """A further name."""

    source: str
    target: str


class Remove(Named, frozen=True):
    """What to remove."""

    force: bool = False
    noprune: bool = False


class Filters(Params, frozen=True):
    """What to prune."""

    filters: dict[str, Any] | None = None


class Load(Params, frozen=True):
    """An archive, whose descriptor comes along."""

    quiet: bool = False


class Save(Params, frozen=True):
    """What to write."""

    names: list[str]
    format: str = ""


class Import(Params, frozen=True):
    """A root file system, whose descriptor comes along."""

    ref: str = ""
    changes: tuple[str, ...] = ()
    message: str = ""
    platform: str | None = None


class Bootstrap(Params, frozen=True):
    """An image from a distribution's packages."""

    name: str
    include: tuple[str, ...] = ()
    mirror: str | None = None
    lock: str | None = None
    platform: str = ""


class Login(Params, frozen=True):
    """Credentials to check."""

    auth: dict[str, Any]


@METHODS.method("image.list", List)
async def list_(engine: Engine, params: List, call: Call) -> list[dict[str, Any]]:
    """Docker's ImageSummary list."""
    if not params.filters and not params.shared_size:
        count = engine.images.catalog.described()
        if count is not None and count <= _AT_ONCE:
            return engine.images.list(all_=params.all)
    users = engine.image_users()
    return await engine.blocking(
        lambda: engine.images.list(
            params.filters, all_=params.all, users=users, shared_size=params.shared_size
        )
    )


@METHODS.method("image.inspect", Named)
async def inspect(engine: Engine, params: Named, call: Call) -> dict[str, Any]:
    """Docker's ImageInspect."""
    return await engine.blocking(lambda: engine.images.inspect(params.name))


@METHODS.method("image.history", Named)
async def history(engine: Engine, params: Named, call: Call) -> list[dict[str, Any]]:
    """Docker's image history."""
    return await engine.blocking(lambda: engine.images.history(params.name))


@METHODS.method("image.pull", Pull)
async def pull(engine: Engine, params: Pull, call: Call) -> dict[str, Any]:
    """Pull it; items are Docker's progress messages."""
    pull = engine.images.pull
    if params.all:

        def pull(*args: Any, **options: Any) -> Image:
            return engine.images.pull_all(*args, **options)[-1]

    image = await with_progress(
        engine,
        call,
        lambda progress: pull(params.name, params.platform, params.auth, progress=progress),
    )
    engine.events.emit("image", "pull", params.name, {"name": params.name})
    return {"Id": image.id, "Digest": image.manifest_digest, "Names": list(image.names)}


@METHODS.method("image.push", Push)
async def push(engine: Engine, params: Push, call: Call) -> dict[str, Any]:
    """Push it; items are Docker's progress messages."""
    images = engine.images
    if params.all:
        digests = await with_progress(
            engine, call, lambda progress: images.push_all(params.name, params.auth, progress)
        )
    else:
        digests = [
            await with_progress(
                engine, call, lambda progress: images.push(params.name, params.auth, progress)
            )
        ]
    engine.events.emit("image", "push", params.name, {"name": params.name})
    return {"Digest": digests[-1], "Digests": digests}


@METHODS.method("image.tag", Tag)
async def tag(engine: Engine, params: Tag, call: Call) -> dict[str, Any]:
    """Give it a further name."""
    identity = await engine.blocking(lambda: engine.images.resolve(params.source).id)
    await engine.blocking(lambda: engine.images.tag(params.source, params.target))
    engine.events.emit("image", "tag", identity, {"name": params.target})
    return {}


@METHODS.method("image.remove", Remove)
async def remove(engine: Engine, params: Remove, call: Call) -> list[dict[str, str]]:
    """Docker's `rmi`."""
    users, running = engine.image_users(), engine.running_names()
    removed = await engine.blocking(
        lambda: engine.images.remove(
            params.name, params.force, params.noprune, users=users, running=running
        )
    )
    for entry in removed:
        for kind, name in entry.items():
            action = "untag" if kind == "Untagged" else "delete"
            engine.events.emit("image", action, name, {"name": name})
    await engine.release_layers()
    return removed


@METHODS.method("image.prune", Filters)
async def prune(engine: Engine, params: Filters, call: Call) -> dict[str, Any]:
    """Remove what nobody uses."""
    users = engine.image_users()
    found = await engine.blocking(lambda: engine.images.prune(params.filters, users=users))
    await engine.release_layers()
    engine.events.emit("image", "prune", "", {"reclaimed": str(found.get("SpaceReclaimed") or 0)})
    return found


def _reader(call: Call, what: str) -> BinaryIO:
    return os.fdopen(call.take_fd(what).take(), "rb", buffering=0)


@METHODS.method("image.load", Load)
async def load(engine: Engine, params: Load, call: Call) -> dict[str, Any]:
    """Store the images of an archive."""
    with _reader(call, "the archive") as file:
        names = await with_progress(
            engine, call, lambda progress: engine.images.load(file, progress)
        )
    for name in names:
        engine.events.emit("image", "load", name, {"name": name})
    return {"Names": names}


@METHODS.method("image.save", Save)
async def save(engine: Engine, params: Save, call: Call) -> dict[str, Any]:
    """Write images to the descriptor."""
    if params.format not in {"", "docker", "oci", "docker-archive", "oci-archive"}:
        raise Invalid(f"unknown archive format {params.format!r}: use docker or oci")
    form = "oci" if params.format.startswith("oci") else "docker"
    with os.fdopen(call.take_fd("the archive").take(), "wb", buffering=0) as out:
        await engine.blocking(lambda: engine.images.save(params.names, out, form))
    return {}


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """What comes from a descriptor."""
    while data := file.read(_CHUNK):
        yield data


@METHODS.method("image.import", Import)
async def import_(engine: Engine, params: Import, call: Call) -> dict[str, Any]:
    """Make an image of a root file system."""
    with _reader(call, "the archive") as file:
        image = await engine.blocking(
            lambda: engine.images.import_(
                chunks(file), params.ref, params.changes, params.message, params.platform
            )
        )
    engine.events.emit("image", "import", image.id, {"name": params.ref or image.id})
    return {"Id": image.id}


@METHODS.method("image.bootstrap", Bootstrap)
async def bootstrap(engine: Engine, params: Bootstrap, call: Call) -> dict[str, Any]:
    """Make an image from a distribution's packages."""
    image = await with_progress(
        engine,
        call,
        lambda progress: engine.images.bootstrap(
            params.name,
            include=params.include,
            mirror=params.mirror,
            lock=params.lock,
            progress=progress,
            platform=params.platform,
        ),
    )
    engine.events.emit("image", "bootstrap", image.id, {"name": params.name})
    return {"Id": image.id, "Names": list(image.names)}


@METHODS.method("image.login", Login)
async def login(engine: Engine, params: Login, call: Call) -> dict[str, Any]:
    """Ask a registry whether it accepts these credentials."""
    token = await engine.blocking(lambda: engine.images.login(params.auth))
    return {"Status": "Login Succeeded", "IdentityToken": token}
