"""Tap interfaces: a descriptor on which Ethernet frames of a new interface are read and written.

The kernel's Documentation/networking/tuntap.rst; the numbers are from linux/if_tun.h.
"""

import contextlib
import errno
import fcntl
import os
import struct

from bulkhead.errors import Unsupported
from bulkhead.linux import netns
from bulkhead.linux.fds import OwnedFd

_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def open_tap(name: str, *, vnet_hdr: bool = False) -> OwnedFd:
    """Make interface `name` in the calling thread's network namespace; non-blocking descriptor.

    One read(2) or write(2) is one frame, without further header or, with `vnet_hdr`, after a
    struct virtio_net_hdr of 10 bytes. The interface lives as long as the descriptor. Unsupported
    where the kernel has no tap interfaces; other errors as OSError.
    """
    try:
        tap = OwnedFd(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise Unsupported(
                f"guest network: {_DEVICE} is missing; load the kernel module tun (modprobe tun)"
            ) from error
        raise
    try:
        attach_tap(tap.fileno(), name, vnet_hdr=vnet_hdr)
    except BaseException:
        tap.close()
        raise
    return tap


def open_spares(netns_path: str, count: int) -> list[OwnedFd]:
    """What can become taps of that network namespace later (`attach_tap`). OSError."""

    def work() -> list[OwnedFd]:
        with contextlib.ExitStack() as undo:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
            made = [undo.enter_context(OwnedFd(os.open(_DEVICE, flags))) for _ in range(count)]
            undo.pop_all()
        return made

    with OwnedFd(os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)) as namespace:
        return netns.inside(int(namespace), work)


def attach_tap(fd: int, name: str, *, vnet_hdr: bool = False) -> None:
    """Make interface `name` for an open one that has none, in the namespace it was opened in."""
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
