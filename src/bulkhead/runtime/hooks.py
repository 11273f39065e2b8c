"""Hooks of the runtime specification: programs called at the points of a container's life.

prestart, createRuntime, poststart and poststop run where the runtime runs. createContainer runs in
the container's namespaces but still sees the host's files (the child has not pivoted);
startContainer runs inside, confined as the workload is: its program comes from the image. Each
reads the state on its standard input; see config.md, "POSIX-platform Hooks".
"""

import json
import os
import select
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec

from bulkhead.boundaries import container_process as common
from bulkhead.boundaries.container_exec import exec_template, joined
from bulkhead.boundaries.container_process import FdTable, Filter
from bulkhead.boundary.seam import LaunchRequest
from bulkhead.errors import BulkheadError, Internal, LaunchFailed
from bulkhead.linux import namespaces, pidfd, prctl
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Program
from bulkhead.oci.runtime import Hook, Spec
from bulkhead.runtime import parent
from bulkhead.runtime.driving import drive
from bulkhead.runtime.spawner import Spawner

_SAID = 4096

Run = Callable[[Hook, OwnedFd, OwnedFd], int]
"""Start a hook with these descriptors as its input and output; its pid."""


class Point:
    """One point of the life cycle: its hooks in order, the first that fails ends it."""

    def __init__(self, name: str, hooks: Sequence[Hook], run: Run) -> None:
        self._name, self._hooks, self._run = name, hooks, run

    def call(self, state: dict[str, object]) -> None:
        """Run every hook to its end; Internal says which failed, how, and what it printed."""
        for position, hook in enumerate(self._hooks):
            try:
                failed = self._one(hook, state)
            except (OSError, LaunchFailed) as error:
                failed = str(error)
            if failed:
                raise Internal(f"error running {self._name} hook #{position}: {failed}")

    def try_(self, state: dict[str, object], warn: Callable[[str], None]) -> None:
        """Likewise; a failure is only told, and the others run."""
        for position in range(len(self._hooks)):
            one = Point(self._name, self._hooks[position : position + 1], self._run)
            try:
                one.call(state)
            except BulkheadError as error:
                warn(str(error))

    def _one(self, hook: Hook, state: dict[str, object]) -> str:
        """Run `hook`; "" or what is wrong."""
        with ExitStack() as undo:
            given = undo.enter_context(OwnedFd(os.memfd_create("state")))
            os.write(int(given), json.dumps(state).encode())
            os.lseek(int(given), 0, os.SEEK_SET)
            said = undo.enter_context(OwnedFd(os.memfd_create("said")))
            pid = self._run(hook, given, said)
            with pidfd.open_process(pid) as process:
                poller = select.poll()
                poller.register(int(process), select.POLLIN)
                if not poller.poll(hook.timeout * 1000 if hook.timeout else None):
                    os.kill(pid, signal.SIGKILL)
                    parent.current().reap(pid)
                    return f"timeout of {hook.timeout} s"
            code = os.waitstatus_to_exitcode(parent.current().reap(pid))
            if code == 0:
                return ""
            text = os.pread(int(said), _SAID, 0).decode(errors="replace").strip()
            how = f"exit status {code}" if code > 0 else f"signal {-code}"
            return f"{how}, output: {text}"


def outside(hook: Hook, given: OwnedFd, said: OwnedFd) -> int:
    """A hook that runs where the runtime runs."""
    program, fds = Program(), FdTable()
    common.plan_streams(program, fds)
    program.close("close all other descriptors")
    program.exec("execute the hook", [hook.path], hook.args or [hook.path], hook.env)
    compiled = program.compile()
    return _launch(compiled.data, compiled.steps, fds.keys, _streams(given, said))


def _streams(given: OwnedFd, said: OwnedFd) -> dict[str, int]:
    return {"stdin": int(given), "stdout": int(said), "stderr": int(said)}


def _launch(
    data: bytes, steps: Sequence[str], keys: Sequence[str], have: dict[str, int], cgroup: int = -1
) -> int:
    request = LaunchRequest(
        id="hook",
        program=data,
        clone_flags=0,
        fds=[have[key] for key in keys],
        steps=steps,
        cgroup_fd=cgroup,
    )
    launched = drive(Spawner().launch(request))
    if launched.pidfd is not None:
        launched.pidfd.close()
    return launched.pid


class Inside:
    """Hooks in the namespaces of the child `pid`."""

    def __init__(self, spec: Spec, pid: int, joins: Sequence[OwnedFd], cgroup: int) -> None:
        """`joins` are control group files to write oneself into (v1), `cgroup` a directory (v2)."""
        self.spec, self.pid, self.joins, self.cgroup = spec, pid, joins, cgroup

    def before_pivot(self, hook: Hook, given: OwnedFd, said: OwnedFd) -> int:
        """createContainer: the container's namespaces, the host's files."""
        program, fds = Program(), FdTable()
        common.plan_streams(program, fds)
        program.call("become undumpable", "prctl", prctl.SET_DUMPABLE, 0, 0, 0, 0)
        # The child's own root: the host's files as mounted in its mount namespace.
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        path = f"/proc/{self.pid}/root"
        root = program.call("open the host's root", "openat", AT_FDCWD, path, flags, 0)
        kinds = joined(self.spec) & ~(namespaces.NEWUSER | namespaces.NEWPID | namespaces.NEWTIME)
        program.call("enter the container's namespaces", "setns", fds.fd("target"), kinds)
        program.call("enter the host's root", "fchdir", root)
        program.call("take the host's root", "chroot", ".")
        program.close("close all other descriptors")
        program.exec("execute the hook", [hook.path], hook.args or [hook.path], hook.env)
        compiled = program.compile()
        return self._launch(compiled.data, compiled.steps, fds.keys, given, said)

    def as_workload(self, hook: Hook, given: OwnedFd, said: OwnedFd, filter_: Filter | None) -> int:
        """startContainer: inside, with what the workload's process may do."""
        assert self.spec.process is not None
        args = hook.args or [hook.path]
        process = msgspec.structs.replace(
            self.spec.process, args=args, env=hook.env, terminal=False, cwd="/"
        )
        template = exec_template(
            self.spec,
            process,
            joins=len(self.joins),
            terminal=False,
            filter_=filter_,
            oom_score_adj=process.oom_score_adj or 0,
        )
        data = template.compiled.filled({"candidates": [hook.path], "argv": args, "env": hook.env})
        return self._launch(data, template.compiled.steps, template.fds, given, said)

    def _launch(
        self,
        data: bytes,
        steps: Sequence[str],
        keys: Sequence[str],
        given: OwnedFd,
        said: OwnedFd,
    ) -> int:
        with pidfd.open_process(self.pid) as target:
            have = _streams(given, said) | {"target": int(target)}
            have |= {f"join{position}": int(fd) for position, fd in enumerate(self.joins)}
            return _launch(data, steps, keys, have, self.cgroup)
