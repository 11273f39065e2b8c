"""Tap interfaces: a descriptor on which Ethernet frames of a new interface are read and written.

The kernel's Documentation/networking/tuntap.rst; the numbers are from linux/if_tun.h.
"""

import errno
import fcntl
import os
import struct

from bulkhead.errors import Unsupported
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
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0)
    try:
        fcntl.ioctl(tap.fileno(), _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        tap.close()
        raise
    return tap
