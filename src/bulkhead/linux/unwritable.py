"""Running a program so that nobody can write to its file through /proc/PID/exe (CVE-2019-5736).

A container's program can be made to be the one that launched it ("/proc/self/exe"), and its file is
then within reach of whoever is root inside.
"""

import contextlib
import errno
import fcntl
import os

from bulkhead.linux import mounts
from bulkhead.linux.fds import OwnedFd

_MAY_NOT_MOUNT = (errno.EPERM, errno.EACCES, errno.ENOSYS)


def open_program(path: str) -> OwnedFd:
    """A descriptor to execute as /proc/self/fd/N: a read-only mount of the file, which costs
    nothing, or a sealed copy in memory for who may not mount.
    """
    with contextlib.ExitStack() as undo:
        try:
            clone = undo.enter_context(mounts.clone_tree(path))
            mounts.set_attributes(int(clone), set_=mounts.ATTR_RDONLY)
        except OSError as error:
            if error.errno not in _MAY_NOT_MOUNT:
                raise
            return sealed_copy(path)
        undo.pop_all()
        return clone


def sealed_copy(path: str) -> OwnedFd:
    """The file's bytes in a memfd that nobody can change; memfd_create(2)."""
    with contextlib.ExitStack() as undo:
        copy = undo.enter_context(
            OwnedFd(os.memfd_create(os.path.basename(path), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        )
        with open(path, "rb") as file:
            data = file.read()
        while data:
            data = data[os.write(int(copy), data) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(int(copy), fcntl.F_ADD_SEALS, seals)
        undo.pop_all()
        return copy
