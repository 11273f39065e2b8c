"""The engine's link to the holder and the keeper.

The holder's client starts another holder when one dies; this module puts back what the new one
does not know: the supervised helpers, and eyes on the workloads whose parent has died with it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.errors import BulkheadError, Conflict, NotFound
from bulkhead.keeper import holder as holders
from bulkhead.keeper.client import KeeperClient, supervise_keeper
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

_STATUS_WAIT_S = 5.0
"""How long the new parent of an orphan (process 1) may take to reap it before its code is lost."""


class Processes:
    """Holder, keeper, helpers, and watches by pidfd."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._watches: dict[str, OwnedFd] = {}
        self._orphans: dict[str, OwnedFd] = {}
        self._helpers: set[str] = set()
        self.on_exit: Callable[[holders.Exit], None] = lambda event: None
        self.on_orphan: Callable[[str, int | None], None] = lambda identity, status: None
        self.holder: holders.HolderClient
        self.keeper: KeeperClient

    async def open(self) -> None:
        """Connect to the holder, or start it, and see that its helpers run."""
        self.holder = await holders.ensure_holder(self._engine.home)
        self.holder.on_restart(self._replaced)
        await self.supervise()
        self.keeper = KeeperClient(self._engine.home)

    async def supervise(self) -> None:
        """Ask for every helper; those that run already stay."""
        await supervise_keeper(self.holder)
        self._helpers.clear()
        await self.sync_helpers()

    def helpers_differ(self) -> bool:
        """Whether `sync_helpers` has something to do."""
        return {name for name, _, _ in self._engine.networks.helpers()} != self._helpers

    async def sync_helpers(self) -> None:
        """Supervise what the networks need now, dismiss what they no longer need."""
        wanted = {name: (argv, env) for name, argv, env in self._engine.networks.helpers()}
        if wanted.keys() == self._helpers:
            return
        for name in self._helpers - wanted.keys():
            self._helpers.discard(name)
            self._engine.networks.helper_dismissed()
            with contextlib.suppress(NotFound):
                await self.holder.dismiss(name)
        for name in wanted.keys() - self._helpers:
            self._helpers.add(name)
            argv, env = wanted[name]
            with contextlib.suppress(Conflict):
                await self.holder.supervise(name, argv, env)

    def listen(self) -> None:
        """Begin to hear of ends; those that happened before come at once."""
        self.holder.on_exit(self.on_exit)

    def watch(self, identity: str, fd: OwnedFd | None, pid: int) -> None:
        """Keep a descriptor of a launched process, for the day the holder dies."""
        try:
            fd = pidfd.open_process(pid) if fd is None else fd.duplicate()
        except ProcessLookupError:
            return
        old = self._watches.pop(identity, None)
        if old is not None:
            old.close()
        self._watches[identity] = fd

    def unwatch(self, identity: str) -> None:
        """It has ended and its end is known."""
        for table in (self._watches, self._orphans):
            fd = table.pop(identity, None)
            if fd is not None:
                self._engine.loop.remove_reader(int(fd))
                fd.close()

    def orphan(self, identity: str, fd: OwnedFd) -> None:
        """Nobody tells of this process's end: look out for it."""
        self._watches.pop(identity, None)
        self._orphans[identity] = fd
        self._engine.loop.add_reader(int(fd), self._orphan_ended, identity)

    def _orphan_ended(self, identity: str) -> None:
        fd = self._orphans.get(identity)
        if fd is None:
            return
        self._engine.loop.remove_reader(int(fd))
        self._engine.spawn(self._orphan_status(identity, fd))

    async def _orphan_status(self, identity: str, fd: OwnedFd) -> None:
        deadline = time.monotonic() + _STATUS_WAIT_S
        status = pidfd.exit_status(fd)
        while status is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            status = pidfd.exit_status(fd)
        self.unwatch(identity)
        self.on_orphan(identity, status)

    def is_orphan(self, identity: str) -> bool:
        """Whether the holder does not know this running process."""
        return identity in self._orphans

    def _replaced(self) -> None:
        """The holder died and another one stands: everything it had launched is an orphan."""
        log.warning("the holder was killed; its workloads run on, watched by the engine")
        for identity in list(self._watches):
            self.orphan(identity, self._watches[identity])
        self._engine.spawn(self._supervise_again())

    async def _supervise_again(self) -> None:
        try:
            await self.supervise()
        except BulkheadError as error:
            log.warning("helpers could not be started again: %s", error)

    @property
    def pid(self) -> int:
        """The holder's process id; launched processes inherit some of its attributes."""
        return self.holder.pid

    async def launch(self, request: LaunchRequest) -> Launched:
        """Run a launch program (boundary.seam.Launcher)."""
        return await self.holder.launch(request)

    async def signal(self, identity: str, signal: int) -> None:
        """Send a signal to a launched process, whoever is its parent now."""
        fd = self._orphans.get(identity)
        if fd is not None:
            pidfd.send_signal(fd, signal)
        else:
            await self.holder.signal(identity, signal)

    async def forget(self, identity: str) -> None:
        """Drop what holder and keeper remember of it."""
        self.unwatch(identity)
        await self.keeper.release(identity)
        await self.holder.forget(identity)

    async def close(self) -> None:
        """Disconnect; everything runs on."""
        for identity in [*self._watches, *self._orphans]:
            self.unwatch(identity)
        await self.keeper.close()
        await self.holder.close()
