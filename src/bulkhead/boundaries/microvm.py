"""The microVM boundary: a Linux kernel of the workload's own on QEMU's smallest machine.

KVM executes it where /dev/kvm works, else QEMU's translator, which probe() and inspect say. QEMU
runs in a jail (jail.py) without any capability, with a user id of its own; kernel and initramfs are
files of that jail, layers its read-only disks, one ext4 image its writable one.
"""

import dataclasses
import glob
import math
import os
import shutil

from bulkhead.boundaries import microvm_syscalls
from bulkhead.boundaries.guest import disks, initramfs, kernels, plan
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    OPTIONAL,
    GuestBoundary,
    Prepared,
    native_program,
)
from bulkhead.boundaries.jail import Jail, JailRoot, uid_of
from bulkhead.boundaries.vmm import qemu
from bulkhead.boundaries.vmm.acceleration import acceleration, tsc_khz
from bulkhead.boundary.seam import Bundle, Missing, Report
from bulkhead.errors import BulkheadError, Invalid, Unsupported
from bulkhead.oci.runtime import Device

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
_TRANSLATOR = "/usr/lib/*/qemu/accel-tcg-x86_64.so"
_TASKS = 80
"""QEMU's threads: one per processor, and up to 64 that do its disks' work."""


class MicrovmBoundary(GuestBoundary):
    """Runs workloads on QEMU's microvm machine."""

    name = "microvm"

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

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the machine is made of."""
        kernel = _kernel(self, bundle.kernel)
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        if not layers or disk is None:
            raise Unsupported("a microVM needs an image of layers, not an unpacked root")
        room = qemu.max_disks(len(bundle.nics)) - 1
        if len(layers) > room:
            raise Unsupported(f"the image has {len(layers)} layers; a microVM takes at most {room}")
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid_of(bundle.id))
        early = kernel.module_files(EARLY)
        modules = kernel.module_files((*EARLY, *MODULES))
        ramdisk = initramfs.build(self.home, native_program("bulkhead-guest"), modules, early=early)
        programs = {qemu.BINARY: qemu.BINARY, MONITOR: native_program("bulkhead-monitor")}
        # Where the translator is not built in, QEMU looks for it beside its libraries.
        programs |= {path: path for path in glob.glob(_TRANSLATOR)}
        root = self.roots.make(
            "microvm",
            programs,
            {KERNEL: kernel.path, INITRAMFS: ramdisk.path, FIRMWARE: os.path.realpath(FIRMWARE)},
        )
        files = [(path, False) for path in layers] + [(disk, True)]
        shape = self.shape(bundle, terminal=terminal)
        args = qemu.argv(machine(bundle, shape))
        made = dataclasses.replace(shape, root=root, disks=files, args=args)
        names = qemu.disk_names(len(files))
        later = [
            name for name, source in zip(ramdisk.modules, modules, strict=True)
            if source not in early
        ]  # fmt: skip
        described = plan.Machine(
            modules=tuple(later),
            layers=tuple(names[:-1]),
            upper=names[-1],
            interfaces=tuple(f"eth{number}" for number in range(len(bundle.nics))),
        )
        return Prepared(made, described)


def _kernel(boundary: GuestBoundary, name: str) -> kernels.Kernel:
    """A kernel that QEMU can enter; Unsupported or NotFound say what to do."""
    kernel = kernels.find(boundary.home, name or kernels.CLOUD)
    if kernel.kind != "linux":
        raise Unsupported(
            f"the microvm boundary boots kernels for machines, and {kernel.name} is "
            "user-mode-linux: --boundary sandbox"
        )
    return kernel


def machine(bundle: Bundle, shape: Jail) -> qemu.Machine:
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
        memory_bytes=shape.guest_bytes,
        vcpus=_processors(bundle),
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
