"""Snapshots of machines: inside their first disk, with memory if the machine runs.

A machine that runs is saved as it is and goes on; going back to such a snapshot puts it there
while it runs. Of a machine that does not run only the disks are saved; going back needs it stopped.
"""

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from bulkhead.boundaries.vmm.qmp import Qmp
from bulkhead.engine.records import Workload
from bulkhead.engine.vms import qemu_img, spec_of
from bulkhead.errors import Conflict, Internal, Invalid, NotFound, Unavailable
from bulkhead.machines import files

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_JOB_S = 600.0
_STEP_S = 0.1


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Invalid(f"invalid name of a snapshot {name!r}: a letter, then letters, digits, _ . -")


async def listing(engine: "Engine", workload: Workload) -> list[dict[str, Any]]:
    """The snapshots of a machine, oldest first."""
    disk = spec_of(workload).disks[0]
    found = await qemu_img(engine).snapshots(f"{engine.home.workload(workload.id)}/{disk.file}")
    return [
        {
            "Name": str(one.get("name", "")),
            "Created": int(one.get("date-sec", 0)),
            "Memory": int(one.get("vm-state-size", 0)),
        }
        for one in found
    ]


async def make(engine: "Engine", workload: Workload, name: str) -> None:
    """Save the machine; Conflict if the name is taken."""
    _check(name)
    async with workload.lock:
        if any(one["Name"] == name for one in await listing(engine, workload)):
            raise Conflict(f"{workload.record.name} has a snapshot {name} already")
        await _act(engine, workload, "-c", "snapshot-save", name)


async def restore(engine: "Engine", workload: Workload, name: str) -> None:
    """Go back to a snapshot; Conflict if it has no memory and the machine runs."""
    async with workload.lock:
        found = await _find(engine, workload, name)
        if workload.running and not found["Memory"]:
            raise Conflict(
                f"the snapshot {name} has no memory in it: stop {workload.record.name} first"
            )
        await _act(engine, workload, "-a", "snapshot-load", name)


async def remove(engine: "Engine", workload: Workload, name: str) -> None:
    """Forget a snapshot."""
    async with workload.lock:
        await _find(engine, workload, name)
        await _act(engine, workload, "-d", "snapshot-delete", name)


async def _find(engine: "Engine", workload: Workload, name: str) -> dict[str, Any]:
    for one in await listing(engine, workload):
        if one["Name"] == name:
            return one
    raise NotFound(f"No such snapshot of {workload.record.name}: {name}")


async def _act(engine: "Engine", workload: Workload, offline: str, command: str, name: str) -> None:
    disks = spec_of(workload).disks
    if not workload.running:
        for disk in disks:
            path = f"{engine.home.workload(workload.id)}/{disk.file}"
            base = files.disk_of(engine.home, disk.base) if disk.base else ""
            await qemu_img(engine).snapshot(path, base, offline, name)
        return
    instance: Any = workload.instance
    nodes = [f"disk{number}" for number in range(len(disks))]
    given: dict[str, Any] = {"job-id": "snapshot", "tag": name, "devices": nodes}
    if command != "snapshot-delete":
        given["vmstate"] = nodes[0]
    async with instance.control(timeout_s=_JOB_S) as qmp:
        await qmp.execute(command, **given)
        await _finished(qmp, name)


async def _finished(qmp: Qmp, name: str) -> None:
    """Wait for QEMU's job."""
    deadline = time.monotonic() + _JOB_S
    while time.monotonic() < deadline:
        for job in await qmp.execute("query-jobs"):
            if job["id"] == "snapshot" and job["status"] == "concluded":
                await qmp.execute("job-dismiss", id="snapshot")
                if job.get("error"):
                    raise Internal(f"QEMU: snapshot {name}: {job['error']}")
                return
        await asyncio.sleep(_STEP_S)
    raise Unavailable(f"QEMU has not finished the snapshot {name} in {_JOB_S:g} s")
