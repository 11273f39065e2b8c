"""Ids with directories and control groups that no workload has yet, for the starts to come.

Made by a thread soon after a start, when the processors have nothing better to do. Nothing is
recorded of them: what a killed engine leaves belongs to no record, so the next one removes it.
"""

import asyncio
import contextlib
import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from bulkhead.boundary.seam import Boundary, Rootfs, Stocking
from bulkhead.engine import body, launching, names, specgen_limits
from bulkhead.engine.janitor import Janitor
from bulkhead.engine.trees import delete_small
from bulkhead.errors import BulkheadError
from bulkhead.oci.runtime import Resources

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

KEPT = 4
LOW = 2
"""With fewer than these the reserve is filled at once, else when starts have paused for QUIET_S."""
QUIET_S = 0.03
RETRY_S = 1.0
"""When something could not be made, it is tried once more without the last start's root."""
IDLE_S = 10.0
"""How long they are kept after the last start."""
_BOUNDARY = "container"


class Spares:
    """The reserve. Methods are for the loop's thread."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._maker = Janitor(engine.loop, "spares")
        self._ready: list[str] = []
        self._out: set[str] = set()
        """Taken, but not started yet."""
        self._coming = 0
        self._timer: asyncio.TimerHandle | None = None
        self._filling: asyncio.TimerHandle | None = None
        self._refused = False
        self._like: Rootfs | None = None
        """The root of the last start."""
        self._generation = 0
        """Counts the times that layers went: what was begun before is not used."""

    def take(self) -> str:
        """An id with what belongs to it, "" if there is none."""
        if not self._ready:
            return ""
        identity = self._ready.pop()
        self._out.add(identity)
        return identity

    def used(self, identity: str, rootfs: Rootfs | None) -> None:
        """Its workload has what was ready for it, or does without; the next one may be like it."""
        self._out.discard(identity)
        self._like = rootfs

    def touch(self, identity: str) -> None:
        """Its writable layer is about to be used by another mount: what is ready must go first."""
        if identity in self._out:
            self._out.discard(identity)
            boundary = self._engine.boundary(_BOUNDARY)
            if isinstance(boundary, Stocking):
                boundary.unstock(identity)

    def forget_layers(self) -> None:
        """Layers are about to go: hold none of them."""
        self._generation += 1
        self._like = None
        self.drop()

    def refill(self) -> None:
        """Order what lacks: now or soon. To be called after a start."""
        engine = self._engine
        if engine.closing or self._refused:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = engine.loop.call_later(IDLE_S, self.drop)
        if self._filling is not None:
            self._filling.cancel()
        # The processors are the starting workload's first.
        wait_s = 0.0 if len(self._ready) + self._coming < LOW else QUIET_S
        self._filling = engine.loop.call_later(wait_s, self._fill)

    def _fill(self) -> None:
        self._filling = None
        engine = self._engine
        if engine.closing or self._refused or self._timer is None:
            return
        self.reconcile()
        while len(self._ready) + self._coming < KEPT:
            self._coming += 1
            identity = names.new_id()
            path = f"{engine.cgroup_parent}/{identity}"
            boundary = engine.boundary(_BOUNDARY)
            rootfs = self._rootfs(identity)
            work = functools.partial(self._make, boundary, identity, path, rootfs)
            made = self._maker.submit(work)
            made.add_done_callback(functools.partial(self._made, identity, self._generation))

    def reconcile(self) -> None:
        """Remove what was taken for workloads that came to nothing, or are gone unstarted."""
        for identity in [one for one in self._out if self._engine.workloads.by_id(one) is None]:
            self._out.discard(identity)
            self._remove(identity)

    def _rootfs(self, identity: str) -> Rootfs | None:
        """A root like that of the last start, for `identity`."""
        like = self._like
        if like is None or like.upper is None or like.disk is not None or like.layer_files:
            return None
        place = self._engine.home.workload(identity)
        return replace(like, upper=f"{place}/upper", work=f"{place}/work")

    def _make(self, boundary: Boundary, identity: str, path: str, rootfs: Rootfs | None) -> None:
        launching.make_directories(self._engine.home, identity)
        if isinstance(boundary, Stocking):
            boundary.stock(identity, path, _resources(), rootfs)

    def _made(self, identity: str, generation: int, future: "asyncio.Future[None]") -> None:
        self._coming -= 1
        current = generation == self._generation and not self._engine.closing
        if future.exception() is None and current:
            self._ready.append(identity)
            return
        if future.exception() is not None:
            # A start meets the same error, with a name to it.
            log.warning("nothing can be made ready ahead: %s", future.exception())
            self._refused = self._like is None
            self._like = None
            if self._filling is None and self._timer is not None:
                self._filling = self._engine.loop.call_later(RETRY_S, self._fill)
        self._remove(identity)

    def drop(self) -> None:
        """Remove them all."""
        for timer in (self._timer, self._filling):
            if timer is not None:
                timer.cancel()
        self._timer = self._filling = None
        everything = [*self._ready, *self._out]
        self._ready.clear()
        self._out.clear()
        for identity in everything:
            self._remove(identity)

    def _remove(self, identity: str) -> None:
        boundary = self._engine.boundary(_BOUNDARY)
        owned = self._engine.workloads.by_id(identity) is not None
        self._maker.submit(functools.partial(self._unmake, boundary, identity, owned=owned))

    def _unmake(self, boundary: Boundary, identity: str, *, owned: bool) -> None:
        home = self._engine.home
        if isinstance(boundary, Stocking):
            with contextlib.suppress(BulkheadError):
                boundary.unstock(identity)
        if not owned:
            for path in (home.workload(identity), home.workload_run(identity)):
                delete_small(path)

    async def close(self) -> None:
        """Remove them and end the thread; the engine is closing, so that no more are made."""
        while self._coming:
            await asyncio.sleep(0.001)
        self.drop()
        self._maker.close()


@functools.cache
def _resources() -> Resources:
    """What a workload gets that asks for nothing."""
    plain = body.HostConfig()
    return specgen_limits.resources(plain, specgen_limits.devices(plain)[1])
