"""Loop devices: a file as a block device, for file systems that must have one. See loop(4)."""

import errno
import fcntl
import os
import struct

from bulkhead.linux.fds import OwnedFd

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_FLAG_READ_ONLY = 1
_FLAG_AUTOCLEAR = 4
_TRIES = 64

_INFO = struct.Struct("<QQQQQIIII64s64s32sQQ")
"""struct loop_info64; `lo_flags` is the ninth."""
_CONFIG = struct.Struct(f"<II{_INFO.size}s8Q")
"""struct loop_config: fd, block size, info, reserved."""


def attach_read_only(path: str) -> tuple[OwnedFd, str]:
    """A loop device over file `path`, gone when its last user closes it: (device, its path).

    Keep the descriptor open until the device is mounted. OSError: ENOENT or ENXIO where the kernel
    has no loop driver, EPERM or EACCES without the right.
    """
    return _attach(path, os.O_RDONLY)


def attach(path: str) -> tuple[OwnedFd, str]:
    """Likewise, to be written as well."""
    return _attach(path, os.O_RDWR)


def _attach(path: str, access: int) -> tuple[OwnedFd, str]:
    backing = os.open(path, access | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            return _take_free(control, backing, path, access)
        finally:
            os.close(control)
    finally:
        os.close(backing)


def _take_free(control: int, backing: int, path: str, access: int) -> tuple[OwnedFd, str]:
    label = os.fsencode(path)[-63:]
    flags = _FLAG_AUTOCLEAR | (_FLAG_READ_ONLY if access == os.O_RDONLY else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, label, b"", b"", 0, 0)
    config = _CONFIG.pack(backing, 0, info, *(0,) * 8)
    for _ in range(_TRIES):
        number = fcntl.ioctl(control, _CTL_GET_FREE)
        name = f"/dev/loop{number}"
        device = OwnedFd(os.open(name, access | os.O_CLOEXEC))
        try:
            fcntl.ioctl(int(device), _CONFIGURE, config)
        except OSError as error:
            device.close()
            if error.errno != errno.EBUSY:  # someone else took it between the two calls
                raise
            continue
        return device, name
    raise OSError(errno.EBUSY, "no free loop device")
