"""Disks of a microVM that runs (guest/hotplug.py): the empty places of its template."""

import string
from collections.abc import Sequence

from bulkhead.boundaries.guest import hotplug, link
from bulkhead.boundaries.vmm import hot, qemu

_BUS = "/sys/bus/virtio"


class Plugs:
    """The places of the machine in the jail of process `pid`, with `cards` cards of its start."""

    def __init__(self, pid: int, cards: int, control_fd: int) -> None:
        self._pid, self._cards, self._control_fd = pid, cards, control_fd

    def slots(self, *, writable: bool) -> Sequence[int]:
        """Those that can be written come first."""
        if writable:
            return range(qemu.WRITABLE)
        return range(qemu.WRITABLE, qemu.max_disks(self._cards))

    def add(self, slot: int, path: str, *, writable: bool) -> str:
        """The kernel looks at a disk when its driver is bound, and then names it."""
        with hot.Control(self._pid, self._control_fd) as control:
            control.add_disk(slot, qemu.Disk(path, not writable))
        device = self._device(slot)
        with link.Link(self._pid) as connection:
            values = [(f"{_BUS}/drivers/virtio_blk/bind", device)]
            connection.set_up(link.settings(values))
        names = [f"vd{letter}" for letter in string.ascii_lowercase]
        block = f"{_BUS}/devices/{device}/block"
        known = [(f"{block}/{name}/size", f"/dev/{name}") for name in names]
        return hotplug.appeared(self._pid, known)

    def remove(self, slot: int) -> None:
        """Let go of it inside, then outside."""
        with link.Link(self._pid) as connection:
            values = [(f"{_BUS}/drivers/virtio_blk/unbind", self._device(slot))]
            connection.set_up(link.settings(values, absent=True))
        with hot.Control(self._pid, self._control_fd) as control:
            control.remove_disk(slot)

    def _device(self, slot: int) -> str:
        return f"virtio{qemu.bus_of_disk(self._cards, slot)}"
