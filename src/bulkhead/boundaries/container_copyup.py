"""tmpfs mounts that begin with what the root has at their place ("tmpcopyup")."""

import contextlib
import os

from bulkhead.boundary.seam import Bundle
from bulkhead.errors import Invalid
from bulkhead.isolation import mounts
from bulkhead.linux import copying, openat2
from bulkhead.linux import mounts as kernel
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount


def prepare(bundle: Bundle, undo: contextlib.ExitStack) -> dict[str, OwnedFd]:
    """The filled mounts of `bundle` by the names that a plan has for them, closed by `undo`.

    Invalid unless the root is a directory: an overlay is not there yet when they are filled.
    """
    made: dict[str, OwnedFd] = {}
    for position, mount in enumerate(bundle.spec.mounts):
        if "tmpcopyup" not in mount.options or mount.type_ != "tmpfs":
            continue
        if bundle.rootfs.directory is None:
            raise Invalid(f"mount {mount.destination}: tmpcopyup is not supported here")
        made[f"mount{position}"] = _filled(bundle.rootfs.directory, mount)
        undo.callback(made[f"mount{position}"].close)
    return made


def _filled(root: str, mount: Mount) -> OwnedFd:
    options = mounts.parse(mount.options)
    wanted = options.attributes | options.recursive_attributes
    data: list[str | tuple[str, str | int]] = [("source", mount.source or "tmpfs")]
    for option in options.data:
        name, equals, value = option.partition("=")
        data.append((name, value) if equals else name)
    with contextlib.ExitStack() as undo:
        made = undo.enter_context(kernel.new_filesystem("tmpfs", data))
        top = undo.enter_context(OwnedFd(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
        flags = os.O_RDONLY | os.O_DIRECTORY
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            source = openat2.openat2(int(top), mount.destination, flags, openat2.IN_ROOT)
            undo.enter_context(source)
            into = os.open(".", flags | os.O_CLOEXEC, dir_fd=int(made))
            undo.callback(os.close, into)
            copying.copy_directory(int(source), into)
        kernel.set_attributes(int(made), set_=wanted)
        return OwnedFd(made.take())
