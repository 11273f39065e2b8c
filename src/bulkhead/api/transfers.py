"""Images coming and going: pull, import, push, load, save. Progress is a stream of JSON objects.

What goes wrong before anything was sent is an answer with a status; afterwards it is the stream's
last object, `{"errorDetail": …, "error": …}`.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from bulkhead.api import answers
from bulkhead.api.archives import TAR
from bulkhead.api.exchange import Exchange, Item, Stream, with_download, with_upload
from bulkhead.api.registry_auth import registry_auth
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.errors import BulkheadError, Corrupt, Invalid, Unsupported


async def progress(
    x: Exchange,
    work: Callable[[Item], Awaitable[Any]],
    end: Callable[[Stream, Any], None] | None = None,
) -> object:
    """Send the messages that `work(item)` reports, then what `end` adds of its result."""
    stream: Stream | None = None

    def item(message: Any) -> None:
        nonlocal stream
        if stream is None:
            stream = x.begin()
        stream.line(message)

    try:
        result = await work(item)
    except BulkheadError as error:
        if stream is None:
            raise
        stream.line(answers.failure_line(error))
    else:
        stream = stream or x.begin()
        if end is not None:
            end(stream, result)
    stream.end()
    return SENT


def _joined(name: str, tag: str) -> str:
    if not tag:
        return name
    return f"{name}@{tag}" if ":" in tag else f"{name}:{tag}"


@ROUTES.add("POST", "/images/create")
async def create(x: Exchange) -> object:
    """Pull an image, or import a root file system."""
    if x.text("fromSrc"):
        return await _import(x)
    name = x.text("fromImage")
    if not name:
        raise Invalid("invalid reference format")
    tag = x.text("tag")
    full = _joined(name, tag)
    # No tag in either place asks for every tag, in the API as in docker 1.
    last = name.rpartition("/")[2]
    every = not tag and ":" not in last and "@" not in name
    params = {
        "name": full, "platform": _platform(x), "auth": registry_auth(x), "all": every,
    }  # fmt: skip
    return await progress(x, lambda item: x.call("image.pull", params, item=item))


def _platform(x: Exchange) -> str | None:
    """A platform as text; newer clients may send it as JSON."""
    text = x.text("platform")
    if not text.startswith("{"):
        return text or None
    try:
        given = msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise Invalid(f"invalid platform: {text[:100]}") from None
    lower = {str(key).lower(): value for key, value in given.items()}
    parts = [lower.get("os"), lower.get("architecture"), lower.get("variant")]
    return "/".join(str(part) for part in parts if part) or None


async def _import(x: Exchange) -> object:
    source = x.text("fromSrc")
    if source != "-":
        raise Unsupported(
            "images are imported from the request's body only: download the file and use fromSrc=-"
        )
    repository, tag = x.text("repo"), x.text("tag")
    params = {
        "ref": _joined(repository, tag) if repository else "",
        "changes": tuple(x.query.get("changes", ())),
        "message": x.text("message"),
        "platform": _platform(x),
    }

    async def work(item: Item) -> None:
        made = await with_upload(x, lambda file: x.call("image.import", params, [file]))
        item({"status": made["Id"]})

    return await progress(x, work)


@ROUTES.add("POST", "/images/{name*}/push")
async def push(x: Exchange) -> object:
    """Push one tag, or without `tag` all of a repository."""
    name, tag = x.at["name"], x.text("tag")
    last = name.rpartition("/")[2]
    every = not tag and ":" not in last
    if every and x.version < (1, 41):
        every = True
    params = {"name": _joined(name, tag), "auth": registry_auth(x), "all": every}
    return await progress(x, lambda item: x.call("image.push", params, item=item))


@ROUTES.add("POST", "/images/load")
async def load(x: Exchange) -> object:
    """Store the images of the archive in the body."""
    quiet = x.flag("quiet")

    async def work(item: Item) -> Any:
        def shown(message: Any) -> None:
            if not quiet or "stream" in message:
                item(message)

        try:
            return await with_upload(x, lambda file: x.call("image.load", {}, [file], shown))
        except Corrupt as error:
            raise Invalid(error.message) from None  # the client's archive, not ours

    return await progress(x, work)


@ROUTES.add("GET", "/images/get")
async def save(x: Exchange) -> object:
    """Several images as one archive."""
    names = [name for value in x.query.get("names", ()) for name in value.split(",") if name]
    if not names:
        raise Invalid("names of images are missing")
    return await _save(x, names)


@ROUTES.add("GET", "/images/{name*}/get")
async def save_one(x: Exchange) -> object:
    """An image as an archive."""
    return await _save(x, [x.at["name"]])


async def _save(x: Exchange, names: list[str]) -> object:
    for name in names:
        await x.call("image.inspect", {"name": name})  # all of them, before the head is sent
    await with_download(x, lambda out: x.call("image.save", {"names": names}, [out]), TAR)
    return SENT
