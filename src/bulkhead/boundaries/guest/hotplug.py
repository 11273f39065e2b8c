"""Disks that are put into a guest while it runs, and taken out again.

    board = Board(directory, pid, plugs)          # of the guest that they go into
    devices = board.take(owner, [(image, True)])  # what the guest calls them
    board.give_back(owner)                        # when it has let go of them

    <workload run directory>/guest/slots          JSON: {slot: [owner, mount point]}

A boundary has a number of slots for disks and its own way to tell the machine (`Plugs`). The image
is mounted into the running jail, from outside: nothing in there could do it. All of it blocks, and
is for threads.
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from bulkhead.boundaries import jail
from bulkhead.boundaries.guest import link
from bulkhead.errors import BulkheadError, Unavailable, Unsupported
from bulkhead.linux import mounts, namespaces, netns

NAME = "slots"
FIRST_POINT, LAST_POINT = 20, 31
"""The jail's mount points /disks/N for these disks; those below are of the start."""
_APPEAR_S = 20.0
_CLONE_FS = 0x200
_MNT_DETACH = 2
_locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)


class Plugs(Protocol):
    """How a kind of machine is told of its disks."""

    def slots(self, *, writable: bool) -> Sequence[int]:
        """All slots for such a disk, whether they are in use or not."""
        ...

    def add(self, slot: int, path: str, *, writable: bool) -> str:
        """Use the file `path` of the jail there; the guest's device file."""
        ...

    def remove(self, slot: int) -> None:
        """Use it no more; Unavailable if the guest still does."""
        ...


class Board:
    """The slots of the guest whose monitor is process `pid`; its notes are in `directory`."""

    def __init__(self, directory: str, pid: int, plugs: Plugs) -> None:
        self._path = f"{directory}/{NAME}"
        self._pid = pid
        self._plugs = plugs

    def take(self, owner: str, images: Sequence[tuple[str, bool]]) -> list[str]:
        """Put in images (paths of the host, and whether they may be written): the device files.

        Unsupported if there is no room, with nothing put in.
        """
        with _locks[self._path], contextlib.ExitStack() as undo:
            undo.callback(self.give_back, owner)
            found = [self._add(owner, image, writable) for image, writable in images]
            undo.pop_all()
        return found

    def _add(self, owner: str, image: str, writable: bool) -> str:
        used = read(self._path)
        slots = [one for one in self._plugs.slots(writable=writable) if one not in used]
        points = set(range(FIRST_POINT, LAST_POINT + 1)) - {point for _, point in used.values()}
        if not slots or not points:
            kind = "writable disk" if writable else "layer"
            raise Unsupported(
                f"the guest has no room for one more {kind}: its slots for disks are all in use "
                f"({len(used)} are taken)"
            )
        slot, point = slots[0], min(points)
        # Written down first: whoever comes after a kill takes it out again.
        write(self._path, {**used, slot: (owner, point)})
        insert(self._pid, image, f"/disks/{point}")
        if writable:
            jail.raise_file_size(self._pid, os.stat(image).st_size)
        return self._plugs.add(slot, f"/disks/{point}", writable=writable)

    def give_back(self, owner: str) -> None:
        """Take out what `take` has put in for `owner`; what is in use there stays."""
        with _locks[self._path]:
            used = read(self._path)
            for slot, (one, point) in list(used.items()):
                if one != owner:
                    continue
                with contextlib.suppress(BulkheadError, OSError):
                    self._plugs.remove(slot)
                    withdraw(self._pid, f"/disks/{point}")
                    del used[slot]
            if os.path.exists(os.path.dirname(self._path)):
                write(self._path, used)


def write(path: str, used: dict[int, tuple[str, int]]) -> None:
    """Write down which slots are in use."""
    scratch = f"{path}.new"
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(used, file)
    os.rename(scratch, path)


def read(path: str) -> dict[int, tuple[str, int]]:
    """Which slots are in use, by whom, and where the disks are in the jail."""
    try:
        with open(path, encoding="utf-8") as file:
            return {int(slot): (one[0], one[1]) for slot, one in json.load(file).items()}
    except FileNotFoundError:
        return {}


# --- the jail's mounts ----------------------------------------------------------------------------


def _in_jail(pid: int, work: Callable[[], None]) -> None:
    """Run `work` in the mount namespace of process `pid`, whose root it sees."""

    def run() -> None:
        namespaces.unshare(_CLONE_FS)
        with namespaces.open_namespace(f"/proc/{pid}/ns/mnt") as place:
            namespaces.setns(int(place), namespaces.NEWNS)
        work()

    try:
        netns.in_thread(run)
    except (FileNotFoundError, ProcessLookupError):
        raise Unavailable("the guest has ended") from None


def insert(pid: int, image: str, place: str) -> None:
    """Mount the file `image` of the host at `place`, a file of the jail of process `pid`."""
    with mounts.clone_tree(image) as tree:
        flags = mounts.ATTR_NOSUID | mounts.ATTR_NODEV | mounts.ATTR_NOEXEC
        mounts.set_attributes(int(tree), set_=flags, propagation=mounts.MS_PRIVATE)
        _in_jail(pid, lambda: mounts.attach(int(tree), place))


def withdraw(pid: int, place: str) -> None:
    """Undo `insert`."""

    def work() -> None:
        with contextlib.suppress(OSError):
            mounts.unmount(place, _MNT_DETACH)

    _in_jail(pid, work)


def appeared(pid: int, paths: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> str:
    """The device of the first of (file of sysfs, device) that the guest has; Unavailable."""
    known = list(paths)
    deadline = time.monotonic() + _APPEAR_S
    with link.Link(pid) as connection:
        while True:
            for path, device in known:
                try:
                    connection.read(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTDIR):
                        raise Unavailable(f"the guest's {path}: {error.strerror}") from error
                else:
                    return device
            if time.monotonic() > deadline:
                raise Unavailable("the guest's kernel does not see its new disk")
            time.sleep(0.005)
