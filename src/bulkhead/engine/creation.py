"""`workload.create`: a request becomes a record, or one clear error and nothing."""

import contextlib
import os
import time
from typing import TYPE_CHECKING

from bulkhead.boundary import registry
from bulkhead.engine import (
    automatic,
    body,
    emulation,
    guests,
    linking,
    merge,
    mountpoints,
    names,
    options,
    platforms,
    security,
    tenants,
)
from bulkhead.engine.records import MountPoint, Record, Workload
from bulkhead.errors import Invalid, NotFound
from bulkhead.images.catalog import Image
from bulkhead.isolation import capabilities
from bulkhead.oci.image import ContainerConfig, ImageConfig

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_FIRST_ID, _ID_COUNT = 1 << 30, 1 << 16
"""Ranges of `--userns auto`: far above what useradd(8) and /etc/subuid give away."""

BOUNDARY_LABEL = "bulkhead.boundary"
_RUNTIMES = frozenset({"runc", "io.containerd.runc.v2", "default"})
"""Names of Docker's runtimes that mean the container boundary."""


def create(
    engine: "Engine",
    name: str,
    request: body.CreateBody,
    boundary: str,
    kernel: str = "",
    *,
    started_at_once: bool = False,
    step_of: Image | None = None,
) -> tuple[Workload, list[str]]:
    """A new workload, recorded; and warnings.

    One that is `started_at_once` and goes with its end is recorded when it runs: before that an
    engine that is killed has promised nothing, and the next one clears away what it finds.
    `step_of`: it is a step of a build, made of this image that nobody knows.

    Errors are Docker's: Invalid for a mistake in the request, NotFound for an unknown image,
    network or workload it refers to, Conflict for a taken name.
    """
    record, warnings = _checked(engine, name, request, boundary, kernel, step_of)
    record.building = step_of is not None
    with contextlib.ExitStack() as undo:
        _volumes(engine, record, request, undo)
        workload = Workload(record)
        engine.reservations.claim(record, record.host)
        engine.workloads.add(workload, later=started_at_once and not record.durable)
        undo.pop_all()
    return workload, warnings


def draft(engine: "Engine", name: str, request: body.CreateBody, boundary: str) -> Record:
    """The record that `create` would write; nothing is written or made."""
    return _checked(engine, name, request, boundary)[0]


def _checked(
    engine: "Engine",
    name: str,
    request: body.CreateBody,
    boundary: str,
    kernel: str = "",
    image: Image | None = None,
) -> tuple[Record, list[str]]:
    named = _boundary(boundary, request)
    warnings = options.validate(request, guest=named in (*registry.GUESTS, automatic.AUTO))
    if image is None and not request.image:
        raise Invalid("No image was specified")
    image = image or engine.images.resolve(request.image)
    named = named or tenants.boundary(engine, request)
    kind, chosen = automatic.settle(engine, named, request, image)
    if chosen is not None:
        warnings = options.validate(request, guest=kind in registry.GUESTS)
    warnings += platforms.check(image, request.image, request.platform or "")
    record = _record(engine, request, image, kind)
    record.kernel = kernel
    record.chosen = chosen
    guests.check(record)
    tenants.check(engine, record)
    warnings += emulation.choose(record, image, asked=bool(request.platform))
    engine.reservations.check_processors(record)
    record.name = _name(engine, name)
    return record, warnings


_NOTHING = Image("", ImageConfig(config=ContainerConfig(cmd=["vm"])), (), (), "", 0, "")


def bare(
    engine: "Engine", name: str, request: body.CreateBody, boundary: str
) -> tuple[Record, list[str]]:
    """The record of a workload without an image, and warnings; nothing is written or made."""
    automatic.allowed(engine, boundary)
    warnings = options.validate(request, guest=True)
    record = _record(engine, request, _NOTHING, boundary)
    guests.check(record)
    engine.reservations.check_processors(record)
    record.name = _name(engine, name)
    # Its disks are made before it is on record: nobody may clear its directories away meanwhile.
    engine.spares.touch(record.id)
    return record, warnings


def _boundary(boundary: str, request: body.CreateBody) -> str:
    """The flag's, the runtime's, the label's, "" for none; those that are given must agree."""
    runtime = request.host_config.runtime if request.host_config else ""
    label = (request.labels or {}).get(BOUNDARY_LABEL, "")
    given: dict[str, str] = {}
    for where, word in (("--boundary", boundary), ("Runtime", runtime), (BOUNDARY_LABEL, label)):
        if not word:
            continue
        name = "container" if word in _RUNTIMES else word
        if name != automatic.AUTO and name not in registry.names():
            raise Invalid(f"unknown or invalid runtime name: {word}")
        given[where] = name
    if len(set(given.values())) > 1:
        said = ", ".join(f"{where}={name}" for where, name in given.items())
        raise Invalid(f"conflicting boundaries: {said}")
    return next(iter(given.values()), "")


def _name(engine: "Engine", name: str) -> str:
    if name:
        checked = names.check(name)
        engine.workloads.check_name(checked)
        return checked
    return names.invent(engine.workloads.names())


def _record(engine: "Engine", request: body.CreateBody, image: Image, boundary: str) -> Record:
    host = request.host_config or body.HostConfig()
    merge.host(host, boundary)
    config = merge.config(request, image.config.container)
    options.check_health(config.healthcheck)
    args = merge.command(config)
    for label, words in (("CapAdd", host.cap_add), ("CapDrop", host.cap_drop)):
        for word in words or ():
            capabilities.normalize(word, label)
    security.parse(host.security_opt or [])
    _references(engine, host, boundary)
    linking.settle(engine, host)
    if host.userns_mode == "auto":
        host.userns_mode = _free_ids(engine)
    identity = engine.take_id()
    if not config.hostname and host.network_mode != "host" and not host.uts_mode:
        config.hostname = identity[:12]
        if host.network_mode.startswith("container:"):
            other = engine.workloads.find(host.network_mode.removeprefix("container:"))
            config.hostname = other.record.config.hostname
            config.domainname = other.record.config.domainname
    networks = _networks(engine, request, host)
    return Record(
        id=identity,
        name="",
        created_ns=time.time_ns(),
        boundary=boundary,
        image=request.image,
        image_id=image.id,
        config=config,
        host=host,
        diff_ids=list(image.diff_ids),
        networks=networks,
        mounts=_mounts(engine, config, host),
        args=args,
        boot_id=engine.boot_id,
    )


def _free_ids(engine: "Engine") -> str:
    """A range of ids that no other workload of ours has, as "FIRST:COUNT"."""
    taken = {workload.record.host.userns_mode for workload in engine.workloads}
    first = _FIRST_ID
    while f"{first}:{_ID_COUNT}" in taken:
        first += _ID_COUNT
    return f"{first}:{_ID_COUNT}"


def _references(engine: "Engine", host: body.HostConfig, boundary: str) -> None:
    """Other workloads that are named must exist; they are remembered by id."""
    for member in ("network_mode", "ipc_mode", "pid_mode"):
        value: str = getattr(host, member)
        if value.startswith("container:"):
            other = engine.workloads.find(value.removeprefix("container:"))
            guests.check_shared(other, boundary)
            setattr(host, member, f"container:{other.id}")


def _networks(
    engine: "Engine", request: body.CreateBody, host: body.HostConfig
) -> dict[str, body.EndpointSettings]:
    given = (request.networking_config or body.NetworkingConfig()).endpoints_config or {}
    mode = host.network_mode
    if request.network_disabled:
        host.network_mode = "none"
        return {}
    if mode in {"none", "host"} or mode.startswith("container:"):
        others = [name for name in given if name not in {mode, "none", "host"}]
        if others:
            raise Invalid(
                "conflicting options: cannot attach both user-defined "
                f"and non-user-defined network-modes ({mode} and {others[0]})"
            )
        return {}
    wanted = {name: settings or body.EndpointSettings() for name, settings in given.items()}
    if mode not in wanted and not (mode == "bridge" and wanted):
        wanted[mode] = body.EndpointSettings()
    elif mode == "bridge" and "bridge" not in wanted and wanted:
        # Docker's create with networks but without a mode starts on those networks.
        host.network_mode = next(iter(wanted))
    for name in wanted:
        if name != "bridge" and not engine.network_exists(name):
            raise NotFound(f"network {name} not found")
    return wanted


def _mounts(engine: "Engine", config: body.Config, host: body.HostConfig) -> list[MountPoint]:
    def inherited(name: str) -> list[MountPoint]:
        return [
            MountPoint(**{f: getattr(point, f) for f in MountPoint.__struct_fields__})
            for point in engine.workloads.find(name).record.mounts
        ]

    points = mountpoints.resolve(host, config.volumes or (), inherited)
    for point in points:
        if point.type_ == "bind" and not point.create and not os.path.lexists(point.source):
            raise Invalid(
                'invalid mount config for type "bind": '
                f"bind source path does not exist: {point.source}"
            )
    return points


def _volumes(
    engine: "Engine", record: Record, request: body.CreateBody, undo: contextlib.ExitStack
) -> None:
    """Make the volumes it names; what was made is undone if the creation fails."""
    wanted = {
        mountpoints.clean_target(mount.target): mount.volume_options
        for mount in record.host.mounts or ()
        if mount.type_ == "volume" and mount.volume_options
    }
    for point in record.mounts:
        if point.type_ != "volume" or (point.name and point.name in engine.volumes):
            continue
        opts = wanted.get(point.destination) or body.VolumeOptions()
        driver = opts.driver_config or body.DriverConfig()
        volume = engine.volumes.create(
            point.name,
            driver=driver.name or "local",
            labels=opts.labels,
            driver_opts=driver.options,
            anonymous=not point.name,
        )
        undo.callback(engine.discard_volume, volume.name)
        point.name = volume.name
