"""From a machine's record to what its boundary takes."""

from bulkhead.boundary.seam import Drive, WholeMachine
from bulkhead.engine.options import cpus_in
from bulkhead.engine.records import Record
from bulkhead.home import Home
from bulkhead.machines import files, firmware

SEED, NVRAM, CD, PAYLOAD = "seed.img", "nvram.fd", "cd.iso", "payload.img"
"""Files of a machine's own directory."""


def base_of(home: Home, name: str) -> str:
    """The path of the disk image that a disk lies on; "" for none."""
    return files.disk_of(home, name) if name else ""


def describe(home: Home, record: Record) -> WholeMachine | None:
    """The machine as its boundary takes it; None for workloads that are none."""
    spec = record.vm
    if spec is None:
        return None
    folder = home.workload(record.id)
    drives = [
        Drive(f"{folder}/{disk.file}", "qcow2", base_of(home, disk.base)) for disk in spec.disks
    ]
    if spec.iso:
        drives.append(Drive(f"{folder}/{spec.iso}", "raw", readonly=True, cdrom=True))
    if spec.seed:
        drives.append(Drive(f"{folder}/{SEED}", "raw", readonly=True))
    if spec.engine:
        drives.append(Drive(f"{folder}/{PAYLOAD}", "raw", readonly=True))
    uefi = firmware.find(home) if spec.firmware == "uefi" else None
    return WholeMachine(
        drives=tuple(drives),
        memory_bytes=spec.memory_bytes,
        vcpus=spec.vcpus,
        code=uefi.code if uefi else "",
        nvram=f"{folder}/{NVRAM}" if uefi else "",
        sata=spec.sata,
        screen=spec.screen,
        link=spec.engine,
        reserved=record.host.reserve_memory > 0,
        pinned=tuple(sorted(_processors(record))),
        iops=spec.iops,
        bytes_per_second=spec.bytes_per_second,
    )


def _processors(record: Record) -> set[int]:
    text = record.pinned or record.host.cpuset_cpus
    return cpus_in(text) if text else set()
