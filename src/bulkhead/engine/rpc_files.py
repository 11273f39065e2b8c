"""RPC: a workload's files (archive, export, changes, commit)."""

import asyncio
import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import msgspec

from bulkhead.engine import archive, guests, users, views
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.errors import Conflict, Invalid
from bulkhead.images.catalog import Image
from bulkhead.oci import reference
from bulkhead.store import diff

METHODS = Table()
_GENERATED = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"})


class One(Params, frozen=True):
    """A workload."""

    id: str


class Path(One, frozen=True):
    """A path in it."""

    path: str


class Put(Path, frozen=True):
    """Where an archive goes."""

    no_overwrite_dir_non_dir: bool = False
    copy_uid_gid: bool = False


class Commit(One, frozen=True):
    """The image to be."""

    repo: str = ""
    tag: str = ""
    comment: str = ""
    author: str = ""
    changes: tuple[str, ...] = ()
    pause: bool = True


def _inside() -> ModuleType:
    """What looks into guests, imported when it is first wanted."""
    from bulkhead.engine import guest_files

    return guest_files


@METHODS.method("workload.archive_stat", Path)
async def archive_stat(engine: Engine, params: Path, call: Call) -> dict[str, Any]:
    """Docker's ContainerPathStat."""
    workload = engine.workloads.find(params.id)
    if guests.has_disk(workload.record):
        shown: dict[str, Any] = await _inside().describe(engine, workload, params.path)
        return shown
    return await views.with_root(
        engine, workload, lambda root: archive.describe(root, params.path, workload.record.name)
    )


@METHODS.method("workload.archive_get", Path)
async def archive_get(engine: Engine, params: Path, call: Call) -> dict[str, Any]:
    """Write the tar of a path to the descriptor."""
    workload = engine.workloads.find(params.id)
    name = workload.record.name

    def work(root: int) -> dict[str, Any]:
        described = archive.describe(root, params.path, name)
        with os.fdopen(call.take_fd("the archive").take(), "wb") as out:
            archive.write(root, params.path, out, name)
        return described

    if guests.has_disk(workload.record):
        take = functools.partial(call.take_fd, "the archive")
        described = await _inside().get(engine, workload, params.path, take)
    else:
        described = await views.with_root(engine, workload, work)
    engine.events.emit("container", "archive-path", workload.id, attributes(workload))
    return {"stat": described}


@METHODS.method("workload.archive_put", Put)
async def archive_put(engine: Engine, params: Put, call: Call) -> dict[str, Any]:
    """Write the members of the tar from the descriptor."""
    workload = engine.workloads.find(params.id)
    record = workload.record

    def options(places: Sequence[str]) -> archive.Options:
        owner = None
        if params.copy_uid_gid is False:
            owner = (0, 0)
        elif record.config.user:
            found = users.resolve(record.config.user, users.read(places))
            owner = (found.uid, found.gid)
        return archive.Options(
            keep_kinds=params.no_overwrite_dir_non_dir,
            owner=owner,
            readonly=record.host.readonly_rootfs and not _in_volume(workload, params.path),
        )

    def work(root: int) -> None:
        chosen = options((f"/proc/self/fd/{root}",))
        with os.fdopen(call.take_fd("the archive").take(), "rb") as stream:
            archive.extract(root, params.path, stream, chosen, record.name)

    if guests.has_disk(record):
        take = functools.partial(call.take_fd, "the archive")
        chosen = options(guests.account_files(engine, record))
        await _inside().put(engine, workload, params.path, take, chosen)
    else:
        await views.with_root(engine, workload, work)
    engine.events.emit("container", "extract-to-dir", workload.id, attributes(workload))
    return {}


def _in_volume(workload: Workload, path: str) -> bool:
    """Whether `path` lies in a writable mount."""
    return any(
        point.rw and (path == point.destination or path.startswith(f"{point.destination}/"))
        for point in workload.record.mounts
    )


@METHODS.method("workload.export", One)
async def export(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Write the tar of the whole root, without volumes, to the descriptor."""
    workload = engine.workloads.find(params.id)
    record = workload.record
    if guests.has_disk(record):
        await _inside().export(engine, workload, call.take_fd("the archive"))
        engine.events.emit("container", "export", workload.id, attributes(workload))
        return {}
    lowers = await engine.lowers(record.diff_ids)
    upper = f"{engine.home.workload(record.id)}/upper"
    out = call.take_fd("the archive")

    def work() -> None:
        layers = (upper, *lowers) if os.path.isdir(upper) else lowers
        with out, views.overlay(layers, None, None) as root:
            for piece in diff.tar_tree(f"/proc/self/fd/{int(root)}/."):
                _write_all(int(out), piece)

    try:
        await views.in_thread(work)
    except BrokenPipeError:
        raise Invalid(f"export of {record.name}: the reader went away") from None
    engine.events.emit("container", "export", workload.id, attributes(workload))
    return {}


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _made_by_us(upper: str, workload: Workload, path: str) -> bool:
    """Whether a change is only the place of a mount that we made in the writable layer."""
    places = _GENERATED | {point.destination for point in workload.record.mounts}
    if path not in places:
        return False
    try:
        status = os.lstat(f"{upper}{path}")
    except OSError:
        return False
    if stat.S_ISREG(status.st_mode):
        return status.st_size == 0
    return stat.S_ISDIR(status.st_mode) and not os.listdir(f"{upper}{path}")


@METHODS.method("workload.changes", One)
async def changes(engine: Engine, params: One, call: Call) -> list[dict[str, Any]]:
    """Docker's `diff`: what the writable layer changes."""
    workload = engine.workloads.find(params.id)
    if guests.has_disk(workload.record):
        inside: list[dict[str, Any]] = await _inside().changes(engine, workload)
        return inside
    lowers = await engine.lowers(workload.record.diff_ids)
    upper = f"{engine.home.workload(workload.id)}/upper"
    if not os.path.isdir(upper):
        return []
    found = await engine.blocking(lambda: diff.changes(upper, lowers))
    ours = [path for _, path in found if _made_by_us(upper, workload, path)]
    theirs = [(kind, path) for kind, path in found if path not in ours]
    return [
        {"Path": path, "Kind": kind}
        for kind, path in theirs
        if kind != diff.MODIFIED or not _only_around(upper, lowers, path, ours, theirs)
    ]


def _only_around(
    upper: str,
    lowers: tuple[str, ...],
    path: str,
    ours: list[str],
    theirs: list[tuple[int, str]],
) -> bool:
    """Whether a directory has changed only because one of `ours` was made below it."""
    below = f"{path}/"
    if not any(other.startswith(below) for other in ours):
        return False
    if any(other.startswith(below) for _, other in theirs):
        return False
    new = os.lstat(f"{upper}{path}")
    for lower in lowers:
        with contextlib.suppress(OSError):
            old = os.lstat(f"{lower}{path}")
            return (old.st_mode, old.st_uid, old.st_gid) == (new.st_mode, new.st_uid, new.st_gid)
    return False


async def _standing(
    engine: Engine, workload: Workload, action: Callable[[], Image], *, pause: bool
) -> Image:
    """`action` in a thread; `pause`: a workload that runs stands still meanwhile."""
    frozen = pause and workload.record.status == "running"
    try:
        if frozen:
            # Whole, even if the client leaves meanwhile: `unpause` waits for it.
            await asyncio.shield(engine.control.pause(workload, passing=True))
        return await engine.blocking(action)
    finally:
        if frozen:
            with contextlib.suppress(Conflict):
                await engine.control.unpause(workload)


@METHODS.method("workload.commit", Commit)
async def commit(engine: Engine, params: Commit, call: Call) -> dict[str, Any]:
    """Make an image of its writable layer."""
    workload = engine.workloads.find(params.id)
    record = workload.record
    guests.check_image(record)
    name = None
    if params.repo:
        name = str(reference.parse(f"{params.repo}:{params.tag}" if params.tag else params.repo))
    parent = engine.images.resolve(record.image_id)
    upper = f"{engine.home.workload(record.id)}/upper"

    def make(layer: Iterator[bytes]) -> Image:
        return engine.images.commit(
            parent,
            layer,
            config=msgspec.to_builtins(record.config),
            changes=params.changes,
            ref=name,
            author=params.author,
            comment=params.comment,
        )

    if guests.has_disk(record):
        image = await _inside().commit(engine, workload, make, pause=params.pause)
    else:
        layer = diff.tar_upper(upper) if os.path.isdir(upper) else iter(())
        image = await _standing(engine, workload, lambda: make(layer), pause=params.pause)
    engine.events.emit(
        "container", "commit", record.id, attributes(workload, comment=params.comment)
    )
    engine.events.emit("image", "create", image.id, {"name": name or image.id})
    return {"Id": image.id}
