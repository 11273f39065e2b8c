"""Control groups made before they are needed, for ids that no workload has yet.

Each comes with the descriptors by which the child joins it and, on cgroup v1, with the tree that
shows it at /sys/fs/cgroup, mounted nowhere. `Stock` may be used from several threads.
"""

import contextlib
import errno
import os
import threading
from dataclasses import dataclass
from functools import cache

import msgspec

from bulkhead.boundaries import container_devices
from bulkhead.boundary.seam import Rootfs
from bulkhead.isolation import mounts
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.isolation.cgroups.group import Group
from bulkhead.linux import mounts as kernel
from bulkhead.linux import overlayfs
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount, Resources, Spec

VIEW_OPTIONS = ("nosuid", "noexec", "nodev", "relatime", "ro")
"""Options of the mount of /sys/fs/cgroup that a tree in stock has."""


@dataclass(slots=True)
class Reserved:
    """A group, what its processes join it by, and how it is shown inside."""

    group: Group
    resources: Resources
    joins: list[OwnedFd]
    view: OwnedFd | None = None
    devices: OwnedFd | None = None
    """Its /dev."""
    rootfs: Rootfs | None = None
    root: OwnedFd | None = None
    """`rootfs`, mounted nowhere yet."""

    def drop_root(self) -> None:
        """Unmount the root: its directories are wanted for one with mapped ids."""
        if self.root is not None:
            self.root.close()
            self.root = None
        if self.rootfs is not None and self.rootfs.work is not None:
            overlayfs.forget_volatile(self.rootfs.work)

    def close(self) -> None:
        """Close the descriptors; the group stays."""
        for fd in (*self.joins, self.view, self.devices, self.root):
            if fd is not None:
                fd.close()
        self.joins.clear()
        self.view = self.devices = self.root = None

    def offer(self, spec: Spec) -> dict[str, OwnedFd]:
        """What is ready of the mounts of `spec`, by the names `Ground.prepared` has for them."""
        found = {}
        if self.view is not None:
            for position, mount in enumerate(spec.mounts):
                if fits(mount):
                    found[f"mount{position}"] = self.view
        if self.devices is not None:
            found |= container_devices.offer(self.devices, spec)
        return found


class Stock:
    """What is ready, by id."""

    def __init__(self) -> None:
        self._kept: dict[str, Reserved] = {}
        self._lock = threading.Lock()

    def add(self, identity: str, path: str, resources: Resources) -> None:
        """Make the group `path` with the limits `resources`, for `identity`."""
        with contextlib.ExitStack() as undo:
            group = cgroups.detect().create(path, resources)
            undo.callback(group.try_delete)
            made = Reserved(group, resources, group.join_fds())
            undo.callback(made.close)
            if _nests():
                made.devices = container_devices.make()
                if cgroups.detect().version == 1:
                    made.view = view(group)
            undo.pop_all()
        with self._lock:
            self._kept[identity] = made

    def add_root(self, identity: str, rootfs: Rootfs, root: OwnedFd) -> None:
        """Keep the mounted root with what is there for `identity`."""
        with self._lock:
            made = self._kept.get(identity)
            if made is not None:
                made.rootfs, made.root = rootfs, root
                return
        root.close()

    def take(self, identity: str, path: str, resources: Resources | None) -> Reserved | None:
        """What is ready for `identity`, its limits made those of `resources`; None if nothing."""
        with self._lock:
            made = self._kept.pop(identity, None)
        if made is None:
            return None
        if (
            made.group.path != path
            or resources is None
            or resources.devices != made.resources.devices
        ):
            self._drop(made)
            return None
        if resources != made.resources:
            try:
                made.group.apply(msgspec.structs.replace(resources, devices=[]))
            except BaseException:
                self._drop(made)
                raise
        return made

    def discard(self, identity: str) -> None:
        """Undo `add`; nothing happens if it was taken."""
        with self._lock:
            made = self._kept.pop(identity, None)
        if made is not None:
            self._drop(made)

    @staticmethod
    def _drop(made: Reserved) -> None:
        made.close()
        made.group.try_delete()


def fits(mount: Mount) -> bool:
    """Whether a tree in stock is what `mount` asks for."""
    return mount.type_ == "cgroup" and sorted(mount.options) == sorted(VIEW_OPTIONS)


def view(group: Group) -> OwnedFd:
    """The group's directories of all hierarchies side by side, detached, as in `plan_cgroup_v1`."""
    with contextlib.ExitStack() as undo:
        base = kernel.new_filesystem("tmpfs", [("source", "tmpfs"), ("mode", "755")])
        undo.callback(base.close)
        names = []
        for folder in group.folders():
            name = folder.removesuffix(group.path).rpartition("/")[2]
            os.mkdir(name, 0o755, dir_fd=int(base))
            with kernel.clone_tree(folder) as shown:
                kernel.attach(int(shown), name, dirfd=int(base))
            names.append(name)
        for alias, target in sorted(mounts.aliases(names).items()):
            os.symlink(target, alias, dir_fd=int(base))
        options = mounts.parse(VIEW_OPTIONS)
        kernel.set_attributes(int(base), set_=options.attributes, recursive=True)
        undo.pop_all()
        return base


@cache
def _nests() -> bool:
    """Whether a mount can be attached to one that is mounted nowhere itself (Linux 6.15)."""
    tmpfs = [("source", "tmpfs")]
    with (
        kernel.new_filesystem("tmpfs", tmpfs) as base,
        kernel.new_filesystem("tmpfs", tmpfs) as leaf,
    ):
        os.mkdir("leaf", dir_fd=int(base))
        try:
            kernel.attach(int(leaf), "leaf", dirfd=int(base))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True
