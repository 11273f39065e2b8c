"""The balloon of a microVM that runs: memory that the guest does without is the host's again.

The driver is loaded in every template and bound to nothing: it costs nobody anything who does not
use it. Once it is bound, the guest also reports what it frees, and that is given back too.
"""

import errno
import time

from bulkhead.boundaries.guest import link
from bulkhead.boundaries.vmm import hot, qemu
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Program

_SETTLE_S = 20.0
_STALLED_S = 1.5
_POLL_S = 0.02


def resize(pid: int, cards: int, control_fd: int, memory_bytes: int) -> int:
    """Have the guest of the monitor `pid` make do with so many bytes: what it has afterwards.

    It is more than wanted if the guest needs it. Errors are those of hot.Control and the link.
    """
    device = f"virtio{qemu.bus_of_balloon(cards)}"
    bound = Program()
    path = "/sys/bus/virtio/drivers/virtio_balloon/bind"
    there = (errno.ENODEV, errno.EBUSY, errno.EINVAL)  # it is bound already
    bound.write("use the balloon", AT_FDCWD, path, device, ok=there)
    with hot.Control(pid, control_fd) as control:
        with link.Link(pid) as connection:
            connection.set_up(bound)
        control.balloon(memory_bytes)
        return _settled(control, memory_bytes)


def _settled(control: hot.Control, memory_bytes: int) -> int:
    """Wait until it has come to that, or does not go on."""
    now = time.monotonic()
    end, moved, last = now + _SETTLE_S, now, -1
    while True:
        found, now = control.memory(), time.monotonic()
        if found != last:
            last, moved = found, now
        if found == memory_bytes or now > end or now > moved + _STALLED_S:
            return found
        time.sleep(_POLL_S)
