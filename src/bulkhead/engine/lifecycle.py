"""Starts, ends and what follows an end: restart, removal, clean-up.

The order at an end: output complete → waiters told → resources given back → record written →
holder's entry forgotten. The waiters come first because a client waits for them and for nothing
else; a later start of the same workload waits for the clean-up (`Workload.cleaned`). Until the
record is written the holder knows the end, and should it die too, its exit record.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from bulkhead.boundary.seam import Disposable, Instance, Launched, Measured, Secluded, implements
from bulkhead.engine import announcing, guests, launching, parents, restart
from bulkhead.engine.launching import Start
from bulkhead.engine.records import UNKNOWN_EXIT, Workload
from bulkhead.engine.trees import delete_small
from bulkhead.errors import BulkheadError, Conflict, Internal
from bulkhead.keeper.holder import Exit

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")


def exit_code(wait_status: int | None) -> int:
    """What a shell would say: the code, 128 + signal, or 255 when it is not known."""
    if wait_status is None:
        return UNKNOWN_EXIT
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def attributes(workload: Workload, **more: object) -> dict[str, str]:
    """What events say of a workload."""
    record = workload.record
    return {
        **(record.config.labels or {}),
        "image": record.image,
        "name": record.name,
        **{key: str(value) for key, value in more.items()},
    }


def _oom_kills(instance: object) -> int:
    """How many processes of an instance were killed for want of memory."""
    measured = implements(instance, Measured)
    return cast(Measured, instance).oom_kills() if measured else 0


def _dispose(instance: Disposable, paths: Sequence[str]) -> None:
    instance.dispose()
    for path in paths:
        delete_small(path)


class Lifecycle:
    """Starting and ending workloads."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._early: dict[str, Exit] = {}
        self._launching: set[str] = set()

    # --- starting

    async def start(self, workload: Workload, start: Start | None = None) -> bool:
        """Run it; False if it runs already. Raises what the launch raises, and records it.

        Goes on when the caller is cancelled: a start is never half done.
        """
        task = self._engine.spawn(self._start(workload, start or Start()))
        return bool(await asyncio.shield(task))

    async def _start(self, workload: Workload, start: Start) -> bool:
        async with workload.lock:
            record = workload.record
            if workload.running:
                if record.status == "paused":
                    raise Conflict("cannot start a paused container, try unpause instead")
                return False
            if record.removing:
                raise Conflict("container is marked for removal and cannot be started")
            self._cancel_restart(workload)
            record.stopped_by_hand = False
            await self._launch(workload, start)
            return True

    async def _launch(self, workload: Workload, start: Start) -> None:
        engine, record = self._engine, workload.record
        await workload.cleaned.wait()
        workload.begin_run()
        workload.cleaned.clear()
        self._launching.add(record.id)
        try:
            launched = await launching.launch(engine, workload, start)
        except BaseException as error:
            self._launching.discard(record.id)
            self._early.pop(record.id, None)  # a guest's monitor, whose workload never ran
            workload.cleaned.set()
            self._record_failure(workload, error)
            engine.reservations.rebalance()
            raise
        self._launching.discard(record.id)
        self._started(workload, launched)

    def _record_failure(self, workload: Workload, error: BaseException) -> None:
        if not isinstance(error, BulkheadError):
            error = Internal(f"unexpected {type(error).__name__}: {error}")
        launching.record_failure(workload.record, error)
        self._engine.workloads.save(workload)
        self._engine.events.emit(
            "container",
            "die",
            workload.id,
            attributes(workload, exitCode=workload.record.exit_code),
        )
        if not workload.ended.done():
            workload.ended.set_result(workload.record.exit_code)

    def _started(self, workload: Workload, launched: Launched) -> None:
        engine, record = self._engine, workload.record
        launching.record_start(record, launched, engine.boot_id)
        engine.reservations.settled(record)
        engine.reservations.rebalance()
        # Not flushed: after a loss of power nothing runs, whatever the record says. And what ends
        # at once need not be written twice: until then a next engine sees by itself that it runs.
        # One that no record knows would be ended then: only who waits for it puts up with that.
        known = workload.attachment is not None or engine.workloads.written(workload)
        if known and record.boundary == "container" and not record.host.cgroup_parent:
            engine.workloads.save_later(workload)
            engine.write_soon()
        else:
            engine.workloads.save(workload, durable=False)
        announcing.begun(engine, workload)
        engine.events.emit("container", "start", record.id, attributes(workload))
        engine.health.begin(workload)
        early = self._early.pop(record.id, None)
        if early is not None:
            self.on_exit(early)

    # --- ending

    def on_exit(self, event: Exit) -> None:
        """The holder says that a process has ended."""
        identity, _, execution = event.id.partition("/")
        if execution:
            self._engine.execs.on_exit(identity, execution, event)
            return
        workload = self._engine.workloads.by_id(identity)
        if workload is None:
            self._engine.spawn(self._forget(event.id))
        elif identity in self._launching:
            self._early[identity] = event
        elif workload.running:
            self._engine.spawn(self.finish(workload, event.wait_status, event.finished_ns))

    def on_orphan(self, identity: str, status: int | None) -> None:
        """A process without holder has ended; `status` is None when its code is lost."""
        identity, _, execution = identity.partition("/")
        if execution:
            self._engine.execs.on_orphan(identity, execution, status)
            return
        workload = self._engine.workloads.by_id(identity)
        if workload is not None and workload.running:
            self._engine.spawn(self.finish(workload, status, time.time_ns()))

    async def _forget(self, identity: str) -> None:
        with contextlib.suppress(BulkheadError):
            await self._engine.processes.forget(identity)

    async def finish(self, workload: Workload, status: int | None, finished_ns: int) -> None:
        """Everything that follows the end of the first process."""
        engine, record = self._engine, workload.record
        number = workload.launch_number = workload.launch_number + 1
        engine.health.end(workload)
        kills = _oom_kills(workload.instance)  # while the keeper delivers the last output
        await self._drained(workload)
        if workload.launch_number != number or not workload.running:
            return
        self._write_end(workload, status, finished_ns, kills)
        again = restart.wanted(
            record.host.restart_policy,
            exit_code=record.exit_code,
            restarts=record.restart_count,
            by_hand=record.stopped_by_hand or workload.stopping,
        )
        ran_s = max(0, record.finished_ns - record.started_ns) / 1e9
        if again and not record.removing:
            record.status = "restarting"
        remove = record.host.auto_remove and not (again or record.removing or workload.keep)
        if remove:
            engine.removal.forget(workload)
        else:
            engine.workloads.save_later(workload)
            engine.sync_soon()
        if not workload.ended.done():
            workload.ended.set_result(record.exit_code)
        for _ in range(3):  # let those who waited answer their clients first
            await asyncio.sleep(0)
        await self._clean(workload, erase=remove)
        if remove:
            await engine.removal.erase(workload)
        elif record.status == "restarting":
            self._schedule(workload, ran_s)

    async def _drained(self, workload: Workload) -> None:
        """Wait until all output is in the log and with the clients."""
        attachment, workload.attachment = workload.attachment, None
        if attachment is not None:
            # "exited" says just that; anything else ends earlier.
            await asyncio.wait((attachment,))
            failed = attachment.cancelled() or attachment.exception() is not None
            if not failed and attachment.result() == "exited":
                return
        with contextlib.suppress(BulkheadError):
            await self._engine.processes.keeper.drained(workload.id)

    def _write_end(
        self, workload: Workload, status: int | None, finished_ns: int, kills: int
    ) -> None:
        record = workload.record
        record.status = "exited"
        record.pid = 0
        record.exit_code = exit_code(status)
        record.exit_known = status is not None
        record.finished_ns = finished_ns
        if status is None:
            record.error = "exit code unknown: the process's parent was killed"
        guest: Secluded | None = None
        if implements(workload.instance, Secluded):
            guest = cast(Secluded, workload.instance)
        if guest is not None and (failure := guest.failure()):
            record.error = f"the guest failed: {failure}"
        if kills > 0:
            record.oom_killed = True
            inside = guest.inside_kills() if guest is not None else 0
            record.oom_text = (
                guests.explain_oom(record, inside) if inside else self._engine.explain_oom(record)
            )
            self._engine.events.emit("container", "oom", record.id, attributes(workload))
        duration = max(0, finished_ns - record.started_ns) // 10**9
        self._engine.events.emit(
            "container",
            "die",
            record.id,
            attributes(workload, exitCode=record.exit_code, execDuration=duration),
        )

    async def _clean(self, workload: Workload, *, erase: bool) -> None:
        """Give back what the run held; `erase`: also its directories, if they are small."""
        engine, record = self._engine, workload.record
        for identity in list(workload.execs):
            engine.execs.workload_ended(workload, identity)
        try:
            announcing.ended(engine, workload)
            engine.leases.end(record.id)
            engine.inside.end(record.id)
            engine.networks.release(record.id)
            engine.tend_networks()
            workload.settings = None
            instance, workload.instance = workload.instance, None
            if instance is not None:
                if record.host.pid_mode not in {"", "private"}:
                    # Without a PID namespace of its own the rest outlives the first process.
                    await instance.kill(signal.SIGKILL, everyone=True)
                await self._delete(workload, instance, erase=erase)
                parents.give_back(record)
            engine.reservations.rebalance()
            engine.volumes.release(record.id)
            engine.drop_shm(record)
            engine.workloads.flush()
            await engine.processes.forget(record.id)
        except (BulkheadError, OSError) as error:
            log.warning("cleaning up after %s: %s", record.name, error)
        finally:
            workload.cleaned.set()

    async def _delete(self, workload: Workload, instance: Instance, *, erase: bool) -> None:
        """In the janitor's thread if nothing lives on in it, as is usual."""
        if implements(instance, Disposable):
            disposable = cast(Disposable, instance)
            paths = self._engine.removal.paths(workload) if erase else ()
            with contextlib.suppress(Conflict):
                await self._engine.janitor.submit(functools.partial(_dispose, disposable, paths))
                return
        await instance.delete(force=True)

    # --- restarting

    def _schedule(self, workload: Workload, ran_s: float) -> None:
        workload.restart_delay_s = restart.next_delay_s(workload.restart_delay_s, ran_s)
        workload.restart_timer = self._engine.spawn(
            self._restart_later(workload, workload.restart_delay_s)
        )

    async def _restart_later(self, workload: Workload, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        async with workload.lock:
            record = workload.record
            if record.status != "restarting" or record.removing:
                return
            workload.restart_timer = None
            record.restart_count += 1
            try:
                await self._launch(workload, Start())
            except BulkheadError as error:
                log.warning("%s could not be started again: %s", record.name, error)
                if restart.wanted(
                    record.host.restart_policy,
                    exit_code=record.exit_code,
                    restarts=record.restart_count,
                    by_hand=record.stopped_by_hand,
                ):
                    record.status = "restarting"
                    self._engine.workloads.save(workload)
                    self._schedule(workload, 0.0)

    def _cancel_restart(self, workload: Workload) -> None:
        timer, workload.restart_timer = workload.restart_timer, None
        if timer is not None:
            timer.cancel()

    def abandon_restart(self, workload: Workload) -> bool:
        """Stop a workload that waits for its next start; whether it did."""
        if workload.record.status != "restarting":
            return False
        self._cancel_restart(workload)
        workload.record.status = "exited"
        self._engine.workloads.save(workload)
        return True
