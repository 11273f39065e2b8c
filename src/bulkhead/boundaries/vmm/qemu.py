"""QEMU's `microvm` machine as a command line: a pure function of what the guest shall have.

The devices are the fewest that do: a virtio port for the guest protocol, network cards, disks; a
serial line that only the kernel's last words go to. Nothing is emulated that the guest does not
use: no PCI, VGA or USB, no monitor unless a template asks for one; the firmware (qboot) only enters
the kernel, which is uncompressed (PVH).

Where things are: the guest enumerates the virtio-mmio transports from the highest bus
down, and every workload has the same layout, so that a template fits all of one size:

    bus 23    virtio-serial with the port "bulkhead.0"
    bus 22…   network cards                                     eth0, eth1, …
    then      spare cards, connected with nothing               for networks of a running guest
    then      the balloon
    then      disks                                             /dev/vda, /dev/vdb, …

Disks of a booted machine are in the order of `Machine.disks`. A template has empty ones in all
places: the first WRITABLE of them can be written, the others cannot (`places`). A spare card is on
a hub, to which a tap can be led later (hot.py); a guest that was booted with KVM's saved state has
them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead.errors import Invalid, Unsupported

BINARY = "/usr/bin/qemu-system-x86_64"
_SPARE_MAC = "02:00:00:00:00:00"
PORT = "bulkhead.0"
"""The name of the virtio port that carries the guest protocol."""
TRANSPORTS = 24
MIN_MEMORY = 96 << 20
"""Bytes below which the cloud kernel does not reach its process 1."""
TRANSLATED_CODE = 128 << 20
"""Bytes that TCG may keep of translated code; a clone shares what its template had translated."""
WRITABLE = 5
"""Places of a template for disks that can be written."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""What a jailed QEMU never does: raise privileges, start processes, change others' scheduling."""
BASELINE = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+arat"
"""x86-64-v2, which today's distributions are built for, with random numbers, and with a timer that
goes on while the processor sleeps: a kernel without one ticks 250 times a second for ever."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw file as a virtio disk; every path here is one inside the jail."""

    path: str
    readonly: bool


@dataclass(frozen=True, slots=True)
class Card:
    """A network card on a tap device (-1: on nothing), which tells QEMU whether it has headers."""

    tap_fd: int
    mac: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that a microVM is made of.

    Descriptors are numbers in the process that becomes QEMU. `memory_file`: guest memory is this
    file; what the guest writes stays in memory (MAP_PRIVATE) unless `memory_shared`. `control_fd`:
    a socket on which QMP is spoken. `incoming`: wait for the state of a saved guest. None among
    the disks: a place for one. Without `confined` QEMU has no filter of its own.
    """

    kernel: str
    initramfs: str
    channel_fd: int
    disks: Sequence[Disk | None] = ()
    memory_bytes: int = 256 << 20
    vcpus: int = 1
    accelerator: str = "tcg"
    tsc_khz: int = 0
    cards: Sequence[Card] = ()
    memory_file: str = ""
    memory_shared: bool = False
    control_fd: int = -1
    incoming: bool = False
    confined: bool = True
    binary: str = BINARY

    @property
    def spares(self) -> int:
        """How many spare cards it has."""
        return spares(len(self.cards))


def argv(machine: Machine) -> list[str]:
    """QEMU's command line; Invalid or Unsupported for what no microVM can be."""
    _check(machine)
    words = [machine.binary, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    if machine.confined:
        words += ["-sandbox", SANDBOX]
    words += ["-name", "bulkhead,process=qemu"]
    words += _board(machine)
    if not machine.incoming:
        # A saved guest has them in its memory; QEMU would read 55 MB of files for nothing.
        words += ["-kernel", machine.kernel, "-initrd", machine.initramfs]
        words += ["-append", command_line(machine)]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=channel,fd={machine.channel_fd}"]
    words += ["-device", f"virtio-serial-device,max_ports=2,{_bus(0)}"]
    words += ["-device", f"virtserialport,chardev=channel,name={PORT}"]
    for number, card in enumerate(machine.cards):
        device = f"virtio-net-device,mac={card.mac},{_bus(1 + number)}"
        if card.tap_fd >= 0:
            words += ["-netdev", f"tap,id=net{number},fd={card.tap_fd}"]
            device += f",netdev=net{number}"
        words += ["-device", device]
    for number in range(machine.spares):
        words += ["-netdev", f"hubport,id=spare{number},hubid={hub(number)}"]
        device = f"virtio-net-device,mac={_SPARE_MAC},netdev=spare{number}"
        words += ["-device", f"{device},{_bus(1 + len(machine.cards) + number)}"]
    balloon = "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on"
    words += ["-device", f"{balloon},{_bus(1 + len(machine.cards) + machine.spares)}"]
    for place in range(len(machine.disks)):
        words += _disk(machine, place)
    if machine.control_fd >= 0:
        words += ["-chardev", f"socket,id=control,fd={machine.control_fd}"]
        words += ["-mon", "chardev=control,mode=control"]
    if machine.incoming:
        words += ["-incoming", "defer"]
    return words


def _check(machine: Machine) -> None:
    count, room = len(machine.disks), max_disks(len(machine.cards))
    if count > room:
        raise Unsupported(
            f"a microVM with {len(machine.cards)} network cards has at most {room} disks, "
            f"{count} are needed"
        )
    if machine.memory_bytes < MIN_MEMORY:
        raise Invalid(
            f"a microVM needs at least {MIN_MEMORY >> 20} MiB of memory, not "
            f"{machine.memory_bytes >> 20}: give --memory {MIN_MEMORY >> 20}m or more"
        )
    if machine.accelerator not in ("kvm", "tcg"):
        raise Invalid(f"unknown accelerator {machine.accelerator!r}; there are kvm and tcg")
    if machine.vcpus < 1:
        raise Invalid(f"{machine.vcpus} processors")
    for disk in machine.disks:
        if disk is not None and "," in disk.path:
            raise Invalid(f"a disk's path may not contain a comma: {disk.path}")


def _board(machine: Machine) -> list[str]:
    # ACPI: the distribution's kernel finds virtio-mmio devices no other way. The clock chip: a
    # kernel that finds none waits for it, busily, for a second and a half.
    board = "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,ioapic2=on"
    board += ",auto-kernel-cmdline=off,x-option-roms=off,mem-merge=off"
    size = machine.memory_bytes >> 20
    words = []
    if machine.memory_file:
        share = "on" if machine.memory_shared else "off"
        words += [
            "-object",
            f"memory-backend-file,id=memory,size={size}M,mem-path={machine.memory_file},share={share}",
        ]
        board += ",memory-backend=memory"
    words += ["-M", board, "-m", f"{size}M", "-smp", str(machine.vcpus)]
    if machine.accelerator == "kvm":
        return [*words, "-accel", "kvm", "-cpu", "host"]
    threads = "multi" if machine.vcpus > 1 else "single"
    tcg = f"tcg,thread={threads},tb-size={TRANSLATED_CODE >> 20}"
    return [*words, "-accel", tcg, "-cpu", BASELINE]


def command_line(machine: Machine) -> str:
    """The kernel's: what it would look for and not find is named, so that it does not look.

    Mitigations are left as the kernel chooses them.
    """
    words = [
        "console=ttyS0 quiet loglevel=3 panic=-1 8250.nr_uarts=1",
        f"nr_cpus={machine.vcpus}",
        "pci=off audit=0 apparmor=0 nowatchdog cryptomgr.notests random.trust_cpu=on",
        # No policies of SELinux or TOMOYO come here. Ten thousand instructions with a LOCK prefix
        # need not be rewritten for one processor: a translator does them alike.
        "lsm=landlock,lockdown,yama,integrity,bpf noreplace-smp",
    ]
    if machine.accelerator == "tcg":
        # The emulated processor counts in the host's clock, but has no timer to measure it by.
        # Without a real address space layout there is nothing to gain from moving the kernel.
        words.append(f"nokaslr tsc=reliable tsc_early_khz={machine.tsc_khz}")
    return " ".join(words)


def _bus(place: int) -> str:
    return f"bus=virtio-mmio-bus.{TRANSPORTS - 1 - place}"


def _disk(machine: Machine, place: int) -> list[str]:
    disk = machine.disks[place]
    if disk is None:
        readonly = place >= WRITABLE
        node: dict[str, Any] = {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}
        node |= {"read-only": readonly, "node-name": empty_name(place)}
    else:
        node = disk_node(disk, place)
    words = ",".join(f"{name}={_option(value)}" for name, value in node.items())
    device = f"virtio-blk-device,id={device_name(place)},drive={node['node-name']},"
    bus = _bus(bus_of_disk(len(machine.cards), place))
    return ["-blockdev", words, "-device", device + bus]


def spares(cards: int) -> int:
    """How many spare cards a machine with `cards` network cards has."""
    return max(1, 3 - cards) if cards else 0


def hub(number: int) -> int:
    """The hub that spare card `number` is on."""
    return number


def bus_of_card(number: int) -> int:
    """The place on the virtio bus of a card; the spare ones come after the others."""
    return 1 + number


def bus_of_balloon(cards: int) -> int:
    """That of the balloon."""
    return 1 + cards + spares(cards)


def bus_of_disk(cards: int, place: int) -> int:
    """That of the disk in `place`."""
    return bus_of_balloon(cards) + 1 + place


def disk_node(disk: Disk, place: int) -> dict[str, Any]:
    """The block node of a disk, as `blockdev-add` takes it."""
    name = disk_name(place)
    node: dict[str, Any] = {"driver": "file", "node-name": name, "filename": disk.path}
    # The engine's own lock on a workload is enough; layers are many guests' at once.
    node |= {"read-only": disk.readonly, "locking": "off"}
    if not disk.readonly:
        node["discard"] = "unmap"
    return node


def disk_name(place: int) -> str:
    """The block node of the disk in that place."""
    return f"disk{place}"


def empty_name(place: int) -> str:
    """The block node of a place without a disk."""
    return f"empty{place}"


def device_name(place: int) -> str:
    """QEMU's name of the disk device in that place."""
    return f"blk{place}"


def _option(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def places(disks: Sequence[Disk], cards: int) -> list[int]:
    """Where in a template these disks go; Unsupported if there is no room."""
    room = {False: iter(range(WRITABLE)), True: iter(range(WRITABLE, max_disks(cards)))}
    try:
        return [next(room[disk.readonly]) for disk in disks]
    except StopIteration:
        raise Unsupported(
            f"a microVM with {cards} network cards has room for {WRITABLE} disks and "
            f"{max_disks(cards) - WRITABLE} layers"
        ) from None


def max_disks(cards: int) -> int:
    """How many disks there is room for beside `cards` network cards."""
    return TRANSPORTS - bus_of_disk(cards, 0)


def disk_names(count: int) -> list[str]:
    """The guest's device files of the first `count` disks."""
    return [f"/dev/vd{chr(ord('a') + place)}" for place in range(count)]
