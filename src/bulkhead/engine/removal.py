"""Removing workloads, so that a kill at any point leaves what the next engine finishes.

1. the record says `removing`        (an engine that begins goes on with 2)
2. the process is killed, the run cleaned up
3. the record is deleted             (from here the directories belong to nobody; for a run that
                                      has ended this is the first step, and the client is told)
4. ROOT/workloads/ID and RUN/workloads/ID are deleted; `sweep` finds those of no record
"""

import functools
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.engine.trees import delete_small, delete_tree
from bulkhead.errors import BulkheadError, Conflict

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")
_DEPARTED = 256
"""How many ends of workloads with `--rm` are remembered for who waits for one of them late."""


def _delete_small(paths: list[str], large: list[str]) -> None:
    for path in paths:
        if not delete_small(path):
            large.append(path)


class Removal:
    """Removes workloads."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._departed: dict[str, dict[str, Any]] = {}

    def departed(self, identity: str) -> dict[str, Any] | None:
        """How a workload with `--rm` ended that is gone; None if that is not known (any more)."""
        return self._departed.get(identity)

    async def remove(self, workload: Workload, *, force: bool, volumes: bool) -> None:
        """Remove it; Conflict if it runs and `force` is not given."""
        record = workload.record
        if record.removing:
            if not force:
                raise Conflict(f"removal of container {record.name} is already in progress")
            await workload.gone.wait()
            return
        if workload.running and not force:
            state = (
                "paused and must be unpaused first"
                if record.status == "paused"
                else ("running: stop the container before removing or force remove")
            )
            raise Conflict(f'cannot remove container "{record.name}": container is {state}')
        if record.status == "restarting" and not force:
            raise Conflict(
                f'cannot remove container "{record.name}": container is restarting: '
                "stop the container before removing or force remove"
            )
        task = self._engine.spawn(self._remove(workload, volumes=volumes))
        await self._engine.shielded(task)

    async def _remove(self, workload: Workload, *, volumes: bool) -> None:
        engine, record = self._engine, workload.record
        record.removing = True
        record.stopped_by_hand = True
        if self._forgettable(workload):
            self.forget(workload, volumes=volumes)
            engine.spawn(self._erase_cleaned(workload))
            return
        # For an engine that is killed now; after a loss of power nothing was acknowledged.
        engine.workloads.save(workload, durable=False)
        engine.lifecycle.abandon_restart(workload)
        async with workload.lock:
            if workload.running:
                await engine.control.signal(workload, signal.SIGKILL)
                await workload.ended
            await workload.cleaned.wait()
            self.forget(workload, volumes=volumes)
            await self.erase(workload)

    @staticmethod
    def _forgettable(workload: Workload) -> bool:
        """Whether nothing is left of it that anybody could miss or meet: a run that has ended, in
        directories and control groups of its own. They are cleared away behind the answer.
        """
        record = workload.record
        return (
            record.status in {"created", "exited"}
            and record.boundary == "container"
            and not workload.lock.locked()
            and not record.mounts
            and not record.host.cgroup_parent
            and record.host.ipc_mode != "shareable"
            and not record.host.pid_mode
        )

    async def _erase_cleaned(self, workload: Workload) -> None:
        await workload.cleaned.wait()
        await self.erase(workload)

    def forget(self, workload: Workload, *, volumes: bool = True) -> None:
        """Step 3, with the anonymous volumes if asked for; its name is free afterwards."""
        engine, record = self._engine, workload.record
        engine.workloads.discard(workload)
        engine.reservations.released(record)
        engine.spares.reconcile()
        if record.host.auto_remove:
            self._departed[record.id] = engine.control.outcome(record)
            if len(self._departed) > _DEPARTED:
                del self._departed[next(iter(self._departed))]
        if volumes:
            for point in record.mounts:
                if point.anonymous and point.name in engine.volumes:
                    engine.discard_volume(point.name, unless_used=True)
        engine.events.emit("container", "destroy", record.id, attributes(workload))

    async def erase(self, workload: Workload) -> None:
        """Step 4."""
        engine = self._engine
        engine.workloads.flush()
        large: list[str] = []
        try:
            paths = [path for path in self.paths(workload) if os.path.lexists(path)]
            if paths:
                await engine.janitor.submit(functools.partial(_delete_small, paths, large))
            for path in large:
                await engine.blocking(functools.partial(delete_tree, path))
        except OSError as error:
            log.warning("cannot delete the files of %s: %s", workload.record.name, error)
        finally:
            workload.gone.set()

    def paths(self, workload: Workload) -> tuple[str, str]:
        """The directories of a workload, in ROOT and in RUN."""
        home = self._engine.home
        return home.workload(workload.id), home.workload_run(workload.id)

    async def sweep(self) -> None:
        """Delete the directories of no record, and finish removals that were begun."""
        engine = self._engine
        for parent in (engine.home.in_root("workloads"), engine.home.in_run("workloads")):
            for name in os.listdir(parent):
                if engine.workloads.by_id(name) is None:
                    path = f"{parent}/{name}"
                    try:
                        await engine.blocking(functools.partial(delete_tree, path))
                    except OSError as error:
                        log.warning("cannot delete %s: %s", path, error)
        for workload in engine.workloads:
            if workload.record.removing or (
                workload.record.host.auto_remove
                and not workload.running
                and workload.record.status != "created"
            ):
                try:
                    await self._remove(workload, volumes=workload.record.host.auto_remove)
                except BulkheadError as error:
                    log.warning("cannot remove %s: %s", workload.record.name, error)
