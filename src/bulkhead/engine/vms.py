"""Whole machines: workloads without an image that boot from disks of their own.

Everything that a workload has (names, networks, logs, attach, restarts, limits) is as for others;
here is what their disks need. Files: machines/files.py. Whatever reads an image runs in a jail.
"""

import contextlib
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bulkhead.boundaries.jail import uid_of
from bulkhead.boundaries.tool import Outcome, Tools
from bulkhead.boundary.registry import Services
from bulkhead.engine import body, creation, launching
from bulkhead.engine.records import Record, Workload
from bulkhead.engine.trees import delete_tree
from bulkhead.engine.vm_shape import CD, NVRAM, PAYLOAD, SEED, base_of
from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.images.progress import Progress
from bulkhead.machines import bootstrap, files, firmware, foreign, ova, payload, seed
from bulkhead.machines.qemuimg import QemuImg
from bulkhead.machines.spec import FIRMWARES, Disk, Spec

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

DEFAULT_MEMORY = 1 << 30
STOP_TIMEOUT_S = 90
"""Seconds that a system has to go down before it is switched off."""
_LEAST_DISK = 1 << 20
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `vm create` was asked for, beside a container's options; sizes in bytes."""

    image: str = ""
    """A disk image's name, or "" for an empty disk of `size`."""
    size: int = 0
    more: Sequence[int] = ()
    """Sizes of further, empty disks."""
    iso: str = ""
    firmware: str = ""
    sata: bool = False
    screen: bool = False
    iops: int = 0
    bytes_per_second: int = 0
    autostart: bool = False
    seeded: bool = True
    engine: bool = False
    """A machine: with bulkhead inside."""
    user: str = ""
    keys: Sequence[str] = ()
    password: str = ""
    user_data: str = ""


def qemu_img(engine: "Engine") -> QemuImg:
    """qemu-img in jails of this engine's."""
    tools = Tools(Services(engine.home, engine.processes), engine.cgroup_parent)

    async def run(
        argv: Sequence[str], given: Sequence[tuple[str, bool]], timeout_s: float
    ) -> Outcome:
        return await tools.run(argv, given, timeout_s=timeout_s)

    return QemuImg(run)


def spec_of(workload: Workload) -> Spec:
    """The machine's hardware; NotFound for a workload that is none."""
    if workload.record.vm is None:
        raise NotFound(f"{workload.record.name} is no machine: it runs the image "
                       f"{workload.record.image}")  # fmt: skip
    return workload.record.vm


# --- making


async def create(
    engine: "Engine", name: str, request: body.CreateBody, wanted: Wanted
) -> tuple[Workload, list[str]]:
    """A new machine, recorded, with its disks; and warnings. Nothing is left of one that fails."""
    host = request.host_config = request.host_config or body.HostConfig()
    host.memory = host.memory or DEFAULT_MEMORY
    host.memory_swap = host.memory
    request.tty = request.open_stdin = True
    if request.stop_timeout is None:
        request.stop_timeout = STOP_TIMEOUT_S
    base = await engine.blocking(lambda: files.image(engine.home, wanted.image)) if (
        wanted.image
    ) else None  # fmt: skip
    kind = wanted.firmware or (base.firmware if base else "uefi" if wanted.iso else "bios")
    if kind not in FIRMWARES:
        raise Invalid(f"unknown firmware {kind!r}; there are {' and '.join(FIRMWARES)}")
    if wanted.engine:
        payload.check(wanted.image)
        if not wanted.seeded:
            raise Invalid("a machine is set up by its seed: --no-seed excludes it")
    size = max(wanted.size, base.size if base else 0)
    if base and wanted.size and wanted.size < base.size:
        raise Invalid(f"the image {base.name} has {base.size} bytes: a disk cannot be smaller")
    if size < _LEAST_DISK:
        raise Invalid("a machine needs a disk image, or --size for an empty disk")
    request.image = wanted.image or os.path.basename(wanted.iso) or "empty disk"
    record, warnings = creation.bare(engine, name, request, "vm")
    record.config.hostname = request.hostname or record.name
    record.vm = Spec(
        firmware=kind, memory_bytes=host.memory, vcpus=processors(host), disks=[],
        sata=wanted.sata, screen=wanted.screen, iops=wanted.iops,
        bytes_per_second=wanted.bytes_per_second, autostart=wanted.autostart,
        origin=base.origin if base else wanted.iso, seed=wanted.seeded, engine=wanted.engine,
    )  # fmt: skip
    async with contextlib.AsyncExitStack() as undo:
        launching.make_directories(engine.home, record.id)
        undo.callback(delete_tree, engine.home.workload(record.id))
        await _fill(engine, record, record.vm, wanted, [size, *wanted.more])
        workload = Workload(record)
        if base:
            files.image(engine.home, base.name)  # it may have been removed meanwhile
        engine.workloads.check_name(record.name)
        engine.reservations.claim(record, record.host)
        engine.workloads.add(workload)
        undo.pop_all()
    return workload, warnings


def processors(host: body.Resources) -> int:
    """As many as --cpus asks for, rounded up; one if it does not."""
    return max(1, math.ceil(max(host.nano_cpus, host.reserve_cpus) / 1e9))


async def _fill(
    engine: "Engine", record: Record, spec: Spec, wanted: Wanted, sizes: Sequence[int]
) -> None:
    """The machine's own files."""
    folder = engine.home.workload(record.id)
    tool = qemu_img(engine)
    for number, size in enumerate(sizes):
        base = wanted.image if number == 0 else ""
        disk = Disk(f"disk{number}.qcow2", _rounded(size), base)
        await tool.create(f"{folder}/{disk.file}", disk.size, base_of(engine.home, base))
        spec.disks.append(disk)
    if wanted.iso:
        path = os.path.realpath(wanted.iso)
        await engine.blocking(lambda: copy_sparse(path, f"{folder}/{CD}"))
        spec.iso = CD
    if spec.firmware == "uefi":
        uefi = await engine.blocking(lambda: firmware.need(engine.home))
        shutil.copyfile(uefi.variables, f"{folder}/{NVRAM}")
    extra = ""
    if wanted.engine:
        await engine.blocking(partial(payload.write, f"{folder}/{PAYLOAD}"))
        extra = payload.SEED
    if wanted.seeded:
        own = seed.Seed(
            instance=f"i-{record.id[:16]}", hostname=record.config.hostname, user=wanted.user,
            keys=wanted.keys, password=wanted.password, user_data=wanted.user_data,
            vendor_data=extra,
        )  # fmt: skip
        seed.write(f"{folder}/{SEED}", own, uid=uid_of(record.id))


def _rounded(size: int) -> int:
    return -(-size // 4096) * 4096


def copy_sparse(source: str, target: str) -> None:
    """Copy a file of the host, leaving holes where it has zeros; Invalid if it is none."""
    try:
        with open(source, "rb") as given, open(target, "xb") as out:
            while piece := given.read(_PIECE):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), os.SEEK_CUR)
                else:
                    out.write(piece)
            out.truncate(given.tell())
    except OSError as error:
        raise Invalid(f"cannot copy {source}: {error.strerror}") from error


# --- disk images


async def import_(
    engine: "Engine", path: str, name: str, kind: str, firmware_kind: str
) -> files.Image:
    """Take a disk image of any format into the catalogue; Invalid for one that is not whole."""
    files.absent(engine.home, name)
    tool = qemu_img(engine)
    with files.work(engine.home) as folder:
        source, found = os.path.realpath(path), firmware_kind
        try:
            packed = await engine.blocking(lambda: ova.is_ova(source))
            if packed and not kind:
                said = await engine.blocking(lambda: ova.unpack(source, f"{folder}/packed"))
                source, found = f"{folder}/packed", firmware_kind or said.firmware
            if not os.stat(source).st_mode & stat.S_IROTH:
                await engine.blocking(partial(copy_sparse, source, f"{folder}/readable"))
                source = f"{folder}/readable"
                os.chmod(source, 0o644)
            format_ = foreign.format_named(kind) if kind else ""
            if format_ != "raw":  # whose bytes are the disk, whatever they look like
                detected = await engine.blocking(partial(foreign.detect, source))
                if format_ and detected != format_:
                    raise Invalid(f"{path} is {detected}, not {kind}")
                format_ = detected
        except OSError as error:
            raise Invalid(f"cannot read {path}: {error.strerror}") from error
        size = await tool.size(source, format_)
        await tool.convert(source, format_, f"{folder}/{files.DISK}")
        made = files.Image(
            name=name, size=size, firmware=found or "bios", created_ns=time.time_ns(),
            origin=f"{os.path.basename(path)} ({'ova, ' if packed and not kind else ''}{format_})",
        )  # fmt: skip
        return await engine.blocking(lambda: files.keep(engine.home, made, folder))


async def bootstrapped(
    engine: "Engine", request: bootstrap.Request, name: str,
    with_progress: Callable[[Callable[[Progress], Any]], Any],
) -> files.Image:  # fmt: skip
    """Make a bootable disk from packages and take it into the catalogue."""
    files.absent(engine.home, name)
    with files.work(engine.home) as folder:
        os.chmod(folder, 0o755)
        packages = f"{folder}/packages"
        os.mkdir(packages, 0o755)
        disk = f"{folder}/disk.raw"
        await with_progress(lambda progress: bootstrap.make(request, packages, disk, progress))
        await qemu_img(engine).convert(disk, "raw", f"{folder}/{files.DISK}")
        made = files.Image(
            name=name, size=os.path.getsize(disk), firmware="uefi", created_ns=time.time_ns(),
            origin=f"bootstrap {request.name}", user=bootstrap.USER,
        )  # fmt: skip
        return await engine.blocking(lambda: files.keep(engine.home, made, folder))


def image_users(engine: "Engine", name: str) -> list[str]:
    """Names of the machines that lie on a disk image."""
    return sorted(
        workload.record.name
        for workload in engine.workloads
        if workload.record.vm and any(disk.base == name for disk in workload.record.vm.disks)
    )


def remove_image(engine: "Engine", name: str) -> None:
    """Remove a disk image; Conflict if machines lie on it."""
    users = image_users(engine, name)
    if users:
        raise Conflict(f"the disk image {name} is in use by {', '.join(users)}")
    files.remove(engine.home, name)


# --- what is done with a machine's disks


def _first(spec: Spec) -> Disk:
    return spec.disks[0]


async def export(engine: "Engine", workload: Workload, path: str, kind: str) -> int:
    """Write a machine's first disk as one file of format `kind`; its size on the host, in bytes."""
    spec = spec_of(workload)
    wanted = foreign.format_named(kind)
    if os.path.exists(path):
        raise Conflict(f"{path} is there already")
    async with workload.lock:
        if workload.running:
            raise Conflict(
                f"{workload.record.name} is running: stop it before its disk is exported"
            )
        disk = _first(spec)
        source = f"{engine.home.workload(workload.id)}/{disk.file}"
        with files.work(engine.home) as folder:
            made = f"{folder}/export"
            await qemu_img(engine).flatten(source, base_of(engine.home, disk.base), made, wanted)
            os.chown(made, os.geteuid(), os.getegid())
            os.chmod(made, 0o644)
            try:
                await engine.blocking(lambda: _move(made, path))
            except OSError as error:
                raise Invalid(f"cannot write {path}: {error.strerror}") from error
    return os.stat(path).st_size


def _move(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except OSError:
        copy_sparse(source, target)


async def resize(engine: "Engine", workload: Workload, number: int, size: int) -> None:
    """Make a disk larger, also of a machine that runs; Invalid to make it smaller."""
    spec = spec_of(workload)
    size = _rounded(size)
    async with workload.lock:
        if not 0 <= number < len(spec.disks):
            raise NotFound(
                f"{workload.record.name} has {len(spec.disks)} disks, no number {number}"
            )
        disk = spec.disks[number]
        if size < disk.size:
            raise Invalid(f"a disk cannot be made smaller: it has {disk.size} bytes")
        if workload.running:
            async with _control(workload) as qmp:
                await qmp.execute("block_resize", **{"node-name": f"disk{number}"}, size=size)
        else:
            path = f"{engine.home.workload(workload.id)}/{disk.file}"
            await qemu_img(engine).resize(path, base_of(engine.home, disk.base), size)
        disk.size = size
        engine.workloads.save(workload)


def _control(workload: Workload) -> Any:
    instance: Any = workload.instance
    return instance.control()


def update(engine: "Engine", workload: Workload, memory: int, cpus: float) -> None:
    """Change the hardware of a machine that does not run; 0 keeps what it has."""
    spec, host = spec_of(workload), workload.record.host
    if workload.running:
        raise Conflict(f"{workload.record.name} is running: stop it before its hardware changes")
    if memory:
        if memory < 64 << 20:
            raise Invalid("a machine needs at least 64 MiB of memory")
        spec.memory_bytes = host.memory = host.memory_swap = memory
    if cpus:
        if not 0 < cpus <= (os.cpu_count() or 1):
            raise Invalid(f"this host has {os.cpu_count() or 1} processors")
        host.nano_cpus = int(cpus * 1e9)
        spec.vcpus = processors(host)
    engine.workloads.save(workload)


def autostart(engine: "Engine", workload: Workload, *, wanted: bool) -> None:
    """Whether the machine is started when the engine begins."""
    spec_of(workload).autostart = wanted
    engine.workloads.save(workload)
