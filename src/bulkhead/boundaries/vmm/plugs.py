"""Disks and cards of a microVM that runs (guest/hotplug.py, cards.py): its empty places."""

import string
from collections.abc import Sequence

from bulkhead.boundaries.guest import hotplug, link
from bulkhead.boundaries.vmm import hot, qemu
from bulkhead.boundary.seam import Nic
from bulkhead.linux.fds import OwnedFd

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


class Cards:
    """The spare cards of that machine, each on a hub of its own."""

    lasting = True

    def __init__(self, pid: int, cards: int, control_fd: int) -> None:
        self._pid, self._cards, self._control_fd = pid, cards, control_fd
        self.spares: Sequence[int] = range(qemu.spares(cards))

    def spare_tap(self, number: int) -> OwnedFd | None:
        """Any tap will do."""
        return None

    def add(self, number: int, nic: Nic) -> str:
        """The tap on the hub, the driver on the card."""
        with hot.Control(self._pid, self._control_fd) as control:
            control.connect_card(number, int(nic.tap))
        device = self._device(self._cards + number)
        with link.Link(self._pid) as connection:
            values = [(f"{_BUS}/drivers/virtio_net/bind", device)]
            connection.set_up(link.settings(values))
        names = [f"eth{one}" for one in range(16)]
        place = f"{_BUS}/devices/{device}/net"
        return hotplug.appeared(self._pid, [(f"{place}/{one}/address", one) for one in names])

    def remove(self, number: int) -> None:
        """The other way."""
        self.unplug(self._cards + number)
        with hot.Control(self._pid, self._control_fd) as control:
            control.disconnect_card(number)

    def unplug(self, index: int) -> None:
        """Without a driver it is no interface of the guest."""
        with link.Link(self._pid) as connection:
            values = [(f"{_BUS}/drivers/virtio_net/unbind", self._device(index))]
            connection.set_up(link.settings(values, absent=True))

    def _device(self, index: int) -> str:
        return f"virtio{qemu.bus_of_card(index)}"
