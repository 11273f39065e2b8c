"""The VM boundary: a PC (QEMU's q35) in a jail, with a whole machine's devices.

A workload with an image gets the same init and protocol as a microVM's, on PCI devices, always
booted; one with a machine of its own (Bundle.machine) boots from its own disks (vm_machine.py).
"""

import dataclasses
import os
import shutil

from bulkhead.boundaries import vm_machine
from bulkhead.boundaries.guest import disks, initramfs, kernels, plan
from bulkhead.boundaries.guest.instance import MONITOR, OPTIONAL, Prepared, native_program
from bulkhead.boundaries.jail import jail_bundle, uid_of
from bulkhead.boundaries.microvm import (
    CHANNEL_FD,
    FIRST_TAP_FD,
    INITRAMFS,
    KERNEL,
    MODULES,
    MicrovmBoundary,
    processors,
)
from bulkhead.boundaries.vmm import q35, qemu
from bulkhead.boundaries.vmm.acceleration import acceleration, tsc_khz
from bulkhead.boundary.seam import Bundle, Instance, Missing, Report
from bulkhead.errors import Unsupported

EARLY = ("virtio_pci", "virtio_console")
"""Modules that the guest's init needs before it can speak."""
_PVH = "/usr/share/qemu/pvh.bin"
"""QEMU's own: how the firmware enters the kernel."""


class VmBoundary(MicrovmBoundary):
    """Runs workloads on QEMU's PC."""

    name = "vm"

    def probe(self) -> Report:
        """Whether the parts are there; that they work is seen at the first start."""
        missing: list[Missing] = []
        if os.uname().machine != "x86_64":
            missing.append(Missing("an x86-64 host", "no VM on other processors yet"))
        for program, what, package in (
            (qemu.BINARY, "QEMU", "qemu-system-x86"),
            ("qemu-img", "qemu-img", "qemu-utils"),
        ):
            if shutil.which(program) is None:
                missing.append(Missing(what, f"apt-get install {package}"))
        found = acceleration()
        facts = {"acceleration": f"{found.name} ({found.reason})" if found.reason else found.name}
        return Report(self.name, not missing, tuple(missing), OPTIONAL, facts)

    async def create(self, bundle: Bundle) -> Instance:  # type: ignore[override]
        """Make the control group of a workload; nothing runs yet."""
        if bundle.machine is None:
            return await super().create(bundle)
        inner = jail_bundle(bundle, vm_machine.shape(bundle.machine), ())
        return vm_machine.Machine(self, bundle, await self.container.create(inner))

    async def load(self, bundle: Bundle, pid: int) -> Instance:  # type: ignore[override]
        """A workload of an earlier engine."""
        if bundle.machine is None:
            return await super().load(bundle, pid)
        inner = jail_bundle(bundle, vm_machine.shape(bundle.machine), ())
        return vm_machine.Machine(self, bundle, await self.container.load(inner, pid))

    async def ready(self, bundle: Bundle) -> None:
        """Nothing: a PC is booted, never cloned."""
        return

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the machine is made of."""
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        if disk is None or not layers:
            raise Unsupported("a VM needs an image of layers, not an unpacked root")
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid_of(bundle.id))
        first_volume = len(layers) + 1
        volumes = plan.volume_disks(bundle, lambda number: _device(first_volume + number))
        files = [(path, False) for path in layers] + [(disk, True), *volumes.files]
        kernel = kernels.find(self.home, bundle.kernel or kernels.CLOUD)
        if kernel.kind != "linux":
            raise Unsupported(f"{kernel.name} is user-mode-linux: --boundary sandbox")
        early = kernel.module_files(EARLY)
        modules = kernel.module_files((*EARLY, *MODULES))
        ramdisk = initramfs.build(self.home, native_program("bulkhead-guest"), modules, early=early)
        programs = vm_machine.programs() | {MONITOR: native_program("bulkhead-monitor")}
        given: dict[str, str | bytes] = {
            KERNEL: kernel.path, INITRAMFS: ramdisk.path, _PVH: os.path.realpath(_PVH),
        }  # fmt: skip
        root = self.roots.make("vm", programs, given | vm_machine.firmware())
        shape = self.shape(bundle, terminal=terminal)
        found = acceleration()
        guest = q35.Guest(
            kernel=KERNEL,
            initramfs=INITRAMFS,
            channel_fd=CHANNEL_FD,
            disks=[(f"/disks/{number}", writable) for number, (_, writable) in enumerate(files)],
            cards=[qemu.Card(FIRST_TAP_FD + n, nic.mac) for n, nic in enumerate(bundle.nics)],
            memory_bytes=shape.guest_bytes,
            vcpus=processors(bundle),
            accelerator=found.name,
            tsc_khz=tsc_khz() if found.name == "tcg" else 0,
        )
        jail = dataclasses.replace(
            shape, root=root, disks=files, args=q35.guest_argv(guest),
            overhead_bytes=vm_machine.OVERHEAD,
        )  # fmt: skip
        described = plan.Machine(
            modules=tuple(
                name
                for name, source in zip(ramdisk.modules, modules, strict=True)
                if source not in early
            ),
            layers=tuple(_device(number) for number in range(len(layers))),
            upper=_device(len(layers)),
            interfaces=tuple(f"eth{number}" for number in range(len(bundle.nics))),
            sources=volumes.sources,
        )
        return Prepared(jail, described)


def _device(number: int) -> str:
    return f"/dev/vd{chr(ord('a') + number)}"
