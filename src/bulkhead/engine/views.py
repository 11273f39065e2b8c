"""Looking into and writing to root file systems without running anything in them.

A path from outside is only ever opened with RESOLVE_IN_ROOT below a descriptor of the root
(openat2(2)): symbolic links, also ones swapped while we look, cannot lead out of it.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from bulkhead.engine import guests
from bulkhead.engine.records import Workload
from bulkhead.errors import Conflict
from bulkhead.linux import mounts, namespaces, openat2, overlayfs
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_T = TypeVar("_T")
_OPTIONS = [("redirect_dir", "nofollow"), ("metacopy", "off")]


def overlay(lowers: Sequence[str], upper: str | None, work: str | None) -> OwnedFd:
    """A detached mount of the layers (topmost first), writable with `upper`; closing ends it."""
    if upper is None and len(lowers) == 1:
        return mounts.clone_tree(lowers[0])
    if upper is not None and work is not None:
        overlayfs.forget_volatile(work)
        return overlayfs.detached(lowers, _OPTIONS, upper=upper, work=work)
    return overlayfs.detached(lowers, _OPTIONS)


def with_layers(lowers: Sequence[str], action: Callable[[int], _T]) -> _T:
    """`action` with a descriptor of the layers' read-only union."""
    with overlay(lowers, None, None) as root:
        return action(int(root))


def _in_private_namespace(action: Callable[[], _T]) -> Callable[[], _T]:
    def run() -> _T:
        # Only this thread gets the new namespace; it ends with the thread. unshare(2).
        namespaces.unshare(namespaces.NEWNS)
        mounts.mount("none", "/", "none", mounts.MS_REC | mounts.MS_PRIVATE)
        return action()

    return run


async def in_thread(action: Callable[[], _T], *, private: bool = True) -> _T:
    """Run `action` in a thread of its own, `private`: with a mount namespace of its own.

    For what may wait for a client: it must not occupy the engine's pool.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    work = _in_private_namespace(action) if private else action

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome: tuple[_T | None, BaseException | None] = (work(), None)
        except BaseException as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="view", daemon=True).start()
    return await future


async def with_root(engine: "Engine", workload: Workload, action: Callable[[int], _T]) -> _T:
    """`action` with a descriptor of the workload's root, as its processes see it.

    A running one's is reached through /proc/PID/root. One that does not run gets its layers and
    volumes mounted in a thread's own mount namespace; it cannot be started meanwhile.
    """
    if workload.running:
        root = OwnedFd(
            os.open(guests.host_root(workload.record), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        )
        try:
            return await in_thread(lambda: action(int(root)), private=False)
        finally:
            root.close()
    async with workload.lock:
        if workload.running:
            raise Conflict(f"container {workload.record.name} has just been started; try again")
        if workload.record.removing:
            raise Conflict(f"container {workload.record.name} is being removed")
        await workload.cleaned.wait()
        return await _stopped(engine, workload, action)


async def _stopped(engine: "Engine", workload: Workload, action: Callable[[int], _T]) -> _T:
    record = workload.record
    engine.spares.touch(record.id)
    home = engine.home.workload(record.id)
    for path, mode in ((home, 0o710), (f"{home}/upper", 0o755), (f"{home}/work", 0o700)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
    lowers = await engine.lowers(record.diff_ids)
    points = [
        (
            point.destination,
            engine.volumes.hold(point.name, record.id)
            if point.type_ == "volume" and point.name in engine.volumes
            else point.source,
            point.rw,
        )
        for point in record.mounts
        if point.type_ in {"bind", "volume"}
    ]
    stage = engine.home.in_run("view")
    os.makedirs(stage, mode=0o700, exist_ok=True)

    def work() -> _T:
        with overlay(lowers, f"{home}/upper", f"{home}/work") as root:
            mounts.attach(int(root), stage)
        fd = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for destination, source, writable in points:
                _bind(fd, destination, source, writable=writable)
            return action(fd)
        finally:
            os.close(fd)
            mounts.unmount(stage, mounts.MNT_DETACH)

    try:
        return await in_thread(work)
    finally:
        engine.volumes.release(record.id)


def _bind(root: int, destination: str, source: str, *, writable: bool) -> None:
    """Mount one of the workload's volumes, if both ends exist."""
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        mounts.clone_tree(source, recursive=True) as tree,
    ):
        if not writable:
            mounts.set_attributes(int(tree), set_=mounts.ATTR_RDONLY, recursive=True)
        with openat2.openat2(root, destination, os.O_PATH, openat2.IN_ROOT) as place:
            mounts.attach(int(tree), "", dirfd=int(place))
