"""Process file descriptors: pidfd_open(2), pidfd_send_signal(2), PIDFD_GET_INFO (Linux 6.15)."""

import fcntl
import select
import struct

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

_INFO = struct.Struct("=QQ8I3Ii")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 0xC000FF0B | _INFO.size << 16
"""_IOWR(0xFF, 11, struct pidfd_info) of linux/pidfd.h, first version's size."""

_PIDFD_GET_MNT_NAMESPACE = 0xFF03
"""_IO(0xFF, 3) of linux/pidfd.h: a descriptor of the process's mount namespace (Linux 6.11)."""


def open_process(pid: int) -> OwnedFd:
    """A descriptor for process `pid`; ProcessLookupError if there is none."""
    return OwnedFd(syscall.call("pidfd_open", pid, 0))


def get_descriptor(pidfd: OwnedFd | int, number: int) -> OwnedFd:
    """A copy of the process's descriptor `number`: the same open file; pidfd_getfd(2). OSError."""
    return OwnedFd(syscall.call("pidfd_getfd", int(pidfd), number, 0))


def send_signal(pidfd: OwnedFd | int, signal: int) -> None:
    """Send `signal`; ProcessLookupError once the process was reaped."""
    syscall.call("pidfd_send_signal", int(pidfd), signal, None, 0)


def ended(pidfd: OwnedFd | int) -> bool:
    """Whether the process has ended (reaped or not)."""
    poller = select.poll()
    poller.register(int(pidfd), select.POLLIN)
    return bool(poller.poll(0))


def mount_namespace(pidfd: OwnedFd | int) -> OwnedFd | None:
    """The mount namespace of a process; None if it has ended or the kernel is older than 6.11."""
    try:
        return OwnedFd(fcntl.ioctl(int(pidfd), _PIDFD_GET_MNT_NAMESPACE))
    except OSError:
        return None


def exit_status(pidfd: OwnedFd | int) -> int | None:
    """The wait status of a process that was reaped by its parent, whoever asks.

    None if the kernel cannot say: older than 6.15, or not reaped yet.
    """
    buffer = bytearray(_INFO.size)
    _INFO.pack_into(buffer, 0, _PIDFD_INFO_EXIT, *([0] * 13))
    try:
        fcntl.ioctl(int(pidfd), _PIDFD_GET_INFO, buffer)
    except OSError:
        return None  # ENOTTY before 6.13, EINVAL, ESRCH while the parent has not reaped it
    fields = _INFO.unpack(buffer)
    mask, status = int(fields[0]), int(fields[-1])
    return status if mask & _PIDFD_INFO_EXIT else None
