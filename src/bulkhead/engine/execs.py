"""Further processes in running workloads: `exec`, and the probes of health checks."""

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from bulkhead.engine import body, guests, security, specgen, specgen_limits, stdio, users
from bulkhead.engine.lifecycle import attributes, exit_code
from bulkhead.engine.records import UNKNOWN_EXIT, Workload
from bulkhead.errors import BulkheadError, Conflict, Invalid, NotFound
from bulkhead.isolation import capabilities
from bulkhead.keeper.holder import Exit
from bulkhead.oci import runtime as oci

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

KEPT = 512
"""Ended execs that can still be inspected, over all workloads."""


class Execution:
    """One exec: created, then started once."""

    def __init__(self, workload: Workload, request: body.ExecBody) -> None:
        self.id = os.urandom(32).hex()
        self.workload = workload
        self.request = request
        self.pid = 0
        self.state = "created"
        self.code: int | None = None
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.early: int | None = None

    @property
    def identity(self) -> str:
        """Its name to the holder and the keeper."""
        return f"{self.workload.id}/{self.id}"


class Execs:
    """All execs by id."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._all: dict[str, Execution] = {}

    def find(self, reference: str) -> Execution:
        """By id or unique prefix; NotFound in Docker's words."""
        found = self._all.get(reference)
        if found is not None:
            return found
        matches = [e for key, e in self._all.items() if reference and key.startswith(reference)]
        if len(matches) != 1:
            raise NotFound(f"No such exec instance: {reference}")
        return matches[0]

    def create(self, workload: Workload, request: body.ExecBody) -> Execution:
        """Check and remember it."""
        if not workload.running:
            raise Conflict(f"container {workload.id} is not running")
        if workload.record.status == "paused":
            raise Conflict(f"Container {workload.id} is paused, unpause the container before exec")
        command = [request.cmd] if isinstance(request.cmd, str) else request.cmd
        if not command or not command[0]:
            raise Invalid("No exec command specified")
        for entry in request.env or ():
            if not entry or entry.startswith("="):
                raise Invalid(f"invalid environment variable: {entry}")
        if request.working_dir and not request.working_dir.startswith("/"):
            raise Invalid(
                f"the working directory '{request.working_dir}' is invalid, "
                "it needs to be an absolute path"
            )
        request.cmd = command
        execution = Execution(workload, request)
        self._forget_old()
        self._engine.networks.keep_apart(workload.id)
        self._all[execution.id] = execution
        workload.execs[execution.id] = execution
        self._emit(execution, f"exec_create: {' '.join(command)}")
        return execution

    def _emit(self, execution: Execution, action: str, **more: object) -> None:
        self._engine.events.emit(
            "container",
            action,
            execution.workload.id,
            attributes(execution.workload, execID=execution.id, **more),
        )

    def _forget_old(self) -> None:
        if len(self._all) < KEPT:
            return
        for key, execution in list(self._all.items()):
            if execution.state == "exited":
                self._drop(key, execution)
                if len(self._all) < KEPT:
                    return

    def _drop(self, key: str, execution: Execution) -> None:
        self._all.pop(key, None)
        execution.workload.execs.pop(key, None)

    def process(self, execution: Execution, rows: int, columns: int) -> oci.Process:
        """What runs: the container's own settings with the request's on top."""
        record, request = execution.workload.record, execution.request
        accounts = users.read(guests.account_files(self._engine, record))
        identity = users.resolve(
            request.user or record.config.user, accounts, record.host.group_add or ()
        )
        merged = body.Config(
            env=[*(record.config.env or []), *(request.env or [])], tty=request.tty
        )
        hostname = record.config.hostname or os.uname().nodename
        chosen = list(
            capabilities.select(
                record.host.cap_add or (),
                record.host.cap_drop or (),
                privileged=record.host.privileged or request.privileged,
            )
        )
        size = oci.ConsoleSize(height=rows, width=columns) if rows and columns else None
        options = security.parse(record.host.security_opt or [])
        assert isinstance(request.cmd, list)
        return oci.Process(
            cwd=request.working_dir or record.config.working_dir or "/",
            args=request.cmd,
            env=specgen.environment(merged, identity, hostname),
            terminal=request.tty,
            console_size=size,
            user=oci.User(
                uid=identity.uid, gid=identity.gid, additional_gids=list(identity.groups)
            ),
            capabilities=oci.Capabilities(bounding=chosen, permitted=chosen, effective=chosen),
            rlimits=specgen_limits.rlimits(record.host.ulimits),
            no_new_privileges=options.no_new_privileges,
            oom_score_adj=record.host.oom_score_adj or None,
            apparmor_profile=options.apparmor,
        )

    async def start(
        self, execution: Execution, *, rows: int = 0, columns: int = 0, stdin: bool = False
    ) -> None:
        """Run it; raises what the launch raises. The caller attaches before."""
        workload = execution.workload
        if execution.state != "created":
            raise Conflict(f"Error: Exec command {execution.id} has already run")
        if not workload.running or workload.instance is None:
            raise Conflict(f"container {workload.id} is not running")
        process = self.process(execution, rows, columns)
        execution.state = "running"
        try:
            with stdio.make_exec(
                tty=execution.request.tty, stdin=stdin, rows=rows, columns=columns
            ) as streams:
                launched = await workload.instance.exec(execution.id, process, streams)
        except BaseException as error:
            self._failed(execution, error)
            raise
        execution.pid = launched.pid
        self._engine.processes.watch(execution.identity, launched.pidfd, launched.pid)
        self._emit(execution, f"exec_start: {' '.join(process.args)}")
        if execution.early is not None:
            self._end(execution, execution.early)

    def _failed(self, execution: Execution, error: BaseException) -> None:
        from bulkhead.engine.launching import failure_code

        execution.state = "exited"
        execution.code = failure_code(error) if isinstance(error, BulkheadError) else 128
        if not execution.ended.done():
            execution.ended.set_result(execution.code)

    def on_exit(self, identity: str, execution_id: str, event: Exit) -> None:
        """The holder says that an exec's process has ended."""
        self._exited(f"{identity}/{execution_id}", execution_id, event.wait_status)

    def on_orphan(self, identity: str, execution_id: str, status: int | None) -> None:
        """Likewise, without a holder."""
        self._exited(f"{identity}/{execution_id}", execution_id, status)

    def _exited(self, identity: str, execution_id: str, status: int | None) -> None:
        execution = self._all.get(execution_id)
        if execution is None:
            self._engine.spawn(self._forget(identity))
            return
        code = UNKNOWN_EXIT if status is None else exit_code(status)
        if execution.pid == 0:
            execution.early = code
        else:
            self._end(execution, code)

    def _end(self, execution: Execution, code: int) -> None:
        if execution.state != "running":
            return
        execution.state = "exited"
        self._engine.spawn(self._settle(execution, code))

    async def _settle(self, execution: Execution, code: int) -> None:
        with contextlib.suppress(BulkheadError):
            await self._engine.processes.keeper.drained(execution.identity)
        execution.code = code
        if not execution.ended.done():
            execution.ended.set_result(code)
        self._emit(execution, "exec_die", exitCode=code)
        await self._forget(execution.identity)

    async def _forget(self, identity: str) -> None:
        with contextlib.suppress(BulkheadError):
            await self._engine.processes.forget(identity)

    def workload_ended(self, workload: Workload, key: str) -> None:
        """Its workload has ended: an exec that never ran can be forgotten, others be asked for."""
        execution = self._all.get(key)
        if execution is None or execution.state == "created":
            self._all.pop(key, None)
            workload.execs.pop(key, None)

    def inspect(self, execution: Execution) -> dict[str, Any]:
        """Docker's ExecInspect."""
        request = execution.request
        assert isinstance(request.cmd, list)
        return {
            "CanRemove": False,
            "ContainerID": execution.workload.id,
            "DetachKeys": request.detach_keys,
            "ExitCode": execution.code,
            "ID": execution.id,
            "OpenStderr": request.attach_stderr,
            "OpenStdin": request.attach_stdin,
            "OpenStdout": request.attach_stdout,
            "Pid": execution.pid if execution.state == "running" else 0,
            "ProcessConfig": {
                "arguments": request.cmd[1:],
                "entrypoint": request.cmd[0],
                "privileged": request.privileged,
                "tty": request.tty,
                "user": request.user or execution.workload.record.config.user,
            },
            "Running": execution.state == "running",
        }
