"""Snapshots: running workloads with a kernel of their own, saved with their memory.

    <root>/snapshots/NAME/snapshot.json    the workload's record, when it was taken
                         /machine.image    the machine (boundaries/vmm/images.py)
                         /disk.ext4        its writable disk, of the same moment

A restored workload is a new one: its memory is mapped from the snapshot copy-on-write, its disk is
a copy (shared blocks where the file system can), and it gets an identity of its own before its
processes go on. A snapshot belongs to the host's kernel under which it was taken.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from bulkhead.boundary import registry
from bulkhead.boundary.seam import Saving
from bulkhead.engine import body, launching, names
from bulkhead.engine.records import Record, Workload
from bulkhead.engine.trees import delete_tree
from bulkhead.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from bulkhead.home import Home
from bulkhead.linux import sparse

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_FACTS = "snapshot.json"
_DISK = "disk.ext4"
_LARGEST = 16 << 20


class Facts(msgspec.Struct, omit_defaults=True):
    """What is remembered of a snapshot beside its image."""

    name: str
    created_ns: int
    record: Record


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Facts)


def directory(home: Home, name: str) -> str:
    """Where the snapshot called `name` is."""
    return home.in_root("snapshots", name)


def _read(path: str) -> Facts:
    with open(f"{path}/{_FACTS}", "rb") as file:
        try:
            return _decoder.decode(file.read(_LARGEST))
        except msgspec.MsgspecError as error:
            raise Invalid(f"{path}/{_FACTS}: {error}") from None


def find(home: Home, name: str) -> Facts:
    """One by its name; NotFound."""
    try:
        return _read(directory(home, names.check(name)))
    except FileNotFoundError:
        raise NotFound(f"No such snapshot: {name}") from None


def every(home: Home) -> Iterator[Facts]:
    """All that are complete, by name."""
    folder = home.in_root("snapshots")
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if not name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    yield _read(f"{folder}/{name}")


def held(home: Home) -> set[str]:
    """The image and the layers that snapshots need."""
    records = [one.record for one in every(home)]
    return {digest for record in records for digest in (record.image_id, *record.diff_ids)}


def describe(home: Home, facts: Facts) -> dict[str, object]:
    """As `snapshot.list` shows it; sizes in bytes on disk."""
    path = directory(home, facts.name)
    size = 0
    for name in os.listdir(path):
        size += os.stat(f"{path}/{name}").st_blocks * 512
    return {
        "Name": facts.name,
        "Created": facts.created_ns // 10**9,
        "Workload": facts.record.name,
        "WorkloadId": facts.record.id,
        "Image": facts.record.image,
        "Boundary": facts.record.boundary,
        "Size": size,
    }


def check(record: Record) -> None:
    """Unsupported, with what is possible instead, for what cannot be saved as it runs."""
    if record.boundary not in registry.GUESTS:
        raise Unsupported(
            f"{record.name} shares the host's kernel (boundary {record.boundary}): its memory "
            "cannot be saved. commit saves its files, pause stops it, and what runs with "
            "--boundary microvm can be saved with its memory"
        )
    kept = [point.destination for point in record.mounts if point.type_ != "tmpfs"]
    if kept:
        raise Unsupported(
            f"{record.name} has files of the host at {', '.join(kept)}, which would change behind "
            "the back of a saved kernel: only workloads without volumes and binds can be saved"
        )


def _free_name(home: Home, workload: str) -> str:
    number = 1
    while os.path.lexists(directory(home, f"{workload}-{number}")):
        number += 1
    return f"{workload}-{number}"


async def take(engine: "Engine", workload: Workload, name: str = "") -> Facts:
    """Save a running workload, which goes on after it. Conflict if it does not run."""
    record = workload.record
    check(record)
    async with workload.lock:
        instance: object = workload.instance
        if record.status != "running" or instance is None:
            raise Conflict(f"container {record.id} is not running: only what runs can be saved")
        if not isinstance(instance, Saving):
            raise Unsupported(f"the boundary {record.boundary} cannot save what runs")
        name = names.check(name) if name else _free_name(engine.home, record.name)
        target = directory(engine.home, name)
        if os.path.lexists(target):
            raise Conflict(f"there is a snapshot called {name} already")
        scratch = directory(engine.home, f".new-{os.urandom(6).hex()}")
        facts = Facts(name, time.time_ns(), record)
        with contextlib.ExitStack() as undo:
            os.makedirs(scratch, mode=0o700)
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            record.passing = True
            undo.callback(_passed, engine, workload)
            engine.workloads.save(workload)
            await instance.snapshot(scratch)
            with open(f"{scratch}/{_FACTS}", "xb") as file:
                file.write(_encoder.encode(facts))
            os.rename(scratch, target)
    return facts


def _passed(engine: "Engine", workload: Workload) -> None:
    workload.record.passing = False
    engine.workloads.save(workload)


async def restore(engine: "Engine", name: str, new_name: str = "") -> Workload:
    """Make a workload of a snapshot and let it go on."""
    facts = find(engine.home, name)
    record = _renewed(engine, facts.record)
    record.name = names.check(new_name) if new_name else names.invent(engine.workloads.names())
    record.saved = name
    workload = Workload(record)
    path = directory(engine.home, name)
    engine.workloads.check_name(record.name)
    with contextlib.ExitStack() as undo:
        for own in (engine.home.workload(record.id), engine.home.workload_run(record.id)):
            undo.callback(delete_tree, own)
        engine.spares.touch(record.id)  # nobody may clear its directories away meanwhile
        launching.make_directories(engine.home, record.id)
        disk = f"{engine.home.workload(record.id)}/{_DISK}"
        try:
            await engine.blocking(lambda: sparse.copy_file(f"{path}/{_DISK}", disk))
        except OSError as error:
            raise Unavailable(f"the disk of the snapshot {name}: {error.strerror}") from error
        engine.reservations.claim(record, record.host)
        engine.workloads.add(workload)
        undo.pop_all()
    try:
        await engine.lifecycle.start(workload)
    except BaseException:
        await engine.removal.remove(workload, force=True, volumes=True)
        raise
    return workload


def _renewed(engine: "Engine", old: Record) -> Record:
    """The record of a new workload like the saved one, with nothing that only one can have.

    Fixed addresses are given up, and so are the host's ports, for free ones.
    """
    config, host = old.config, old.host
    identity = engine.take_id()
    if config.hostname == old.id[:12]:
        config.hostname = identity[:12]
    config.mac_address = ""
    bindings = host.port_bindings
    for port, given in (bindings or {}).items():
        assert bindings is not None
        bindings[port] = [body.PortBinding(host_ip=one.host_ip) for one in given or ()]
    for endpoint in old.networks.values():
        endpoint.ipam_config, endpoint.mac_address = None, ""
    return Record(
        id=identity,
        name="",
        created_ns=time.time_ns(),
        boundary=old.boundary,
        image=old.image,
        image_id=old.image_id,
        config=config,
        host=host,
        diff_ids=old.diff_ids,
        networks=old.networks,
        mounts=old.mounts,
        args=old.args,
        platform=old.platform,
        boot_id=engine.boot_id,
        kernel=old.kernel,
    )


async def fork(engine: "Engine", workload: Workload, new_name: str = "") -> Workload:
    """Both at once: a new workload that goes on from where `workload` is."""
    facts = await take(engine, workload, f"fork-{os.urandom(6).hex()}")
    try:
        return await restore(engine, facts.name, new_name)
    finally:
        await engine.blocking(lambda: remove(engine.home, facts.name))


def remove(home: Home, name: str) -> None:
    """Remove one; workloads made of it have what they need of it as long as they run."""
    find(home, name)
    gone = directory(home, f".gone-{os.urandom(6).hex()}")
    os.rename(directory(home, name), gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(home: Home) -> None:
    """Remove what an engine that was killed had begun."""
    folder = home.in_root("snapshots")
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.startswith("."):
                shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
