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
import math
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bulkhead.boundaries import microvm_syscalls
from bulkhead.boundaries.container import ContainerBoundary
from bulkhead.boundaries.guest import disks, initramfs, kernels, plan
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    OPTIONAL,
    GuestBoundary,
    Prepared,
    native_program,
)
from bulkhead.boundaries.jail import Jail, JailRoot, jail_bundle, uid_of
from bulkhead.boundaries.vmm import qemu, templates
from bulkhead.boundaries.vmm.acceleration import acceleration, tsc_khz
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, Launcher, Missing, Report, Rootfs, Stdio
from bulkhead.errors import BulkheadError, Conflict, Invalid, Unsupported
from bulkhead.home import Home
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Device, Linux, Spec

KERNEL = "/boot/kernel"
INITRAMFS = "/boot/initramfs"
FIRMWARE = "/usr/share/qemu/bios-microvm.bin"
"""QEMU's own: some instructions that enter the kernel."""
EARLY = ("virtio_mmio", "virtio_console")
"""Modules that the guest's init needs before it can speak."""
MODULES = ("virtio_blk", "virtio_net", "erofs", "overlay", "fuse")
CHANNEL_FD = 9
FIRST_TAP_FD = 11
DEFAULT_MEMORY = 256 << 20
OVERHEAD = 160 << 20
"""Bytes of QEMU itself, its translated code and the monitor."""
_FEW = 8
"""Disks of most templates; one for more layers has all there is room for."""
_NO_ADDRESS = "02:00:00:00:00:00"
_FORGET_S = 30.0
_TRANSLATOR = "/usr/lib/*/qemu/accel-tcg-x86_64.so"
_TASKS = 80
"""QEMU's threads: one per processor, and up to 64 that do its disks' work."""


class MicrovmBoundary(GuestBoundary):
    """Runs workloads on QEMU's microvm machine."""

    name = "microvm"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self.templates = templates.Templates()

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

    async def ready(self, bundle: Bundle) -> None:
        """Have a template to clone from, unless the machine is too unusual for one."""
        parts = await asyncio.to_thread(self._parts, bundle)
        if parts.key is not None:
            maker = TemplateMaker(self.home, self.container, self.launcher)
            await self.templates.ensure(
                parts.key, parts.later, functools.partial(maker.boot, bundle, parts)
            )

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the machine is made of."""
        parts = self._parts(bundle)
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        if disk is None:
            raise Unsupported("a microVM needs a place for its disk")
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid_of(bundle.id))
        files = [(path, False) for path in layers] + [(disk, True)]
        cards = len(bundle.nics)
        template = self.templates.find(parts.key) if parts.key is not None else None
        names = qemu.disk_names(len(files))
        described = plan.Machine(
            modules=parts.later if template is None else (),
            devices=() if template is None else _devices(cards, len(files)),
            layers=tuple(names[:-1]),
            upper=names[-1],
            interfaces=tuple(f"eth{number}" for number in range(cards)),
        )
        machine = _machine(bundle, parts)
        if template is None:
            made = dataclasses.replace(parts.jail, disks=files, args=qemu.argv(machine))
            return Prepared(_with_terminal(made, terminal), described)
        clone = templates.clone(template, FIRST_TAP_FD + cards)
        machine = dataclasses.replace(
            machine,
            placeholders=parts.key.disks if parts.key is not None else 0,
            memory_file=clone.memory_file,
            control_fd=clone.control_fd,
            incoming=True,
        )
        made = dataclasses.replace(
            parts.jail, disks=files, args=qemu.argv(machine), mounts=[templates.PROC]
        )
        return Prepared(_with_terminal(made, terminal), described, ("--clone",), clone.fds)

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
        # Where the translator is not built in, QEMU looks for it beside its libraries.
        programs |= {path: path for path in glob.glob(_TRANSLATOR)}
        root = self.roots.make(
            "microvm",
            programs,
            {
                KERNEL: kernel.path,
                INITRAMFS: ramdisk.path,
                FIRMWARE: os.path.realpath(FIRMWARE),
                "/proc/empty": b"",
            },
        )
        jail = dataclasses.replace(self.shape(bundle, terminal=False), root=root)
        later = [
            name
            for name, source in zip(ramdisk.modules, modules, strict=True)
            if source not in early
        ]
        vcpus = _processors(bundle)
        key = None
        if vcpus == 1:
            # The root's name is a hash of kernel, initramfs and QEMU.
            slots = _FEW if len(layers) < _FEW else room
            key = templates.Key(
                root.directory, jail.guest_bytes, cards, min(slots, room), acceleration().name
            )
        return Parts(jail, tuple(later), vcpus, key)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a machine is made of but its disks; without `key` it is booted, not cloned."""

    jail: Jail
    later: tuple[str, ...]
    """Modules that are loaded after the init's greeting."""
    vcpus: int
    key: templates.Key | None


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
        memory: OwnedFd,
    ) -> Callable[[], Awaitable[str]]:
        """Start the machine that `parts.key` describes; the result ends it (templates.Boot)."""
        assert parts.key is not None
        identity = f"template-{os.urandom(8).hex()}"
        machine = qemu.Machine(
            kernel=KERNEL,
            initramfs=INITRAMFS,
            channel_fd=10,
            control_fd=11,
            memory_file="/proc/self/fd/12",
            memory_shared=True,
            memory_bytes=parts.key.memory_bytes,
            cards=[qemu.Card(-1, _NO_ADDRESS)] * parts.key.cards,
            placeholders=parts.key.disks,
            accelerator=parts.key.accelerator,
            tsc_khz=tsc_khz(),
        )
        jail = dataclasses.replace(
            parts.jail, args=qemu.argv(machine), mounts=[templates.PROC], terminal=False
        )
        directory = self.home.in_run("templates", identity)
        parent = os.path.dirname(bundle.spec.linux.cgroups_path) or "/bulkhead"
        own = Bundle(
            identity, Spec(linux=Linux(cgroups_path=f"{parent}/{identity}")), Rootfs(), directory
        )
        fds = (channel.fileno(), control.fileno(), int(memory))
        async with contextlib.AsyncExitStack() as undo:
            os.makedirs(directory, mode=0o700)
            undo.callback(shutil.rmtree, directory)
            console = undo.enter_context(OwnedFd(os.memfd_create("console", os.MFD_CLOEXEC)))
            container = await self.container.create(jail_bundle(own, jail, fds))
            undo.push_async_callback(container.delete, force=True)
            await container.start(Stdio(stdout=int(console), stderr=int(console)))
            undo.push_async_callback(self._forget, identity)
            # Until no mapping of the template's memory is left.
            undo.push_async_callback(asyncio.to_thread, container.group.kill)
            kept = undo.pop_all()

        async def end() -> str:
            async with kept:
                return os.pread(int(console), 4096, 0).decode("utf-8", "replace").strip()

        return end

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


def _with_terminal(jail: Jail, terminal: bool) -> Jail:
    return dataclasses.replace(jail, terminal=terminal)


def _devices(cards: int, count: int) -> tuple[tuple[str, str], ...]:
    """What to bind in a clone: the port, which is bound, is virtio0."""
    used = ["virtio_net"] * cards + ["virtio_blk"] * count
    return tuple((driver, f"virtio{number}") for number, driver in enumerate(used, start=1))


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
    count = len(bundle.rootfs.layer_files)
    files = [qemu.Disk(f"/disks/{number}", readonly=number < count) for number in range(count + 1)]
    cards = [qemu.Card(FIRST_TAP_FD + number, nic.mac) for number, nic in enumerate(bundle.nics)]
    return qemu.Machine(
        kernel=KERNEL,
        initramfs=INITRAMFS,
        channel_fd=CHANNEL_FD,
        disks=files,
        cards=cards,
        memory_bytes=parts.jail.guest_bytes,
        vcpus=parts.vcpus,
        accelerator=found.name,
        tsc_khz=tsc_khz() if found.name == "tcg" else 0,
    )


def _processors(bundle: Bundle) -> int:
    """As many as --cpus asks for, rounded up, at most the host's; one if it does not."""
    resources = bundle.spec.linux.resources
    cpu = resources.cpu if resources is not None else None
    if cpu is None or not cpu.quota or cpu.quota < 0:
        return 1
    wanted = math.ceil(cpu.quota / (cpu.period or 100_000))
    return max(1, min(wanted, os.cpu_count() or 1))
