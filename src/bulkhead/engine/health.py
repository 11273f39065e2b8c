"""Health checks: a task per workload that probes it and keeps Docker's Health record.

What happens when it turns unhealthy is said by the label `bulkhead.health.on-unhealthy`: "none"
(the default, as Docker), "restart", "stop" or "kill".
"""

import asyncio
import datetime
import logging
import time
from typing import TYPE_CHECKING, Any

from bulkhead.engine import body, probes
from bulkhead.engine.lifecycle import attributes
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

ON_UNHEALTHY = "bulkhead.health.on-unhealthy"
INTERVAL_S, TIMEOUT_S, RETRIES, START_INTERVAL_S = 30.0, 30.0, 3, 5.0
KEPT = 5


def moment(nanoseconds: int) -> str:
    """RFC 3339 with nanoseconds, in UTC."""
    seconds, rest = divmod(nanoseconds, 10**9)
    base = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{base}.{rest:09d}Z"


class State:
    """Docker's rules for turning results into a status. Pure."""

    def __init__(self, check: body.Healthcheck, started_ns: int) -> None:
        self.status = "starting"
        self.streak = 0
        self.log: list[dict[str, Any]] = []
        self._retries = check.retries or RETRIES
        self._started_ns = started_ns
        self._start_period_ns = check.start_period

    def in_start_period(self, now_ns: int) -> bool:
        """Whether failures do not count yet."""
        return self.status == "starting" and now_ns - self._started_ns < self._start_period_ns

    def add(self, code: int, output: str, begin_ns: int, end_ns: int) -> bool:
        """Take a result; whether the status changed."""
        before = self.status
        self.log.append(
            {
                "Start": moment(begin_ns),
                "End": moment(end_ns),
                "ExitCode": code,
                "Output": output[: probes.OUTPUT],
            }
        )
        del self.log[:-KEPT]
        if code == 0:
            self.streak = 0
            self.status = "healthy"
        elif not self.in_start_period(end_ns):
            self.streak += 1
            if self.streak >= self._retries:
                self.status = "unhealthy"
        return self.status != before

    def describe(self) -> dict[str, Any]:
        """Docker's Health."""
        return {"Status": self.status, "FailingStreak": self.streak, "Log": list(self.log)}


class Prober:
    """Probes one run of one workload."""

    def __init__(self, engine: "Engine", workload: Workload, check: body.Healthcheck) -> None:
        self._engine = engine
        self._workload = workload
        self._check = check
        self.state = State(check, workload.record.started_ns)
        self.task = engine.spawn(self._run())

    async def _run(self) -> None:
        check = self._check
        interval_s = check.interval / 1e9 or INTERVAL_S
        start_interval_s = check.start_interval / 1e9 or START_INTERVAL_S
        while self._workload.running:
            early = self.state.in_start_period(time.time_ns())
            await asyncio.sleep(min(start_interval_s, interval_s) if early else interval_s)
            if self._workload.record.status == "paused":
                continue
            await self._once(check.timeout / 1e9 or TIMEOUT_S)

    async def _once(self, timeout_s: float) -> None:
        begin = time.time_ns()
        try:
            code, output = await asyncio.wait_for(
                probes.probe(self._engine, self._workload, self._check.test or []), timeout_s
            )
        except TimeoutError:
            code, output = -1, f"Health check exceeded timeout ({timeout_s:g}s)"
        if not self._workload.running:
            return
        if self.state.add(code, output, begin, time.time_ns()):
            record = self._workload.record
            self._engine.events.emit(
                "container",
                f"health_status: {self.state.status}",
                record.id,
                attributes(self._workload),
            )
            if self.state.status == "unhealthy":
                self._engine.spawn(self._react())

    async def _react(self) -> None:
        workload, control = self._workload, self._engine.control
        action = (workload.record.config.labels or {}).get(ON_UNHEALTHY, "none")
        try:
            if action == "restart":
                await control.restart(workload, "", None)
            elif action == "stop":
                await control.stop(workload, "", None)
            elif action == "kill":
                await control.kill(workload, "SIGKILL")
        except BulkheadError as error:
            log.warning("%s is unhealthy but %s failed: %s", workload.record.name, action, error)


class Health:
    """Begins and ends the probers."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def begin(self, workload: Workload) -> None:
        """The workload runs: probe it, if it is to be probed."""
        self.end(workload)
        check = workload.record.config.healthcheck
        if check is None or not check.test or check.test[0] == "NONE":
            workload.health = None
            return
        workload.prober = Prober(self._engine, workload, check)

    def end(self, workload: Workload) -> None:
        """It has ended; its last results stay to be seen."""
        prober, workload.prober = workload.prober, None
        if prober is not None:
            workload.health = prober.state.describe()
            prober.task.cancel()

    @staticmethod
    def describe(workload: Workload) -> dict[str, Any] | None:
        """Docker's Health, None for a workload without check."""
        if workload.prober is not None:
            return workload.prober.state.describe()
        return workload.health
