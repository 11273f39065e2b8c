"""The microVM boundary: a Linux kernel of the workload's own on QEMU's smallest machine.

KVM executes it where /dev/kvm works, else QEMU's translator, which probe() and inspect say. QEMU
runs in a jail (jail.py) without any capability, with a user id of its own; kernel and initramfs are
files of that jail, layers its read-only disks, one ext4 image its writable one.
"""

import asyncio
import contextlib
import dataclasses
import functools
import glob
import hashlib
import math
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.boundaries import microvm_syscalls
from bulkhead.boundaries.container import ContainerBoundary
from bulkhead.boundaries.guest import disks, hotplug, initramfs, kernels, plan
from bulkhead.boundaries.guest.cards import Cards
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    OPTIONAL,
    GuestBoundary,
    Prepared,
    native_program,
)
from bulkhead.boundaries.jail import Jail, JailRoot, jail_bundle, uid_of
from bulkhead.boundaries.vmm import balloon, hot, images, plugs, qemu, templates, training
from bulkhead.boundaries.vmm.acceleration import acceleration, tsc_khz
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, Launcher, Missing, Report, Rootfs, Stdio
from bulkhead.errors import BulkheadError, Conflict, Invalid, Unavailable, Unsupported
from bulkhead.home import Home
from bulkhead.linux import netns, sparse
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.tap import open_tap
from bulkhead.oci.runtime import Device, Linux, Spec

KERNEL = "/boot/kernel"
INITRAMFS = "/boot/initramfs"
FIRMWARE = "/usr/share/qemu/bios-microvm.bin"
"""QEMU's own: some instructions that enter the kernel."""
EARLY = ("virtio_mmio", "virtio_console")
"""Modules that the guest's init needs before it can speak."""
MODULES = ("virtio_blk", "virtio_net", "virtio_balloon", "erofs", "overlay", "fuse")
CHANNEL_FD = 9
FIRST_TAP_FD = 11
DEFAULT_MEMORY = 256 << 20
OVERHEAD = 160 << 20
"""Bytes of QEMU itself, its translated code and the monitor."""
_NO_ADDRESS = "02:00:00:00:00:00"
SAVED_IMAGE, SAVED_DISK = "machine.image", "disk.ext4"
"""What a snapshot's directory has."""
_FORGET_S = 30.0
_SCRATCH = 64 << 20
_TRANSLATOR = "/usr/lib/*/qemu/accel-tcg-x86_64.so"
_TASKS = 80
"""QEMU's threads: one per processor, and up to 64 that do its disks' work."""


class MicrovmBoundary(GuestBoundary):
    """Runs workloads on QEMU's microvm machine."""

    name = "microvm"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self.templates = templates.Templates(services.home)

    def probe(self) -> Report:
        """Whether the parts are there; that they work is seen at the first start."""
        missing: list[Missing] = []
        facts: dict[str, str] = {}
        if os.uname().machine != "x86_64":
            missing.append(Missing("an x86-64 host", "no microVM on other processors yet"))
        if shutil.which(qemu.BINARY) is None:
            missing.append(Missing("QEMU", "apt-get install qemu-system-x86"))
        elif not os.path.exists(FIRMWARE):
            missing.append(Missing(FIRMWARE, "apt-get install qemu-system-data"))
        try:
            facts["kernel"] = _kernel(self, "").release
        except BulkheadError as error:
            missing.append(Missing(str(error), "bulkhead kernel pull cloud"))
        found = acceleration()
        facts["acceleration"] = f"{found.name} ({found.reason})" if found.reason else found.name
        return Report(self.name, not missing, tuple(missing), OPTIONAL, facts)

    def shape(self, bundle: Bundle, *, terminal: bool) -> Jail:
        """Sizes and filter of the jail."""
        resources = bundle.spec.linux.resources
        memory = resources.memory if resources is not None else None
        limit = memory.limit if memory is not None and memory.limit else 0
        size = limit if limit > 0 else DEFAULT_MEMORY
        if size < qemu.MIN_MEMORY:
            raise Invalid(
                f"a microVM has a kernel of its own: --memory must be at least "
                f"{qemu.MIN_MEMORY >> 20}m"
            )
        devices = []
        if acceleration().name == "kvm":
            devices.append(Device("/dev/kvm", "c", 10, 232, file_mode=0o666))
        return Jail(
            root=JailRoot("", ""),
            args=(),
            seccomp=microvm_syscalls.profile(),
            disks=(),
            guest_bytes=size >> 20 << 20,
            overhead_bytes=OVERHEAD,
            tasks=_TASKS,
            terminal=terminal,
            devices=devices,
        )

    def save(self, bundle: Bundle, pid: int, directory: str) -> None:
        """Write the image of QEMU's process, and with it standing still copy the disk."""
        disk = bundle.rootfs.disk
        if acceleration().name == "kvm" or disk is None:
            raise Unsupported("a microVM that KVM executes cannot be saved yet")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        scratch = f"{directory}/{SAVED_IMAGE}.new"
        with contextlib.ExitStack() as undo:
            image = undo.enter_context(OwnedFd(os.open(scratch, flags, 0o600)))
            undo.callback(os.unlink, scratch)
            images.take(
                pid,
                int(image),
                images.GO_ON,
                meanwhile=lambda: sparse.copy_file(disk, f"{directory}/{SAVED_DISK}", 0o600),
            )
            # QEMU has had that file open, and goes on: what it could still write is no snapshot.
            sparse.copy_file(scratch, f"{directory}/{SAVED_IMAGE}", 0o600)

    def plugs(self, pid: int, cards: int) -> hotplug.Plugs:
        """The places of its template that are empty."""
        return plugs.Plugs(pid, cards, control_fd(cards))

    def cards(self, pid: int, cards: int) -> Cards:
        """The spare cards of its template."""
        return plugs.Cards(pid, cards, control_fd(cards))

    def resize(self, pid: int, cards: int, memory_bytes: int) -> None:
        """By the balloon, whose driver is bound at its first use.

        Under pressure inside the balloon gives way (deflate-on-oom): nothing is killed for it.
        """
        with contextlib.suppress(Unsupported):
            balloon.resize(pid, cards, control_fd(cards), max(memory_bytes, qemu.MIN_MEMORY))

    def given_back(self, pid: int, cards: int, memory_bytes: int) -> int:
        """What is in the balloon."""
        with (
            contextlib.suppress(Unsupported, Unavailable),
            hot.Control(pid, control_fd(cards)) as control,
        ):
            return max(0, memory_bytes - control.memory())
        return 0

    async def ready(self, bundle: Bundle) -> None:
        """Have a template to clone from."""
        parts = await asyncio.to_thread(self._parts, bundle)
        maker = TemplateMaker(self.home, self.container, self.launcher)
        cards = parts.key.cards
        writable, readonly = (_device(cards, place) for place in (0, qemu.WRITABLE))
        await self.templates.ensure(
            parts.key,
            lambda: training.lesson(parts.later, cards, writable, readonly),
            functools.partial(maker.boot, bundle, parts),
        )

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the machine is made of."""
        parts = self._parts(bundle)
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        if disk is None:
            raise Unsupported("a microVM needs a place for its disk")
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid_of(bundle.id))
        volumes = plan.volume_disks(bundle, str).files
        files = [(path, False) for path in layers] + [(disk, True), *volumes]
        parts = dataclasses.replace(
            parts, jail=dataclasses.replace(parts.jail, disks=files, terminal=terminal)
        )
        if bundle.saved:
            flags = os.O_RDONLY | os.O_CLOEXEC
            with OwnedFd(os.open(f"{bundle.saved}/{SAVED_IMAGE}", flags)) as image:
                return _resumed(bundle, parts, templates.Template(image))
        template = self.templates.find(parts.key)
        if template is None:
            return _booted(bundle, parts)
        return _cloned(bundle, parts, template)

    def _parts(self, bundle: Bundle) -> "Parts":
        kernel = _kernel(self, bundle.kernel)
        layers, cards = bundle.rootfs.layer_files, len(bundle.nics)
        if not layers:
            raise Unsupported("a microVM needs an image of layers, not an unpacked root")
        room = qemu.max_disks(cards)
        if len(layers) + 1 > room:
            raise Unsupported(
                f"the image has {len(layers)} layers; a microVM takes at most {room - 1}"
            )
        early = kernel.module_files(EARLY)
        modules = kernel.module_files((*EARLY, *MODULES))
        ramdisk = initramfs.build(self.home, native_program("bulkhead-guest"), modules, early=early)
        programs = {qemu.BINARY: qemu.BINARY, MONITOR: native_program("bulkhead-monitor")}
        programs[images.THAW] = native_program("bulkhead-thaw")
        # Where the translator is not built in, QEMU looks for it beside its libraries.
        programs |= {path: path for path in glob.glob(_TRANSLATOR)}
        root = self.roots.make(
            "microvm",
            programs,
            {
                KERNEL: kernel.path,
                INITRAMFS: ramdisk.path,
                FIRMWARE: os.path.realpath(FIRMWARE),
                images.CAPTURE: native_program("libbulkhead-capture.so"),
                "/proc/empty": b"",
            },
        )
        jail = dataclasses.replace(self.shape(bundle, terminal=False), root=root)
        later = [
            name
            for name, source in zip(ramdisk.modules, modules, strict=True)
            if source not in early
        ]
        # The root's name is a hash of kernel, initramfs and QEMU.
        key = templates.Key(
            root.directory, jail.guest_bytes, cards, processors(bundle), acceleration().name
        )
        key = dataclasses.replace(key, command=_command(key))
        return Parts(jail, tuple(later), key)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a machine is made of; `key` is that of its template."""

    jail: Jail
    later: tuple[str, ...]
    """Modules that are loaded after the init's greeting."""
    key: templates.Key


@dataclass(frozen=True, slots=True)
class TemplateMaker:
    """Boots machines for templates, each in a jail of its own, like any microVM."""

    home: Home
    container: ContainerBoundary
    launcher: Launcher

    async def boot(
        self,
        bundle: Bundle,
        parts: Parts,
        channel: socket.socket,
        control: socket.socket,
        peer: socket.socket,
        memory: OwnedFd,
    ) -> templates.Booted:
        """Start the machine that `parts.key` describes (templates.Boot)."""
        key, identity = parts.key, f"template-{os.urandom(8).hex()}"
        directory = self.home.in_run("templates", identity)
        parent = os.path.dirname(bundle.spec.linux.cgroups_path) or "/bulkhead"
        own = Bundle(
            identity, Spec(linux=Linux(cgroups_path=f"{parent}/{identity}")), Rootfs(), directory
        )
        async with contextlib.AsyncExitStack() as undo:
            os.makedirs(directory, mode=0o700)
            undo.callback(shutil.rmtree, directory)
            taps = []
            for number in range(key.cards if key.imaged else 0):
                taps.append(undo.enter_context(await asyncio.to_thread(_idle_tap, number)))
            fds = [channel.fileno(), control.fileno(), peer.fileno()]
            fds += [int(tap) for tap in taps] if key.imaged else [int(memory)]
            console = undo.enter_context(OwnedFd(os.memfd_create("console", os.MFD_CLOEXEC)))
            files = await asyncio.to_thread(self._scratch, directory, identity)
            jail = dataclasses.replace(
                parts.jail,
                disks=files,
                args=qemu.argv(_template_machine(key)),
                mounts=[templates.PROC],
                environment=images.environment() if key.imaged else (),
                terminal=False,
            )
            container = await self.container.create(jail_bundle(own, jail, tuple(fds)))
            undo.push_async_callback(container.delete, force=True)
            launched = await container.start(Stdio(stdout=int(console), stderr=int(console)))
            undo.push_async_callback(self._forget, identity)
            # Until no mapping of the template's memory is left.
            undo.push_async_callback(asyncio.to_thread, container.group.kill)
            kept = undo.pop_all()

        async def end() -> str:
            async with kept:
                return os.pread(int(console), 4096, 0).decode("utf-8", "replace").strip()

        used = [qemu.Disk(f"/disks/{n}", not writable) for n, (_, writable) in enumerate(files)]
        return templates.Booted(launched.pid, tuple(used), end)

    def _scratch(self, directory: str, identity: str) -> list[tuple[str, bool]]:
        """Disks for the lesson: one to write to, one with a layer."""
        writable, readonly = f"{directory}/disk.ext4", f"{directory}/layer.erofs"
        disks.make_disk(self.home, writable, _SCRATCH, uid=uid_of(identity))
        with open(native_program("bulkhead-guest"), "rb") as program:
            made = training.layer(program.read())
        with open(readonly, "xb") as layer:
            layer.write(made)
        return [(writable, True), (readonly, False)]

    async def _forget(self, identity: str) -> None:
        deadline = time.monotonic() + _FORGET_S
        while True:
            try:
                await self.launcher.forget(identity)
                return
            except Conflict:  # its end has not been noticed yet
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.01)


def _idle_tap(number: int) -> OwnedFd:
    """A tap that is connected to nothing."""
    with netns.create() as namespace:
        return netns.inside(int(namespace), lambda: open_tap(f"tap{number}"))


def _template_machine(key: templates.Key) -> qemu.Machine:
    taps = range(images.FIRST_TAP, images.FIRST_TAP + key.cards) if key.imaged else [-1] * key.cards
    return qemu.Machine(
        kernel=KERNEL,
        initramfs=INITRAMFS,
        channel_fd=images.CHANNEL,
        control_fd=images.CONTROL,
        memory_file="" if key.imaged else f"/proc/self/fd/{images.FIRST_TAP}",
        memory_shared=True,
        memory_bytes=key.memory_bytes,
        vcpus=key.vcpus,
        cards=[qemu.Card(tap, _NO_ADDRESS) for tap in taps],
        disks=[None] * qemu.max_disks(key.cards),
        accelerator=key.accelerator,
        tsc_khz=tsc_khz(),
        confined=not key.imaged,
    )


@functools.lru_cache(maxsize=64)
def _command(key: templates.Key) -> str:
    """A hash of its template's command line, without the host's clock rate, which is measured."""
    machine = dataclasses.replace(_template_machine(key), tsc_khz=1)
    return hashlib.sha256(repr(qemu.argv(machine)).encode()).hexdigest()


def _booted(bundle: Bundle, parts: Parts) -> Prepared:
    machine = _machine(bundle, parts)
    made = dataclasses.replace(parts.jail, args=qemu.argv(machine))
    return Prepared(made, _described(bundle, parts, None))


def _cloned(bundle: Bundle, parts: Parts, template: templates.Template) -> Prepared:
    cards = len(bundle.nics)
    machine = _machine(bundle, parts)
    found = [disk for disk in machine.disks if disk is not None]
    places = qemu.places(found, cards)
    first = FIRST_TAP_FD + cards
    if template.state is None:
        orders = images.orders(dict(zip(places, found, strict=True)))
        fds = templates.clone_image(template, orders)
        args = images.argv(first, _given(cards, first))
    else:
        clone = templates.clone(template, first)
        fds = clone.fds
        placed: list[qemu.Disk | None] = [None] * qemu.max_disks(cards)
        for place, disk in zip(places, found, strict=True):
            placed[place] = disk
        args = qemu.argv(
            dataclasses.replace(
                machine,
                disks=placed,
                memory_file=clone.memory_file,
                control_fd=clone.control_fd,
                incoming=True,
            )
        )
    made = dataclasses.replace(parts.jail, args=args, mounts=[templates.PROC])
    return Prepared(made, _described(bundle, parts, places), ("--clone",), fds, places)


def control_fd(cards: int) -> int:
    """Where the machine monitor of a clone has the other end of its control socket."""
    found = acceleration().name == "tcg"
    return images.CONTROL_PEER if found else FIRST_TAP_FD + cards + 3


def _device(cards: int, place: int) -> str:
    """The guest's name for the disk in that place of a template, on its virtio bus."""
    return f"virtio{qemu.bus_of_disk(cards, place)}"


def _resumed(bundle: Bundle, parts: Parts, saved: templates.Template) -> Prepared:
    """A machine that goes on: it has its disks open by the names that they have in this jail."""
    cards = len(bundle.nics)
    first = FIRST_TAP_FD + cards
    fds = templates.clone_image(saved, images.orders({}))
    args = images.argv(first, _given(cards, first))
    made = dataclasses.replace(parts.jail, args=args, mounts=[templates.PROC])
    disks_ = [qemu.Disk(path, not writable) for path, writable in parts.jail.disks]
    taken = qemu.places(disks_, cards)
    return Prepared(made, _described(bundle, parts, None), ("--resume",), fds, taken)


def _given(cards: int, first: int) -> dict[int, int]:
    """Where a clone has what its image has elsewhere; `first`: the image, QMP, QMP's other end."""
    given = {images.CHANNEL: CHANNEL_FD, images.CONTROL: first + 1}
    given[images.CONTROL_PEER] = first + 2
    return given | {images.FIRST_TAP + n: FIRST_TAP_FD + n for n in range(cards)}


def _described(bundle: Bundle, parts: Parts, places: Sequence[int] | None) -> plan.Machine:
    """What the guest is told of its machine; `places` of its disks, in a clone."""
    cards = len(bundle.nics)
    names = qemu.disk_names(len(parts.jail.disks))
    count = len(bundle.rootfs.layer_files)
    devices: list[tuple[str, str]] = []
    if places is not None:
        # The port, which is bound, is virtio0.
        devices += [("virtio_net", f"virtio{number}") for number in range(1, cards + 1)]
        devices += [("virtio_blk", _device(cards, place)) for place in places]
    return plan.Machine(
        modules=parts.later if places is None else (),
        devices=tuple(devices),
        layers=tuple(names[:count]),
        upper=names[count],
        sources=plan.volume_disks(bundle, lambda number: names[count + 1 + number]).sources,
        interfaces=tuple(f"eth{number}" for number in range(cards)),
    )


def _kernel(boundary: GuestBoundary, name: str) -> kernels.Kernel:
    """A kernel that QEMU can enter; Unsupported or NotFound say what to do."""
    kernel = kernels.find(boundary.home, name or kernels.CLOUD)
    if kernel.kind != "linux":
        raise Unsupported(
            f"the microvm boundary boots kernels for machines, and {kernel.name} is "
            "user-mode-linux: --boundary sandbox"
        )
    return kernel


def _machine(bundle: Bundle, parts: Parts) -> qemu.Machine:
    """The machine of a workload, as its jail sees it."""
    found = acceleration()
    files = [
        qemu.Disk(f"/disks/{number}", readonly=not writable)
        for number, (_, writable) in enumerate(parts.jail.disks)
    ]
    cards = [qemu.Card(FIRST_TAP_FD + number, nic.mac) for number, nic in enumerate(bundle.nics)]
    return qemu.Machine(
        kernel=KERNEL,
        initramfs=INITRAMFS,
        channel_fd=CHANNEL_FD,
        disks=files,
        cards=cards,
        memory_bytes=parts.jail.guest_bytes,
        vcpus=parts.key.vcpus,
        accelerator=found.name,
        tsc_khz=tsc_khz() if found.name == "tcg" else 0,
    )


def processors(bundle: Bundle) -> int:
    """As many as --cpus asks for, rounded up, at most the host's; one if it does not."""
    resources = bundle.spec.linux.resources
    cpu = resources.cpu if resources is not None else None
    if cpu is None or not cpu.quota or cpu.quota < 0:
        return 1
    wanted = math.ceil(cpu.quota / (cpu.period or 100_000))
    return max(1, min(wanted, os.cpu_count() or 1))
