"""Acting on workloads that exist: signals, stop, pause, rename, wait, update."""

import asyncio
import signal
from typing import TYPE_CHECKING, Any

from bulkhead.boundary.seam import Pausable, Updatable
from bulkhead.engine import body, merge, names, options, signals, specgen_limits
from bulkhead.engine.launching import Start
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Record, Workload
from bulkhead.errors import Conflict, Invalid, NotFound, Unsupported

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

STOP_TIMEOUT_S = 10.0


class Control:
    """The verbs."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    async def signal(self, workload: Workload, number: int) -> None:
        """Send a signal to the first process; nothing happens if it has just ended."""
        instance = workload.instance
        if instance is None:
            return
        optional: object = instance
        everyone = number == signal.SIGKILL and workload.record.host.pid_mode not in {"", "private"}
        try:
            await instance.kill(number, everyone=everyone)
        except (NotFound, ProcessLookupError):
            return
        if workload.record.status == "paused" and isinstance(optional, Pausable) and number == 9:
            # A frozen process dies only when thawed (freezer of cgroup v1).
            await optional.resume()
            workload.record.status = "running"

    async def kill(self, workload: Workload, text: str) -> None:
        """`kill`: any signal; Conflict if it does not run."""
        record = workload.record
        number = signals.number(text or "SIGKILL")
        if not workload.running:
            raise Conflict(
                f"cannot kill container: {record.name}: container {record.id} is not running"
            )
        if number in {signal.SIGKILL, self._stop_signal(workload, "")}:
            record.stopped_by_hand = True
        await self.signal(workload, number)
        self._engine.events.emit(
            "container", "kill", record.id, attributes(workload, signal=number)
        )

    @staticmethod
    def _stop_signal(workload: Workload, text: str) -> int:
        return signals.number(text or workload.record.config.stop_signal or "SIGTERM")

    async def stop(self, workload: Workload, text: str, timeout_s: float | None) -> bool:
        """End it: the stop signal, then after `timeout_s` SIGKILL (-1: never); False if ended."""
        engine, record = self._engine, workload.record
        number = self._stop_signal(workload, text)
        if record.status == "restarting" and workload.restart_timer is None:
            async with workload.lock:  # its next start is under way: what starts now is stopped
                pass
        if engine.lifecycle.abandon_restart(workload):
            record.stopped_by_hand = True
            engine.workloads.save(workload)
            return True
        if not workload.running:
            return False
        if timeout_s is None:
            given = record.config.stop_timeout
            timeout_s = float(given) if given is not None else STOP_TIMEOUT_S
        record.stopped_by_hand = True
        workload.stopping = True
        try:
            ended = workload.ended
            await self.unpause_if_paused(workload)
            await self.signal(workload, number)
            engine.events.emit("container", "kill", record.id, attributes(workload, signal=number))
            limit = None if timeout_s < 0 else timeout_s
            try:
                await asyncio.wait_for(asyncio.shield(ended), limit)
            except TimeoutError:
                await self.signal(workload, signal.SIGKILL)
                engine.events.emit("container", "kill", record.id, attributes(workload, signal=9))
                await asyncio.shield(ended)
            await workload.cleaned.wait()
        finally:
            workload.stopping = False
        engine.events.emit("container", "stop", record.id, attributes(workload))
        return True

    async def restart(self, workload: Workload, text: str, timeout_s: float | None) -> None:
        """Stop and start."""
        workload.keep = True
        try:
            await self.stop(workload, text, timeout_s)
        finally:
            workload.keep = False
        await self._engine.lifecycle.start(workload, Start())
        self._engine.events.emit("container", "restart", workload.id, attributes(workload))

    async def pause(self, workload: Workload, *, passing: bool = False) -> None:
        """Freeze it; `passing`: not for longer than an operation of ours."""
        async with workload.lock:
            self._running(workload)
            if workload.record.status == "paused":
                raise Conflict(f"Container {workload.id} is already paused")
            workload.record.passing = passing
            if passing:
                self._engine.workloads.save(workload)
            await self._pausable(workload).pause()
            workload.record.status = "paused"
            self._engine.workloads.save(workload)
        self._engine.events.emit("container", "pause", workload.id, attributes(workload))

    async def unpause(self, workload: Workload) -> None:
        """Thaw it."""
        async with workload.lock:
            if workload.record.status != "paused":
                raise Conflict(f"Container {workload.id} is not paused")
            await self._thaw(workload)

    async def unpause_if_paused(self, workload: Workload) -> None:
        """Before a signal that must be seen."""
        if workload.record.status == "paused":
            await self._thaw(workload)

    async def _thaw(self, workload: Workload) -> None:
        await self._pausable(workload).resume()
        workload.record.status = "running"
        workload.record.passing = False
        self._engine.workloads.save(workload)
        self._engine.events.emit("container", "unpause", workload.id, attributes(workload))

    @staticmethod
    def _running(workload: Workload) -> None:
        if not workload.running:
            raise Conflict(f"Container {workload.id} is not running")

    @staticmethod
    def _pausable(workload: Workload) -> Pausable:
        instance: object = workload.instance
        if not isinstance(instance, Pausable):
            raise Unsupported(
                f"workloads behind the boundary {workload.record.boundary} cannot be paused"
            )
        return instance

    def rename(self, workload: Workload, name: str) -> None:
        """Give it another name."""
        checked = names.check(name)
        old = workload.record.name
        if checked == old:
            raise Invalid("Renaming a container with the same name as its current name")
        self._engine.workloads.rename(workload, checked)
        self._engine.networks.rename(workload.id, checked)
        if workload.running:
            workload.settings = self._engine.networks.settings(workload.id)
        self._engine.events.emit(
            "container", "rename", workload.id, attributes(workload, oldName=f"/{old}")
        )

    async def wait(self, workload: Workload, condition: str) -> dict[str, Any]:
        """Wait until it has ended ("not-running"), ends the next time, or is removed."""
        record = workload.record
        if condition not in {"", "not-running", "next-exit", "removed"}:
            raise Invalid(f"invalid condition: {condition!r}")
        if condition == "removed":
            await workload.gone.wait()
        elif condition == "next-exit":
            workload.begin_run()
            await self._ended_or_gone(workload)
        else:
            while workload.running or record.status == "restarting":
                await asyncio.shield(workload.ended)
                if record.status == "restarting":
                    break
        return self.outcome(record)

    @staticmethod
    async def _ended_or_gone(workload: Workload) -> None:
        """The end of this run or the next one; a workload that is removed has no next one."""
        gone = asyncio.ensure_future(workload.gone.wait())
        try:
            either: set[asyncio.Future[Any]] = {workload.ended, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()

    @staticmethod
    def outcome(record: Record) -> dict[str, Any]:
        """What waiting for it answers."""
        result: dict[str, Any] = {"StatusCode": record.exit_code}
        if record.error:
            result["Error"] = {"Message": record.error}
        return result

    async def update(self, workload: Workload, wanted: body.UpdateBody) -> list[str]:
        """Change limits, restart policy and published ports, at once if it runs; warnings."""
        warnings: list[str] = []
        options.check_resources(wanted, warnings)
        record = workload.record
        if record.removing:
            raise Conflict(f'Container {record.id} is marked for removal and cannot be "update"')
        async with workload.lock:
            merged = self._merge(record.host, wanted)
            options.check_resources(merged, warnings)
            options.check_restart(merged.restart_policy, auto_remove=merged.auto_remove)
            with self._engine.reservations.changing(record, merged):
                if workload.running:
                    await self._apply(workload, merged)
                self._publish(workload, merged, wanted)
                record.host = merged
                self._engine.workloads.save(workload)
            self._engine.reservations.rebalance()
        self._engine.events.emit("container", "update", record.id, attributes(workload))
        return warnings

    def _publish(
        self, workload: Workload, merged: body.HostConfig, wanted: body.UpdateBody
    ) -> None:
        if wanted.port_bindings is None:
            return
        merged.port_bindings = wanted.port_bindings
        merge.complete_ports(merged)
        if workload.running:
            self._engine.networks.publish(workload.id, self._engine.attach_ports(merged))
            workload.settings = self._engine.networks.settings(workload.id)
            self._engine.tend_networks()

    async def _apply(self, workload: Workload, merged: body.HostConfig) -> None:
        instance: object = workload.instance
        if not isinstance(instance, Updatable):
            raise Unsupported(
                f"limits of workloads behind the boundary {workload.record.boundary} "
                "cannot be changed while they run"
            )
        resources = specgen_limits.resources(merged, [])
        await instance.update(resources)

    @staticmethod
    def _merge(host: body.HostConfig, wanted: body.UpdateBody) -> body.HostConfig:
        """A copy of `host` with what `wanted` sets."""
        values = {name: getattr(host, name) for name in host.__struct_fields__}
        default = body.Resources()
        for name in body.Resources.__struct_fields__:
            value = getattr(wanted, name)
            if value != getattr(default, name):
                values[name] = value
        if wanted.restart_policy is not None and wanted.restart_policy.name:
            values["restart_policy"] = wanted.restart_policy
        if wanted.memory and not wanted.memory_swap:
            swap = host.memory_swap
            if swap != -1 and swap < wanted.memory and host.memory:
                raise Invalid(
                    "Memory limit should be smaller than already set memoryswap limit, "
                    "update the memoryswap at the same time"
                )
            if not host.memory:
                values["memory_swap"] = 2 * wanted.memory
        if wanted.nano_cpus:
            values["cpu_quota"] = values["cpu_period"] = 0
        elif wanted.cpu_quota or wanted.cpu_period:
            values["nano_cpus"] = 0
        if wanted.pids_limit is not None and wanted.pids_limit <= 0:
            values["pids_limit"] = None
        return body.HostConfig(**values)
