"""RPC: workloads as files (`workload.pack`, `workload.unpack`)."""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import msgspec

from bulkhead.engine import archive, body, creation, guests, transfer
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import BulkheadError, Conflict, Corrupt, Unsupported
from bulkhead.images.catalog import Image
from bulkhead.store import diff

METHODS = Table()


class One(Params, frozen=True):
    """A workload."""

    id: str


class Unpack(Params, frozen=True):
    """How to take one in; what is "" stays as it was."""

    name: str = ""
    boundary: str = ""
    kernel: str = ""
    trust: bool = False


@METHODS.method("workload.pack", One)
async def pack(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Write a workload that does not run, with image and volumes, to the descriptor."""
    workload = engine.workloads.find(params.id)
    record = workload.record
    if record.boundary == "vm":
        raise Unsupported(f"{record.name} is a machine: bulkhead vm export moves its disk")
    directory = engine.home.root
    with contextlib.ExitStack() as undo:
        out = undo.enter_context(os.fdopen(call.take_fd("the archive").take(), "wb"))
        _check_still(workload)
        began = record.started_ns
        image = await _image(engine, workload)
        undo.callback(_forget, engine, image)
        part = transfer.Spool(transfer.IMAGE, directory)
        undo.callback(part.close)
        await engine.blocking(
            functools.partial(engine.images.save, [image.id], cast(BinaryIO, part))
        )
        parts = [part]
        volumes: list[transfer.Volume] = []
        async with workload.lock:
            _check_still(workload)
            if record.started_ns != began:
                raise Conflict(f"{record.name} has run meanwhile: export it again")
            for point in record.mounts:
                if point.type_ == "volume" and point.name in engine.volumes:
                    part = transfer.Spool(f"volumes/{len(volumes)}.tar", directory)
                    undo.callback(part.close)
                    volumes.append(await _volume(engine, point, part))
                    parts.append(part)
        document = _document(record, image, volumes)
        await engine.blocking(functools.partial(transfer.write, out, document, parts))
    engine.events.emit("container", "export", record.id, attributes(workload))
    left = [point.source for point in record.mounts if point.type_ == "bind"]
    return {"Left": left, "Volumes": len(volumes)}


def _check_still(workload: Workload) -> None:
    name = workload.record.name
    if workload.running or workload.record.status == "restarting":
        raise Conflict(f"{name} runs: bulkhead stop {name}, then export it")


async def _volume(engine: Engine, point: MountPoint, part: transfer.Spool) -> transfer.Volume:
    """The volume of a mount, its files in `part`."""
    with engine.volumes.on_host(point.name) as path:
        await engine.blocking(functools.partial(part.fill, diff.tar_tree(path)))
    known = engine.volumes.get(point.name)
    name = "" if point.anonymous else point.name
    labels = {} if point.anonymous else known.labels
    return transfer.Volume(point.destination, part.name, name, labels, known.options)


def _document(record: Record, image: Image, volumes: list[transfer.Volume]) -> transfer.Document:
    config, host = transfer.portable(record)
    return transfer.Document(
        version=transfer.VERSION,
        name=record.name,
        boundary=record.boundary,
        image=image.id,
        reference=record.image,
        config=config,
        host=host,
        networks=transfer.networks(record),
        kernel=record.kernel,
        volumes=volumes,
    )


async def _image(engine: Engine, workload: Workload) -> Image:
    """Its image with what it has written as one more layer."""
    record = workload.record
    guests.check_image(record)
    parent = engine.images.resolve(record.image_id)
    settings = msgspec.to_builtins(record.config)

    def make(layer: Iterator[bytes]) -> Image:
        comment = f"exported {time.time_ns()}"  # so that nobody else has just this image
        return engine.images.commit(parent, layer, config=settings, comment=comment)

    await workload.cleaned.wait()
    if guests.has_disk(record):
        from bulkhead.engine import guest_files

        return await guest_files.commit(engine, workload, make, pause=False)
    upper = f"{engine.home.workload(record.id)}/upper"
    layer = diff.tar_upper(upper) if os.path.isdir(upper) else iter(())
    return await engine.blocking(lambda: make(layer))


def _forget(engine: Engine, image: Image) -> None:
    async def remove() -> None:
        with contextlib.suppress(BulkheadError):
            await engine.blocking(lambda: engine.images.remove(image.id, users={}))
        await engine.release_layers()

    engine.spawn(remove())


@METHODS.method("workload.unpack", Unpack)
async def unpack(engine: Engine, params: Unpack, call: Call) -> dict[str, Any]:
    """Take in what `workload.pack` wrote, from the descriptor."""
    directory = engine.home.root
    parts: dict[str, transfer.Spool] = {}
    with contextlib.ExitStack() as undo:
        kept = undo.enter_context(contextlib.ExitStack())
        stream = undo.enter_context(os.fdopen(call.take_fd("the archive").take(), "rb"))

        def keep(part: transfer.Spool) -> None:
            parts[part.name] = part
            kept.callback(part.close)

        document = await engine.blocking(lambda: transfer.read(stream, directory, keep))
        if not params.trust:
            transfer.check_trust(document)
        with engine.store.lease():
            workload, warnings = await _made(engine, params, document, parts, undo)
        engine.events.emit("container", "create", workload.id, attributes(workload))
    return {"Id": workload.id, "Name": workload.record.name, "Warnings": warnings}


async def _made(
    engine: Engine,
    params: Unpack,
    document: transfer.Document,
    parts: dict[str, transfer.Spool],
    undo: contextlib.ExitStack,
) -> tuple[Workload, list[str]]:
    image = parts[transfer.IMAGE].begin()
    loaded = await engine.blocking(lambda: engine.images.load(image))
    if document.image not in loaded:
        raise Corrupt(f"{transfer.IMAGE} does not have the image {document.image}")
    for volume in document.volumes:
        if volume.name and volume.name in engine.volumes:
            raise Conflict(
                f"there is a volume {volume.name} already: bulkhead volume rm {volume.name}"
            )
    host = document.host
    request = body.CreateBody(
        **{name: getattr(document.config, name) for name in body.Config.__struct_fields__},
        host_config=host,
        networking_config=body.NetworkingConfig(endpoints_config=dict(document.networks)),
    )
    request.image = document.image
    with contextlib.ExitStack() as failed:
        for volume in document.volumes:
            if volume.name:
                engine.volumes.create(volume.name, labels=volume.labels, driver_opts=volume.options)
                failed.callback(engine.discard_volume, volume.name)
        boundary = params.boundary or document.boundary
        kernel = params.kernel or (document.kernel if boundary == document.boundary else "")
        name = params.name or document.name
        workload, warnings = creation.create(engine, name, request, boundary, kernel)
        failed.callback(_drop, engine, workload)
        workload.record.image = document.reference
        for volume in document.volumes:
            await _fill(engine, workload, volume, parts[volume.member])
        engine.workloads.save(workload)
        failed.pop_all()
    return workload, warnings


def _drop(engine: Engine, workload: Workload) -> None:
    engine.removal.forget(workload)
    engine.spawn(engine.removal.erase(workload))


async def _fill(
    engine: Engine, workload: Workload, volume: transfer.Volume, part: transfer.Spool
) -> None:
    record = workload.record
    point = next(
        (p for p in record.mounts if p.type_ == "volume" and p.destination == volume.destination),
        None,
    )
    if point is None:
        raise Corrupt(f"the archive has a volume for {volume.destination}, but no mount")
    options = archive.Options(keep_kinds=False, owner=None)

    def work(path: str) -> None:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            archive.extract(root, "/", part.begin(), options, record.name)
        finally:
            os.close(root)

    with engine.volumes.on_host(point.name) as path:
        await engine.blocking(functools.partial(work, path))
    engine.volumes.mark_filled(point.name)
