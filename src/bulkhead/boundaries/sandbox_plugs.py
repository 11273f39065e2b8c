"""Disks and cards of a user-mode-linux that runs (guest/hotplug.py, cards.py): its console.

The console is a socket in the jail's /tmp; a request is one datagram, and so is its answer
(arch/um/drivers/mconsole.h of the kernel).
"""

import os
import socket
import struct
from collections.abc import Sequence

from bulkhead.boundaries.guest import hotplug
from bulkhead.boundary.seam import Nic
from bulkhead.errors import Unavailable
from bulkhead.linux import netns, openat2, pidfd
from bulkhead.linux.fds import OwnedFd

SLOTS = 16
PLACE = "tmp/guest/mconsole"
"""Of the console, in the jail."""
_HEAD = struct.Struct("<III")
_ANSWER = struct.Struct("<iii")
_MAGIC, _VERSION, _ROOM = 0xCAFEBABE, 2, 512
_ANSWER_S = 20.0
SPARES = 3
"""Taps without an interface that a kernel is started with: for networks of a running guest."""


def order(pid: int, words: str) -> None:
    """Have the kernel in the jail of process `pid` do it; Unavailable with its words if not."""
    try:
        with _socket(pid) as connection:
            connection.settimeout(_ANSWER_S)
            with (
                OwnedFd(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)) as root,
                openat2.openat2(int(root), PLACE, os.O_PATH, openat2.IN_ROOT) as place,
            ):
                data = words.encode().ljust(_ROOM, b"\0")
                request = _HEAD.pack(_MAGIC, _VERSION, len(words)) + data
                connection.sendto(request, f"/proc/self/fd/{int(place)}")
            answer = connection.recv(4096)
    except OSError as error:
        raise Unavailable(f"the guest's console: {words}: {error}") from error
    if len(answer) < _ANSWER.size or _ANSWER.unpack_from(answer)[0]:
        said = answer[_ANSWER.size :].rstrip(b"\0").decode("utf-8", "replace")[:200]
        raise Unavailable(f"the guest's console: {words}: {said}")


def _socket(pid: int) -> socket.socket:
    """One that can be answered from the jail: abstract names belong to a network namespace."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.bind(b"")
        return made

    with OwnedFd(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
        return netns.inside(int(namespace), make)


class Plugs:
    """The disks of the kernel in the jail of process `pid`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def slots(self, *, writable: bool) -> Sequence[int]:
        """Any is for any."""
        return range(SLOTS)

    def add(self, slot: int, path: str, *, writable: bool) -> str:
        """Its device is named by its slot."""
        mode = "" if writable else "r"
        order(self._pid, f"config ubd{slot}{mode}={path}")
        name = f"ubd{chr(ord('a') + slot)}"
        return hotplug.appeared(self._pid, [(f"/sys/block/{name}/size", f"/dev/{name}")])

    def remove(self, slot: int) -> None:
        """Refused while it is mounted."""
        order(self._pid, f"remove ubd{slot}")


class Cards:
    """Cards for the spare taps; a tap is gone with its card, and each can be used once."""

    lasting = False

    def __init__(self, pid: int, cards: int, first_fd: int) -> None:
        self._pid, self._cards, self._first_fd = pid, cards, first_fd
        self.spares: Sequence[int] = range(SPARES if cards else 0)

    def spare_tap(self, number: int) -> OwnedFd | None:
        """A copy of the kernel's own descriptor."""
        try:
            with open(f"/proc/{self._pid}/task/{self._pid}/children", encoding="ascii") as file:
                kernel = int(file.read().split()[0])
            with pidfd.open_process(kernel) as process:
                return pidfd.get_descriptor(process, self._first_fd + number)
        except (OSError, IndexError) as error:
            raise Unavailable(f"the guest has no spare tap: {error}") from error

    def add(self, number: int, nic: Nic) -> str:
        """Make the card."""
        name = f"vec{self._cards + number}"
        fd = self._first_fd + number
        order(
            self._pid,
            f"config {name}:transport=fd,fd={fd},vec=0,mac={nic.mac},mtu={nic.mtu}",
        )
        path = f"/sys/class/net/{name}/address"
        return hotplug.appeared(self._pid, [(path, name)])

    def remove(self, number: int) -> None:
        """Remove it."""
        self.unplug(self._cards + number)

    def unplug(self, index: int) -> None:
        """Remove it."""
        order(self._pid, f"remove vec{index}")
