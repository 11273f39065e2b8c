"""What a whole machine is made of, as it is recorded; sizes in bytes."""

import msgspec

FIRMWARES = ("uefi", "bios")


class Disk(msgspec.Struct, omit_defaults=True):
    """A disk: a qcow2 file in the machine's own directory.

    `base` names the disk image in the catalogue that it lies on, "" for none. `size` is what the
    machine sees.
    """

    file: str
    size: int
    base: str = ""


class Spec(msgspec.Struct, omit_defaults=True):
    """The machine's hardware, beside what every workload has (limits, networks, restarts)."""

    firmware: str
    memory_bytes: int
    vcpus: int
    disks: list[Disk]
    iso: str = ""
    """A file of the machine's own directory that is in its CD drive."""
    seed: bool = False
    """Whether there is a cloud-init seed (seed.img)."""
    screen: bool = False
    """A graphics card, shown by VNC on a unix socket."""
    sata: bool = False
    """Disks are SATA's, for systems without virtio drivers."""
    autostart: bool = False
    """It is started when the engine begins."""
    iops: int = 0
    """Reads and writes a second of each disk, 0 for no limit."""
    bytes_per_second: int = 0
    origin: str = ""
    """Where the first disk came from, for people."""
    engine: bool = False
    """A machine: bulkhead's engine runs inside (engine/inside.py)."""
