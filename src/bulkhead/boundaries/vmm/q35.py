"""QEMU's `q35` machine as a command line: a PC with PCI Express, for whole systems.

    firmware   OVMF (UEFI) with its variables, or SeaBIOS
    disks      virtio-blk, or SATA for systems without such drivers; /disks/N of the jail
    serial     the first line is QEMU's standard input and output, hence the workload's terminal
    control    a listening socket that the engine made (QMP); the screen another (VNC)

Every path and format is named; QEMU opens no other file, whatever is written in a disk's header.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead.boundaries.vmm.qemu import BASELINE, BINARY, PORT, SANDBOX, Card
from bulkhead.errors import Invalid, Unsupported

MIN_MEMORY = 64 << 20
MOST_DRIVES = 12
SATA_PORTS = 6
LINK = "bulkhead.engine"
"""The virtio port of the engine inside (machines/link.py)."""
SCREEN = "/run/screen/vnc.sock"


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk: a file of the jail in a named format; `base` is the qcow2 file it lies on, or ""."""

    path: str
    format: str
    base: str = ""
    readonly: bool = False
    cdrom: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that the machine is made of; sizes in bytes, descriptors as QEMU has them."""

    drives: Sequence[Drive]
    memory_bytes: int
    vcpus: int
    control_fd: int
    cards: Sequence[Card] = ()
    accelerator: str = "tcg"
    code: str = ""
    """UEFI's code; "" for BIOS."""
    nvram: str = ""
    sata: bool = False
    screen: bool = False
    reserved: bool = False
    iops: int = 0
    bytes_per_second: int = 0
    link_fd: int = -1
    """A listening socket that leads to the virtio port LINK, if there is one."""


def argv(machine: Machine) -> list[str]:
    """QEMU's command line; Invalid or Unsupported for what no such machine can be."""
    _check(machine)
    words = [BINARY, "-nodefaults", "-no-user-config", "-sandbox", SANDBOX]
    words += ["-name", "bulkhead,process=qemu,debug-threads=on", "-boot", "strict=off"]
    words += _board(machine)
    words += ["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]
    words += ["-chardev", f"socket,id=control,fd={machine.control_fd},server=on,wait=off"]
    words += ["-mon", "chardev=control,mode=control"]
    words += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]
    for number, card in enumerate(machine.cards):
        words += ["-netdev", f"tap,id=net{number},fd={card.tap_fd}"]
        words += ["-device", f"virtio-net-pci,mac={card.mac},netdev=net{number},romfile="]
    if machine.link_fd >= 0:
        words += ["-chardev", f"socket,id=link,fd={machine.link_fd},server=on,wait=off"]
        words += ["-device", "virtio-serial-pci,max_ports=2"]
        words += ["-device", f"virtserialport,chardev=link,name={LINK}"]
    if machine.iops or machine.bytes_per_second:
        limits = {"iops-total": machine.iops, "bps-total": machine.bytes_per_second}
        group = {"qom-type": "throttle-group", "id": "limits", "limits": limits}
        words += ["-object", _json(group)]
    ports = 0
    for number, drive in enumerate(machine.drives):
        node = _node(machine, drive, number)
        words += ["-blockdev", _json(node)]
        sata = machine.sata or drive.cdrom
        words += ["-device", _device(drive, node["node-name"], number, ports if sata else -1)]
        ports += sata
    if machine.screen:
        words += ["-vnc", f"unix:{SCREEN}", "-device", "VGA", "-device", "virtio-tablet-pci"]
    else:
        words += ["-display", "none"]
    return words


@dataclass(frozen=True, slots=True)
class Guest:
    """The same PC entered by a kernel of ours, with the guest protocol on a virtio port.

    Disks in order are /dev/vda and so on, cards eth0 and so on.
    """

    kernel: str
    initramfs: str
    channel_fd: int
    disks: Sequence[tuple[str, bool]]
    """Raw files, and whether they may be written."""
    cards: Sequence[Card]
    memory_bytes: int
    vcpus: int
    accelerator: str
    tsc_khz: int = 0


MOST_DISKS = 20
"""PCI slots, less those of the board, the port and some cards."""


def guest_argv(guest: Guest) -> list[str]:
    """QEMU's command line for an image's kernel and layers."""
    if len(guest.disks) + len(guest.cards) > MOST_DISKS:
        raise Unsupported(f"a VM has room for {MOST_DISKS} disks and network cards together")
    words = [BINARY, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-sandbox", SANDBOX, "-name", "bulkhead,process=qemu"]
    words += ["-M", "q35,smm=off,vmport=off,usb=off,sata=off,mem-merge=off"]
    words += ["-m", f"{guest.memory_bytes >> 20}M", "-smp", str(guest.vcpus)]
    words += _processor(guest.accelerator, guest.vcpus)
    words += ["-kernel", guest.kernel, "-initrd", guest.initramfs, "-append", command_line(guest)]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=channel,fd={guest.channel_fd}"]
    words += ["-device", "virtio-serial-pci,max_ports=2"]
    words += ["-device", f"virtserialport,chardev=channel,name={PORT}"]
    for number, card in enumerate(guest.cards):
        words += ["-netdev", f"tap,id=net{number},fd={card.tap_fd}"]
        words += ["-device", f"virtio-net-pci,mac={card.mac},netdev=net{number},romfile="]
    for number, (path, writable) in enumerate(guest.disks):
        node = _format(path, "raw", readonly=not writable) | {"node-name": name(number)}
        words += ["-blockdev", _json(node | ({"discard": "unmap"} if writable else {}))]
        words += ["-device", f"virtio-blk-pci,drive={name(number)}"]
    return words


def command_line(guest: Guest) -> str:
    """The kernel's."""
    words = [
        "console=ttyS0 quiet loglevel=3 panic=-1 8250.nr_uarts=1 no_timer_check",
        f"nr_cpus={guest.vcpus} audit=0 apparmor=0 nowatchdog cryptomgr.notests",
        "random.trust_cpu=on",
    ]
    if guest.accelerator == "tcg":
        words.append(f"nokaslr tsc=reliable tsc_early_khz={guest.tsc_khz}")
    return " ".join(words)


def _processor(accelerator: str, vcpus: int) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    threads = "multi" if vcpus > 1 else "single"
    return ["-accel", f"tcg,thread={threads},tb-size=128", "-cpu", BASELINE]


def _check(machine: Machine) -> None:
    if machine.memory_bytes < MIN_MEMORY:
        raise Invalid(f"a machine needs at least {MIN_MEMORY >> 20} MiB of memory")
    if machine.vcpus < 1:
        raise Invalid(f"{machine.vcpus} processors")
    if len(machine.drives) > MOST_DRIVES:
        raise Unsupported(f"a machine has at most {MOST_DRIVES} disks")
    if sum(machine.sata or one.cdrom for one in machine.drives) > SATA_PORTS:
        raise Unsupported(f"a machine has at most {SATA_PORTS} SATA disks and CD drives")


def _board(machine: Machine) -> list[str]:
    size = machine.memory_bytes >> 20
    board = "q35,smm=off,vmport=off,usb=off,mem-merge=off,memory-backend=memory"
    memory = {
        "qom-type": "memory-backend-ram", "id": "memory", "size": size << 20,
        "prealloc": machine.reserved,
    }  # fmt: skip
    words = ["-object", _json(memory), "-m", f"{size}M", "-smp", str(machine.vcpus)]
    if machine.code:
        board += ",pflash0=code,pflash1=nvram"
        code = {"driver": "file", "filename": machine.code, "locking": "off"}
        words += ["-blockdev", _json({"driver": "raw", "node-name": "code", "read-only": True,
                                      "file": code | {"read-only": True}})]  # fmt: skip
        file = {"driver": "file", "filename": machine.nvram, "locking": "off"}
        words += ["-blockdev", _json({"driver": "raw", "node-name": "nvram", "file": file})]
    return [*words, "-M", board, *_processor(machine.accelerator, machine.vcpus)]


def _node(machine: Machine, drive: Drive, number: int) -> dict[str, Any]:
    """The block graph of one disk: [throttle →] format → file [→ base]."""
    node = _format(drive.path, drive.format, readonly=drive.readonly)
    if drive.format == "qcow2":
        # Never the name in the file's header.
        node["backing"] = _format(drive.base, "qcow2", readonly=True) if drive.base else None
        if drive.base:
            node["backing"]["backing"] = None
    node["node-name"] = name(number)
    if not drive.readonly:
        node |= {"discard": "unmap", "detect-zeroes": "unmap"}
    if (machine.iops or machine.bytes_per_second) and not drive.cdrom:
        outer = {"driver": "throttle", "node-name": f"limited{number}", "throttle-group": "limits"}
        return outer | {"file": node}
    return node


def _format(path: str, kind: str, *, readonly: bool) -> dict[str, Any]:
    # The engine's own lock on a workload is enough; a base is many machines' at once.
    file: dict[str, Any] = {"driver": "file", "filename": path, "locking": "off"}
    if not readonly:
        file["discard"] = "unmap"
    return {"driver": kind, "read-only": readonly, "file": file | {"read-only": readonly}}


def name(number: int) -> str:
    """The block node of disk `number`, for commands on it."""
    return f"disk{number}"


def _device(drive: Drive, node: str, number: int, port: int) -> str:
    """The disk in front of block node `node`; on SATA port `port` unless that is negative."""
    if port < 0:
        return f"virtio-blk-pci,drive={node},bootindex={number}"
    return f"{'ide-cd' if drive.cdrom else 'ide-hd'},drive={node},bus=ide.{port},bootindex={number}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
