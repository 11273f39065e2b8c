"""A workload in a guest: a container that runs a monitor, which speaks to the init inside.

Everything of the seam is the container's (`inner`), with three differences: what is launched is
the monitor, in its jail; a start or an exec has succeeded only when the guest has said so; and
SIGKILL goes to the workload first, so that the guest can write back what its files contain.
"""

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from signal import SIGKILL
from typing import Any

from bulkhead import _native
from bulkhead.boundaries import jail
from bulkhead.boundaries.container import Container, ContainerBoundary
from bulkhead.boundaries.guest import plan
from bulkhead.boundaries.guest.report import INSIDE, Report
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, InstanceState, Launched, Stdio
from bulkhead.boundary.seam import Report as Abilities
from bulkhead.errors import BulkheadError, Conflict, Unsupported
from bulkhead.home import Home
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount, Process, Resources

MONITOR = "/usr/bin/bulkhead-monitor"
SOCKET = "/run/guest.sock"
KILL = 63
"""The real-time signal that the monitor passes on as SIGKILL to the workload."""
OPTIONAL = frozenset({"pausable", "updatable", "measured", "guest"})
_START_S = 130.0
"""Above the monitor's own patience, which has better words."""
_EXEC_S = 60.0
_KILL_S = 5.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a boundary has made for one start."""

    jail: jail.Jail
    machine: plan.Machine
    options: tuple[str, ...] = ()
    """Of the monitor."""
    fds: tuple[OwnedFd, ...] = ()
    """What the machine monitor has as descriptors after those of the taps; closed by `start`."""


class GuestBoundary(ABC):
    """What sandbox and microvm share."""

    name: str

    def __init__(self, services: Services) -> None:
        self.home: Home = services.home
        self.launcher = services.launcher
        self.container = ContainerBoundary(services)
        self.roots = jail.Roots(services.home)

    @abstractmethod
    def probe(self) -> Abilities:
        """What this host can do, found out by trying."""

    @abstractmethod
    def shape(self, bundle: Bundle, *, terminal: bool) -> jail.Jail:
        """The jail of `bundle` without its files: sizes, filter; for limits and for exec."""

    @abstractmethod
    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Disks, kernel, root of the jail, command line; runs in a thread."""

    async def ready(self, bundle: Bundle) -> None:
        """What a start of `bundle` needs and no thread can make; before `prepare`."""
        return

    async def create(self, bundle: Bundle) -> "Guest":
        """Make the control group of a workload; nothing runs yet."""
        return Guest(self, bundle, await self.container.create(self._inner(bundle)))

    async def load(self, bundle: Bundle, pid: int) -> "Guest":
        """A workload of an earlier engine."""
        return Guest(self, bundle, await self.container.load(self._inner(bundle), pid))

    def _inner(self, bundle: Bundle) -> Bundle:
        return jail.jail_bundle(bundle, self.shape(bundle, terminal=False), ())


class Guest:
    """One workload in a guest."""

    def __init__(self, boundary: GuestBoundary, bundle: Bundle, inner: Container) -> None:
        self.boundary = boundary
        self.bundle = bundle
        self.inner = inner
        self._insisting: asyncio.Task[None] | None = None

    @property
    def _reports(self) -> str:
        return f"{self.bundle.directory}/guest"

    # --- seam ------------------------------------------------------------------------------

    async def start(self, stdio: Stdio) -> Launched:
        """Boot the guest and run the configured process in it."""
        bundle, uid = self.bundle, jail.uid_of(self.bundle.id)
        await self.boundary.ready(bundle)
        prepared = await asyncio.to_thread(
            lambda: self.boundary.prepare(bundle, terminal=stdio.terminal)
        )
        planned = plan.start(
            bundle,
            prepared.machine,
            terminal=stdio.terminal,
            rows=stdio.rows,
            columns=stdio.columns,
        )
        with contextlib.ExitStack() as undo:
            for fd in (*prepared.fds, *(nic.tap for nic in bundle.nics)):
                undo.callback(fd.close)
            frames = undo.enter_context(_memfd(planned.frames))
            report = undo.enter_context(Report(self._reports, uid))
            taps = [int(nic.tap) for nic in bundle.nics]
            fds = (int(frames), *taps, *(int(fd) for fd in prepared.fds))
            inside = jail.jail_bundle(bundle, prepared.jail, fds)
            inside.spec.mounts.append(_reports_mount(self._reports))
            assert inside.spec.process is not None
            inside.spec.process.args = [
                MONITOR, "run", "--socket", SOCKET, "--report", report.inside,
                *prepared.options, "--", *prepared.jail.args,
            ]  # fmt: skip
            self.inner.bundle = inside
            launched = await self.inner.start(stdio)
            try:
                await self._reported(launched, report, planned.steps, _START_S)
            except BaseException:
                await self._discard(bundle.id)
                raise
        return launched

    async def _reported(
        self, launched: Launched, report: Report, steps: Mapping[int, list[str]], timeout_s: float
    ) -> None:
        with contextlib.ExitStack() as undo:
            target = launched.pidfd
            if target is None:
                target = undo.enter_context(pidfd.open_process(launched.pid))
            else:
                target = undo.enter_context(target.duplicate())
            await report.wait(int(target), steps, timeout_s)

    async def _discard(self, identity: str) -> None:
        """A process that the launcher knows but nobody is to hear of."""
        with contextlib.suppress(BulkheadError):
            await self.boundary.launcher.signal(identity, SIGKILL)
        if identity == self.bundle.id:
            with contextlib.suppress(BulkheadError):
                await self.inner.delete(force=True)

    def state(self) -> InstanceState:
        """What the kernel says now."""
        return self.inner.state()

    async def kill(self, signal: int, *, everyone: bool = False) -> None:
        """Signal the workload's first process. SIGKILL to all ends the guest with it."""
        if signal != SIGKILL:
            await self.inner.kill(signal)
            return
        if everyone or self.state().status == "paused":
            await self.inner.kill(SIGKILL, everyone=True)
            return
        await self.inner.kill(KILL)
        asyncio.get_running_loop().call_later(_KILL_S, self._insist)

    def _insist(self) -> None:
        if self.state().status in ("running", "paused"):
            self._insisting = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        """End a guest that does not end its workload."""
        with contextlib.suppress(BulkheadError, OSError):
            if self.state().status in ("running", "paused"):
                await self.inner.kill(SIGKILL, everyone=True)

    async def delete(self, *, force: bool = False) -> None:
        """Remove the control group and end what is in it."""
        await self.inner.delete(force=force)

    async def exec(self, identity: str, process: Process, stdio: Stdio) -> Launched:
        """Run `process` in the guest, beside the workload's first."""
        planned = plan.exec_(
            self.bundle, process, terminal=stdio.terminal, rows=stdio.rows, columns=stdio.columns
        )
        uid = jail.uid_of(self.bundle.id)
        with contextlib.ExitStack() as undo:
            frames = undo.enter_context(_memfd(planned.frames))
            report = undo.enter_context(Report(self._reports, uid))
            shape = self.boundary.shape(self.bundle, terminal=stdio.terminal)
            client = jail.process(self.bundle, shape)
            client.args = [MONITOR, "exec", "--socket", SOCKET, "--report", report.inside]
            launched = await self.inner.exec(identity, client, stdio, (int(frames),))
            try:
                await self._reported(launched, report, planned.steps, _EXEC_S)
            except BaseException:
                await self._discard(f"{self.bundle.id}/{identity}")
                raise
        return launched

    # --- optional --------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freeze the guest, and its monitor."""
        await self.inner.pause()

    async def resume(self) -> None:
        """Thaw it."""
        await self.inner.resume()

    async def update(self, resources: Resources) -> None:
        """Apply changed limits; Conflict for memory, which a booted guest has."""
        if resources.memory is not None and resources.memory.limit is not None:
            raise Conflict(
                f"the memory of a running guest cannot change: {self.bundle.id} has what it was "
                "started with"
            )
        shape = self.boundary.shape(self.bundle, terminal=False)
        limited = jail.resources(resources, shape)
        limited.memory = None
        await self.inner.update(limited)

    def stats(self) -> dict[str, Any]:
        """Usage of guest and monitor together, in the shape of Docker's statistics."""
        return self.inner.stats()

    def processes(self) -> list[int]:
        """Process ids on the host: the monitor's and its guest's."""
        return self.inner.processes()

    def oom_kills(self) -> int:
        """How many of them the host's kernel has killed for want of memory."""
        return self.inner.oom_kills()

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of one that does not run; for any thread."""
        self.inner.dispose(timeout_s)


def native_program(name: str) -> str:
    """The path of one of our native programs; Unsupported if it was not built."""
    path = f"{os.path.dirname(os.path.abspath(str(_native.__file__)))}/{name}"
    if not os.access(path, os.X_OK):
        raise Unsupported(f"{path} is not there: build it with `make -C native`")
    return path


def _memfd(data: bytes) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("frames", os.MFD_CLOEXEC))
    view = memoryview(data)
    while view:
        view = view[os.write(int(fd), view) :]
    os.lseek(int(fd), 0, os.SEEK_SET)
    return fd


def _reports_mount(directory: str) -> Mount:
    options = ["bind", "ro", "nosuid", "nodev", "noexec"]
    return Mount(INSIDE, directory, "bind", options)
