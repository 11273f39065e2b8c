"""RPC: builds (`build.*`)."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.errors import Invalid, Unavailable
from bulkhead.store import diff

if TYPE_CHECKING:
    from bulkhead.build.options import Options

METHODS = Table()
_AHEAD = 1024


class Run(Params, frozen=True):
    """A build; descriptors of the context (unless it is "none" or "remote") and outputs follow."""

    options: dict[str, Any]


class Prune(Params, frozen=True):
    """What to remove of the cache; sizes in bytes, ages in seconds."""

    all: bool = False
    keep: int = 0
    filters: dict[str, Any] | None = None


class Nothing(Params, frozen=True):
    """No parameters."""


class Mount(Params, frozen=True):
    """A cache mount; a descriptor of its archive comes along."""

    id: str


def _options(params: Run) -> "Options":
    from bulkhead.build.options import Options

    try:
        return msgspec.convert(params.options, Options, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"build.run: {error}") from None


def _classic(send: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    from bulkhead.build import classic

    return classic.Renderer(send).event


def _prune() -> ModuleType:
    """Imported when it is first wanted: an engine that never builds does without."""
    from bulkhead.build import prune

    return prune


@METHODS.method("build.run", Run)
async def run(engine: Engine, params: Run, call: Call) -> dict[str, Any]:
    """Build an image; items are events, or docker's messages with format "classic"."""
    options = _options(params)
    bare = options.context in ("none", "remote")
    context = None if bare else call.take_fd("the context")
    outputs = [call.take_fd(f"output {kind}") for kind in options.outputs]
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    room = threading.Semaphore(_AHEAD)
    stops: list[threading.Event] = []
    gone = threading.Event()

    def send(message: dict[str, Any]) -> None:
        while not room.acquire(timeout=0.5):
            if gone.is_set():
                return
        engine.loop.call_soon_threadsafe(queue.put_nowait, message)

    sink = _classic(send) if options.format == "classic" else send

    def work() -> Any:
        try:
            number = None if context is None else int(context)
            return engine.builds.build(options, number, sink, begun, [int(fd) for fd in outputs])
        finally:
            for fd in (*outputs, *([context] if context is not None else [])):
                fd.close()
            engine.loop.call_soon_threadsafe(queue.put_nowait, None)

    def begun(stop: threading.Event) -> None:
        stops.append(stop)
        if gone.is_set():  # the client left before there was anything to stop
            stop.set()

    future = engine.loop.create_task(in_thread(work))
    try:
        while (message := await queue.get()) is not None:
            room.release()
            await call.item(message)
        built = await future
    except BaseException:
        gone.set()
        for stop in stops:
            stop.set()
        if context is not None:
            with contextlib.suppress(OSError, ValueError):
                os.set_blocking(int(context), False)
        await asyncio.wait([future])
        raise
    if options.store:
        name = (built.names or [built.image])[0]
        engine.events.emit("image", "create", built.image, {"name": name})
    engine.spawn(engine.blocking(lambda: _prune().automatic(engine.builds.cache)))
    return {"Id": built.image, "Names": built.names, "Digest": built.digest}


async def in_thread(work: Any) -> Any:
    """`work` in a thread of its own: a build must not occupy the engine's pool."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def body() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (work(), None)
        except BaseException as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=body, name="builder", daemon=True).start()
    return await done


@METHODS.method("build.usage", Nothing)
async def usage(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """Docker's BuildCache list."""
    return await engine.blocking(lambda: _prune().usage(engine.builds.cache))


@METHODS.method("build.prune", Prune)
async def prune_(engine: Engine, params: Prune, call: Call) -> dict[str, Any]:
    """Remove what the cache can do without, then collect garbage."""

    def work() -> dict[str, Any]:
        found = _prune().run(
            engine.builds.cache, everything=params.all, keep=params.keep, filters=params.filters
        )
        freed = engine.images.gc()
        return {"CachesDeleted": found.deleted, "SpaceReclaimed": found.freed + freed}

    found = await engine.blocking(work)
    await engine.release_layers()
    engine.events.emit("builder", "prune", "", {"reclaimed": str(found["SpaceReclaimed"])})
    return found


@METHODS.method("build.mounts", Nothing)
async def mounts(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """The cache mounts."""
    found = await engine.blocking(engine.builds.cache.mounts)
    return [{"ID": one.name, "Size": one.size, "LastUsed": one.used} for one in found]


@METHODS.method("build.mount_export", Mount)
async def mount_export(engine: Engine, params: Mount, call: Call) -> dict[str, Any]:
    """Write a cache mount's files as a tar to the descriptor."""
    path = engine.builds.cache.find_mount(params.id)
    out = call.take_fd("the archive")

    def work() -> None:
        with out:
            for piece in diff.tar_tree(path):
                view = memoryview(piece)
                while view:
                    view = view[os.write(int(out), view) :]

    try:
        await in_thread(work)
    except BrokenPipeError:
        raise Unavailable("the reader of the archive went away") from None
    return {}


@METHODS.method("build.mount_import", Mount)
async def mount_import(engine: Engine, params: Mount, call: Call) -> dict[str, Any]:
    """Fill a cache mount from a tar, compressed or not."""
    source = call.take_fd("the archive")

    def chunks() -> Iterator[bytes]:
        while piece := os.read(int(source), 1 << 20):
            yield piece

    def work() -> None:
        with source, engine.builds.cache.mount(params.id, "locked") as path:
            _prune().fill(path, chunks())

    await in_thread(work)
    return {}
