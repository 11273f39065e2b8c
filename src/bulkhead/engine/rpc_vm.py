"""RPC: whole machines and their disk images (`vm.*`)."""

import contextlib
import os
from typing import Any

from bulkhead.engine import body, tenants, vm_shape, vm_snapshots, vms
from bulkhead.engine.calls import Call, Nothing, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.engine.describe import inspect as describe_workload
from bulkhead.engine.health import moment
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.engine.streaming import with_progress
from bulkhead.errors import Conflict, Invalid
from bulkhead.machines import bootstrap, files, firmware

METHODS = Table()


class One(Params, frozen=True):
    """A machine, by name or id."""

    id: str


class Create(Params, frozen=True):
    """A new machine; `body` has what it shares with containers. Sizes in bytes."""

    body: body.CreateBody
    name: str = ""
    image: str = ""
    size: int = 0
    more: tuple[int, ...] = ()
    iso: str = ""
    firmware: str = ""
    sata: bool = False
    screen: bool = False
    iops: int = 0
    bytes_per_second: int = 0
    autostart: bool = False
    seeded: bool = True
    user: str = ""
    keys: tuple[str, ...] = ()
    password: str = ""
    user_data: str = ""
    engine: bool = False


class Import(Params, frozen=True):
    """A disk image's file on this host, and the name it shall have."""

    file: str
    name: str
    format: str = ""
    firmware: str = ""


class Bootstrap(Params, frozen=True):
    """A disk from a distribution's packages; `disk` is the image's name, "" for the same."""

    name: str
    disk: str = ""
    include: tuple[str, ...] = ()
    mirror: str | None = None
    lock: str = ""
    size: int = 0


class Export(One, frozen=True):
    """Where to."""

    file: str
    format: str = "qcow2"


class Resize(One, frozen=True):
    """A disk by number, and its new size in bytes."""

    size: int
    disk: int = 0


class Snapshot(One, frozen=True):
    """What to do with which snapshot: make, restore or remove."""

    name: str
    act: str = "make"


class Update(One, frozen=True):
    """New hardware; 0 keeps what there is."""

    memory: int = 0
    cpus: float = 0.0


class Autostart(One, frozen=True):
    """Whether it is started when the engine begins."""

    wanted: bool


class Inside(One, frozen=True):
    """A command line of bulkhead's; three descriptors come along, standard input to error."""

    argv: tuple[str, ...]
    tty: bool = False
    rows: int = 0
    columns: int = 0
    tenant: str = ""


class Named(Params, frozen=True):
    """A disk image."""

    name: str


def _machine(engine: Engine, reference: str) -> Workload:
    workload = engine.workloads.find(reference)
    vms.spec_of(workload)
    return workload


def _absolute(*paths: str) -> None:
    for path in paths:
        if path and not os.path.isabs(path):
            raise Invalid(f"{path} is not an absolute path")


@METHODS.method("vm.create", Create)
async def create(engine: Engine, params: Create, call: Call) -> dict[str, Any]:
    """Make one; it does not run yet."""
    _absolute(params.iso)
    taken = ("body", "name")
    wanted = vms.Wanted(
        **{key: getattr(params, key) for key in params.__struct_fields__ if key not in taken}
    )
    task = engine.spawn(vms.create(engine, params.name, params.body, wanted))
    workload, warnings = await engine.shielded(task)
    engine.events.emit("container", "create", workload.id, attributes(workload))
    return {"Id": workload.id, "Warnings": warnings}


@METHODS.method("vm.list", Nothing)
async def list_(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """All machines."""
    found = [one for one in engine.workloads if one.record.vm is not None]
    return [_summary(engine, one) for one in sorted(found, key=lambda one: one.record.created_ns)]


def _summary(engine: Engine, workload: Workload) -> dict[str, Any]:
    record, spec = workload.record, vms.spec_of(workload)
    networks = describe_workload(engine, workload)["NetworkSettings"]["Networks"]
    addresses = [one.get("IPAddress", "") for one in networks.values()]
    return {
        "Id": record.id,
        "Name": record.name,
        "State": record.status,
        "Image": record.image,
        "Firmware": spec.firmware,
        "Cpus": spec.vcpus,
        "Memory": spec.memory_bytes,
        "Disk": sum(disk.size for disk in spec.disks),
        "Autostart": spec.autostart,
        "Engine": spec.engine,
        "Addresses": [one for one in addresses if one],
    }


@METHODS.method("vm.inspect", One)
async def inspect(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """What `workload.inspect` says, and the machine's hardware."""
    workload = _machine(engine, params.id)
    spec = vms.spec_of(workload)
    folder = engine.home.workload(workload.id)
    run = engine.home.workload_run(workload.id)
    described = describe_workload(engine, workload)
    described["Machine"] = {
        **_summary(engine, workload),
        "Acceleration": engine.boundary("vm").probe().facts.get("acceleration", ""),
        "Origin": spec.origin,
        "Disks": [
            {"File": f"{folder}/{disk.file}", "Size": disk.size, "Image": disk.base,
             "Stored": os.stat(f"{folder}/{disk.file}").st_blocks * 512}
            for disk in spec.disks
        ],
        "Cd": f"{folder}/{spec.iso}" if spec.iso else "",
        "Seed": f"{folder}/{vm_shape.SEED}" if spec.seed else "",
        "Screen": f"{run}/screen/vnc.sock" if spec.screen else "",
        "Iops": spec.iops,
        "BytesPerSecond": spec.bytes_per_second,
    }  # fmt: skip
    return described


@METHODS.method("vm.export", Export)
async def export(engine: Engine, params: Export, call: Call) -> dict[str, Any]:
    """Write its first disk as a file."""
    _absolute(params.file)
    workload = _machine(engine, params.id)
    size = await vms.export(engine, workload, params.file, params.format)
    return {"File": params.file, "Size": size}


@METHODS.method("vm.resize", Resize)
async def resize(engine: Engine, params: Resize, call: Call) -> dict[str, Any]:
    """Make a disk larger."""
    await vms.resize(engine, _machine(engine, params.id), params.disk, params.size)
    return {}


@METHODS.method("vm.snapshot", Snapshot)
async def snapshot(engine: Engine, params: Snapshot, call: Call) -> dict[str, Any]:
    """Make a snapshot, go back to it, or forget it."""
    acts = {
        "make": vm_snapshots.make,
        "restore": vm_snapshots.restore,
        "remove": vm_snapshots.remove,
    }
    act = acts.get(params.act)
    if act is None:
        raise Invalid(f"unknown act {params.act!r}; there are {', '.join(acts)}")
    workload = _machine(engine, params.id)
    await engine.shielded(engine.spawn(act(engine, workload, params.name)))
    return {}


@METHODS.method("vm.snapshots", One)
async def snapshots(engine: Engine, params: One, call: Call) -> list[dict[str, Any]]:
    """Those there are."""
    found = await vm_snapshots.listing(engine, _machine(engine, params.id))
    return [{**one, "Created": moment(one["Created"] * 10**9)} for one in found]


@METHODS.method("vm.update", Update)
async def update(engine: Engine, params: Update, call: Call) -> dict[str, Any]:
    """Change the hardware of one that does not run."""
    vms.update(engine, _machine(engine, params.id), params.memory, params.cpus)
    return {}


@METHODS.method("vm.autostart", Autostart)
async def autostart(engine: Engine, params: Autostart, call: Call) -> dict[str, Any]:
    """Whether it is started when the engine begins."""
    vms.autostart(engine, _machine(engine, params.id), wanted=params.wanted)
    return {}


@METHODS.method("vm.images", Nothing)
async def images(engine: Engine, params: Nothing, call: Call) -> list[dict[str, Any]]:
    """The disk images."""
    found = await engine.blocking(lambda: files.images(engine.home))
    return [_image(one, vms.image_users(engine, one.name)) for one in found]


def _image(one: files.Image, users: list[str]) -> dict[str, Any]:
    return {
        "Name": one.name, "Size": one.size, "Stored": one.stored, "Firmware": one.firmware,
        "Origin": one.origin, "Created": moment(one.created_ns), "User": one.user, "UsedBy": users,
    }  # fmt: skip


@METHODS.method("vm.import", Import)
async def import_(engine: Engine, params: Import, call: Call) -> dict[str, Any]:
    """Take a disk image into the catalogue."""
    _absolute(params.file)
    work = vms.import_(engine, params.file, params.name, params.format, params.firmware)
    return _image(await engine.shielded(engine.spawn(work)), [])


@METHODS.method("vm.bootstrap", Bootstrap)
async def make(engine: Engine, params: Bootstrap, call: Call) -> dict[str, Any]:
    """Make a disk image from a distribution's packages."""
    _absolute(params.lock)
    request = bootstrap.Request(
        params.name, params.include, params.mirror, params.lock,
        params.size or bootstrap.DEFAULT_BYTES,
    )  # fmt: skip
    made = await vms.bootstrapped(
        engine, request, params.disk or params.name, lambda work: with_progress(engine, call, work)
    )
    return _image(made, [])


@METHODS.method("vm.rmi", Named)
async def remove_image(engine: Engine, params: Named, call: Call) -> dict[str, Any]:
    """Remove a disk image that no machine lies on."""
    vms.remove_image(engine, params.name)
    return {}


@METHODS.method("vm.firmware", Nothing)
async def pull_firmware(engine: Engine, params: Nothing, call: Call) -> dict[str, str]:
    """Fetch the UEFI firmware from the distribution, if there is none."""
    found = await engine.blocking(lambda: firmware.pull(engine.home))
    return {"Code": found.code}


@METHODS.method("vm.reset", One)
async def reset(engine: Engine, params: One, call: Call) -> dict[str, Any]:
    """Press the reset button; Conflict if it does not run."""
    workload = _machine(engine, params.id)
    instance: Any = workload.instance
    if not workload.running or instance is None:
        raise Conflict(f"{workload.record.name} is not running")
    async with instance.control() as qmp:
        await qmp.execute("system_reset")
    return {}


@METHODS.method("machine.run", Inside)
async def run_inside(engine: Engine, params: Inside, call: Call) -> dict[str, int]:
    """Run `bulkhead ARGV` by the engine in a machine."""
    workload = _machine(engine, params.id)
    tenants.admit(engine, workload.record.name, params.tenant, params.argv)
    with contextlib.ExitStack() as undo:
        fds = [undo.enter_context(call.take_fd(f"stream {number}")) for number in range(3)]
        code = await engine.inside.run(
            workload, params.argv, fds, tty=params.tty, rows=params.rows, columns=params.columns
        )
    return {"StatusCode": code}
