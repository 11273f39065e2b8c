"""Named and anonymous volumes of the "local" driver.

    ROOT/volumes/NAME/_data      what workloads see; mode 0755 root at first
    ROOT/volumes/NAME/disk.ext4  of volumes with a size: mounted there for containers (disks.py)
    state.db documents "volume"  one per volume: labels, options, times, whether it is anonymous

A volume with driver options (type, device, o: mount(8)'s words) is mounted over its `_data` when
the first workload starts and unmounted after the last, in the engine's private mount namespace. So
is one with a size (option size), for workloads of the host's kernel; guests have it as a disk.

Removal first renames the directory to ROOT/volumes/.gone-NAME, then deletes the record, then the
tree: an engine killed in between finds the rest by that name (`sweep`).
"""

import contextlib
import datetime
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.linux import syscall
from bulkhead.state.database import Database
from bulkhead.volumes import disks, options
from bulkhead.volumes.leases import HOST, Holder, Leases

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_MNT_DETACH = 2
ANONYMOUS = "com.docker.volume.anonymous"
"""The label Docker marks anonymous volumes with; clients filter by it."""


class Volume(msgspec.Struct, omit_defaults=True):
    """One volume's record."""

    name: str
    created_ns: int
    labels: dict[str, str] = {}
    options: dict[str, str] = {}
    anonymous: bool = False
    filled: bool = False
    """Whether a first workload has been offered it (copy-up happens once)."""


def check_name(name: str) -> str:
    """Invalid unless `name` can be a volume's."""
    if len(name) < 2 or len(name) > 255 or not _NAME.fullmatch(name):
        raise Invalid(
            f'create {name}: "{name}" includes invalid characters for a local volume name, only '
            '"[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, '
            "use absolute path"
        )
    return name


def _time(nanoseconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _tree_size(path: str) -> int:
    """Bytes on disk of everything below `path`, hard links once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, directories, files in os.walk(path):
        for name in (*directories, *files):
            with contextlib.suppress(OSError):
                status = os.lstat(f"{parent}/{name}")
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total


class VolumeManager:
    """All volumes. Call it on one thread, except `remove_tree` and `usage`, which take long."""

    def __init__(self, root: str, database: Database) -> None:
        self._root = f"{root}/volumes"
        os.makedirs(self._root, mode=0o711, exist_ok=True)
        self._documents = database.documents("volume")
        self._volumes: dict[str, Volume] = {
            name: msgspec.json.decode(text, type=Volume) for name, text in self._documents.items()
        }
        self._mounted: dict[str, set[str]] = {}
        self.leases = Leases()

    def data(self, name: str) -> str:
        """The directory workloads see."""
        return f"{self._root}/{name}/_data"

    def get(self, name: str) -> Volume:
        """The record; NotFound in Docker's words."""
        try:
            return self._volumes[name]
        except KeyError:
            raise NotFound(f"get {name}: no such volume") from None

    def __contains__(self, name: str) -> bool:
        return name in self._volumes

    def create(
        self,
        name: str = "",
        *,
        driver: str = "local",
        labels: Mapping[str, str] | None = None,
        driver_opts: Mapping[str, str] | None = None,
        anonymous: bool = False,
    ) -> Volume:
        """Make it, or return the one that exists; Conflict if that has other options."""
        if driver not in {"", "local"}:
            raise NotFound(f'error looking up volume plugin {driver}: plugin "{driver}" not found')
        opts = options.check(dict(driver_opts or {}))
        if not name:
            name, anonymous = os.urandom(32).hex(), True
        check_name(name)
        existing = self._volumes.get(name)
        if existing is not None:
            if opts and opts != existing.options:
                raise Conflict(
                    f"create {name}: volume already exists with other driver options; "
                    "remove it or choose another name"
                )
            return existing
        marks = {ANONYMOUS: ""} if anonymous else {}
        volume = Volume(
            name, time.time_ns(), {**marks, **(labels or {})}, opts, anonymous=anonymous
        )
        os.makedirs(self.data(name), mode=0o755, exist_ok=True)
        self._documents.put(name, msgspec.json.encode(volume).decode())
        self._volumes[name] = volume
        return volume

    def mark_filled(self, name: str) -> None:
        """Remember that the copy-up has been done, or was not to be done."""
        volume = self.get(name)
        if not volume.filled:
            volume.filled = True
            self._documents.put(name, msgspec.json.encode(volume).decode())

    def is_disk(self, name: str) -> bool:
        """Whether it is one file, with a file system of its own."""
        return bool(self.get(name).options.get("size"))

    def image(self, name: str) -> str:
        """The file of a volume that is a disk, made if it is missing; for any thread."""
        return disks.make(f"{self._root}/{name}", options.disk_size(self.get(name).options))

    def lend(self, name: str) -> str:
        """The file of a volume that is a disk, for a guest that may write it; for any thread."""
        self.image(name)
        return disks.lend(f"{self._root}/{name}")

    def settle(self, name: str, user: str) -> None:
        """Have a disk that a guest has written checked, before `hold`; in a thread."""
        if self.is_disk(name):
            self.image(name)
            disks.take_back(f"{self._root}/{name}", lambda: self._not_lent(name, user))

    def hold(
        self,
        name: str,
        user: str,
        holder: Holder | None = None,
        *,
        mounted: bool = True,
        known: bool = False,
    ) -> str:
        """Its directory, mounted if it needs that, for workload `user`.

        `holder` says what the workload will do with it; Conflict if another kernel's use forbids
        that (not if it is `known` to run already). Without `mounted` the directory of a volume that
        is a disk is left as it is. Undone by `release`.
        """
        volume = self.get(name)
        path = self.data(name)
        disk = self.is_disk(name)
        if holder is not None:
            self.leases.take(name, holder, disk=disk, known=known)
        elif disk:
            self._not_lent(name, "")
        os.makedirs(path, mode=0o755, exist_ok=True)
        if disk and not mounted:
            return path
        users = self._mounted.setdefault(name, set())
        if not os.path.ismount(path):
            if disk:
                # Even to read it the host writes to it, which a guest that reads must not see.
                self._not_lent(name, user)
                self._mount_disk(name)
            elif volume.options.get("type"):
                options.mount(volume.options, path, name)
        users.add(user)
        return path

    def _not_lent(self, name: str, user: str) -> None:
        for holder in self.leases.holders(name):
            if holder.kernel != HOST and holder.user != user:
                raise Conflict(
                    f"volume {name} is a disk of {holder.name} (boundary {holder.boundary}): "
                    f"stop {holder.name} first"
                )

    def _mount_disk(self, name: str) -> None:
        self.image(name)
        disks.take_back(f"{self._root}/{name}")
        disks.mount(f"{self._root}/{name}", self.data(name))

    @contextlib.contextmanager
    def on_host(self, name: str, user: str = "") -> Iterator[str]:
        """Its directory, mounted for the moment; Conflict if a guest other than `user` has it."""
        path = self.data(name)
        if not self.is_disk(name) or os.path.ismount(path):
            yield path
            return
        self._not_lent(name, user)
        self._mount_disk(name)
        try:
            yield path
        finally:
            self._unmount(name)

    def release(self, user: str) -> None:
        """Undo every `hold` of `user`."""
        self.leases.release(user)
        for name, users in list(self._mounted.items()):
            users.discard(user)
            if users:
                continue
            del self._mounted[name]
            volume = self._volumes.get(name)
            if volume is not None and not volume.options.keys().isdisjoint({"type", "size"}):
                self._unmount(name)

    def _unmount(self, name: str) -> None:
        with contextlib.suppress(OSError):
            syscall.call("umount2", os.fsencode(self.data(name)), _MNT_DETACH)

    def remove(self, name: str, users: Collection[str], *, force: bool = False) -> str | None:
        """Forget it; returns the tree that is left for `remove_tree`.

        `users` are the workloads that refer to it: Conflict if there are any.
        """
        if name not in self._volumes:
            if force:
                return None
            raise NotFound(f"get {name}: no such volume")
        if users:
            listed = ", ".join(sorted(users))
            raise Conflict(f"remove {name}: volume is in use - [{listed}]")
        if os.path.ismount(self.data(name)):
            self._unmount(name)
        gone = f"{self._root}/.gone-{name}-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{self._root}/{name}", gone)
        self._documents.delete(name)
        del self._volumes[name]
        return gone

    @staticmethod
    def remove_tree(path: str) -> None:
        """Delete what `remove` left."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)

    def sweep(self) -> list[str]:
        """Trees that an earlier engine did not finish deleting, and directories of no record.

        What it had mounted for workloads that have ended meanwhile is unmounted.
        """
        for name in self._volumes.keys() - self._mounted.keys():
            if os.path.ismount(self.data(name)):
                self._unmount(name)
        found = []
        for name in os.listdir(self._root):
            if name.startswith(".gone-"):
                found.append(f"{self._root}/{name}")
            elif name not in self._volumes:
                gone = f"{self._root}/.gone-{name}-{time.time_ns()}"
                os.rename(f"{self._root}/{name}", gone)
                found.append(gone)
        return found

    def inspect(self, name: str) -> dict[str, Any]:
        """Docker's Volume."""
        volume = self.get(name)
        return {
            "CreatedAt": _time(volume.created_ns),
            "Driver": "local",
            "Labels": volume.labels or None,
            "Mountpoint": self.data(name),
            "Name": name,
            "Options": volume.options or None,
            "Scope": "local",
        }

    def summaries(
        self, filters: Mapping[str, Collection[str]], users: Callable[[str], int]
    ) -> list[dict[str, Any]]:
        """Those that match; `users` counts a volume's workloads (for "dangling")."""
        allowed = {"dangling", "driver", "label", "name"}
        for key in filters:
            if key not in allowed:
                raise Invalid(f"invalid filter '{key}'")
        return [
            self.inspect(name)
            for name in sorted(self._volumes)
            if self._matches(self._volumes[name], filters, users)
        ]

    def _matches(
        self, volume: Volume, filters: Mapping[str, Collection[str]], users: Callable[[str], int]
    ) -> bool:
        if "name" in filters and not any(part in volume.name for part in filters["name"]):
            return False
        if "driver" in filters and "local" not in filters["driver"]:
            return False
        if "dangling" in filters:
            wanted = any(value.lower() in {"1", "true"} for value in filters["dangling"])
            if wanted != (users(volume.name) == 0):
                return False
        return labels_match(volume.labels, filters.get("label", ()))

    def prunable(
        self, filters: Mapping[str, Collection[str]], users: Callable[[str], int]
    ) -> list[str]:
        """Names of unused volumes; anonymous ones only, unless filter all=true."""
        for key in filters:
            if key not in {"all", "label", "label!"}:
                raise Invalid(f"invalid filter '{key}'")
        every = any(value.lower() in {"1", "true"} for value in filters.get("all", ()))
        return [
            volume.name
            for volume in self._volumes.values()
            if (every or volume.anonymous)
            and not users(volume.name)
            and labels_match(volume.labels, filters.get("label", ()))
            and not (
                filters.get("label!") and labels_match(volume.labels, filters.get("label!", ()))
            )
        ]

    def usage(self, name: str) -> int:
        """Bytes on disk."""
        return _tree_size(self.data(name) if not self.is_disk(name) else f"{self._root}/{name}")


def labels_match(labels: Mapping[str, str], wanted: Collection[str]) -> bool:
    """Whether every "key" or "key=value" of `wanted` is among `labels`."""
    for entry in wanted:
        key, separator, value = entry.partition("=")
        if key not in labels or (separator and labels[key] != value):
            return False
    return True
