"""A container's /dev made before it is known for which: nodes, links, /dev/pts and /dev/shm.

It is the same for all containers that ask for nothing of their own there. Without a user namespace
any process may make it; where one mount can be attached to another that is mounted nowhere yet
(Linux 6.15) it is ready as one tree, and the child has a third less to do.
"""

import os
import stat

from bulkhead.isolation import mounts, nodes
from bulkhead.linux import mounts as kernel
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount, Spec

_DEV = Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"])
_INSIDE = (
    Mount(
        "/dev/pts",
        "devpts",
        "devpts",
        ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    Mount("/dev/shm", "shm", "tmpfs", ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]),
)
_EMPTY = ("mqueue",)
"""Directories for what belongs to namespaces that are not there yet."""


def make() -> OwnedFd:
    """The tree, mounted nowhere; from any thread."""
    dev = _new(_DEV)
    try:
        for name, major, minor in nodes.DEFAULT:
            os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=int(dev))
            os.chmod(name, 0o666, dir_fd=int(dev))  # whatever the umask is
        for name, target in nodes.LINKS:
            os.symlink(target, name, dir_fd=int(dev))
        for folder in (*_EMPTY, *(one.destination[5:] for one in _INSIDE)):
            os.mkdir(folder, dir_fd=int(dev))
            os.chmod(folder, 0o755, dir_fd=int(dev))
        for one in _INSIDE:
            with _new(one) as made:
                kernel.attach(int(made), one.destination[5:], dirfd=int(dev))
    except BaseException:
        dev.close()
        raise
    return dev


def _new(mount: Mount) -> OwnedFd:
    parsed = mounts.parse(mount.options)
    options: list[str | tuple[str, str | int]] = [("source", mount.source)]
    for option in parsed.data:
        name, equals, value = option.partition("=")
        options.append((name, value) if equals else name)
    return kernel.new_filesystem(mount.type_, options, parsed.attributes)


def offer(dev: OwnedFd, spec: Spec) -> dict[str, OwnedFd]:
    """`dev` by the names that `Ground.prepared` has for `spec`'s mounts; {} if it does not fit.

    A terminal needs the mounts as the child makes them.
    """
    if spec.linux.devices or spec.process is None or spec.process.terminal:
        return {}
    found = {}
    for position, mount in enumerate(spec.mounts):
        if not mount.destination.startswith("/dev"):
            continue
        if mount.destination == "/dev" and _same(mount, _DEV):
            found[f"mount{position}"] = dev
        elif any(_same(mount, one) for one in _INSIDE):
            found[f"inside{position}"] = dev
        elif mount.destination.strip("/") not in {f"dev/{name}" for name in _EMPTY}:
            return {}
    return found if len(found) == 1 + len(_INSIDE) else {}


def _same(mount: Mount, wanted: Mount) -> bool:
    return (
        mount.destination == wanted.destination
        and mount.type_ == wanted.type_
        and mount.source == wanted.source
        and sorted(mount.options) == sorted(wanted.options)
    )
