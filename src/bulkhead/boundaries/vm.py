"""The VM boundary: a PC (QEMU's q35) in a jail, with a whole machine's devices.

A workload with an image gets the same init and protocol as a microVM's, on PCI devices; one with a
machine of its own (Bundle.machine) boots from its own disks.
"""

import os
import shutil

from bulkhead.boundaries import vm_machine
from bulkhead.boundaries.guest.instance import OPTIONAL, GuestBoundary, Prepared
from bulkhead.boundaries.jail import Jail, jail_bundle
from bulkhead.boundaries.vmm import qemu
from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.boundary.seam import Bundle, Instance, Missing, Report
from bulkhead.errors import Unsupported


class VmBoundary(GuestBoundary):
    """Runs workloads on QEMU's PC."""

    name = "vm"

    def probe(self) -> Report:
        """Whether the parts are there; that they work is seen at the first start."""
        missing: list[Missing] = []
        if os.uname().machine != "x86_64":
            missing.append(Missing("an x86-64 host", "no VM on other processors yet"))
        if shutil.which(qemu.BINARY) is None:
            missing.append(Missing("QEMU", "apt-get install qemu-system-x86"))
        if shutil.which("qemu-img") is None:
            missing.append(Missing("qemu-img", "apt-get install qemu-utils"))
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

    def shape(self, bundle: Bundle, *, terminal: bool) -> Jail:
        """Sizes and filter of the jail."""
        raise Unsupported("images in a VM")

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the machine is made of."""
        raise Unsupported("images in a VM")
