"""A workload in a guest: a container that runs a monitor, which speaks to the init inside.

Everything of the seam is the container's (`inner`), with three differences: what is launched is
the monitor, in its jail; a start or an exec has succeeded only when the guest has said so; and
SIGKILL goes to the workload first, so that the guest can write back what its files contain.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGKILL
from typing import Any

import msgspec

from bulkhead import _native
from bulkhead.boundaries import jail
from bulkhead.boundaries.container import Container, ContainerBoundary
from bulkhead.boundaries.guest import cards, files, hotplug, link, plan, resuming
from bulkhead.boundaries.guest.cards import Cards
from bulkhead.boundaries.guest.frames import last_words
from bulkhead.boundaries.guest.interior import Interior
from bulkhead.boundaries.guest.report import INSIDE, Report
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, InstanceState, Launched, Stdio
from bulkhead.boundary.seam import Report as Abilities
from bulkhead.errors import BulkheadError, Conflict, Unavailable, Unsupported
from bulkhead.home import Home
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.program import Program
from bulkhead.oci.runtime import Mount, Process, Resources

MONITOR = "/usr/bin/bulkhead-monitor"
SOCKET = "/run/guest.sock"
KILL = 63
"""The real-time signal that the monitor passes on as SIGKILL to the workload."""
OPTIONAL = frozenset({"pausable", "updatable", "measured", "guest"})
KERNELS_OWN = 48 << 20
"""Bytes that a guest keeps beyond its workload's limit when that is lowered."""
_DETAIL = "/run/detail"
_DETAIL_MAX = 128 << 10
START_S = 130.0
"""Above the monitor's own patience, which has better words."""
_EXEC_S = 60.0
_KILL_S = 5.0
_DISK_S = 60.0
"""How long a guest may take to end that nobody waits for any more, before its disk is wanted."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a boundary has made for one start."""

    jail: jail.Jail
    machine: plan.Machine
    options: tuple[str, ...] = ()
    """Of the monitor."""
    fds: tuple[OwnedFd, ...] = ()
    """What the machine monitor has as descriptors after those of the taps; closed by `start`."""
    slots: Sequence[int] = ()
    """For disks, that are in use from the start (hotplug.py)."""


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

    def save(self, bundle: Bundle, pid: int, directory: str) -> None:
        """Write the running machine in the jail of process `pid` to `directory`; in a thread.

        Unsupported where that cannot be done.
        """
        raise Unsupported(
            f"a running workload behind the boundary {self.name} cannot be saved: commit saves "
            "its files, --boundary microvm can be saved with its memory"
        )

    async def ready(self, bundle: Bundle) -> None:
        """What a start of `bundle` needs and no thread can make; before `prepare`."""
        return

    async def create(self, bundle: Bundle) -> "Guest":
        """Make the control group of a workload; nothing runs yet."""
        return self._instance(bundle, await self.container.create(self._inner(bundle)))

    async def load(self, bundle: Bundle, pid: int) -> "Guest":
        """A workload of an earlier engine."""
        return self._instance(bundle, await self.container.load(self._inner(bundle), pid))

    def _instance(self, bundle: Bundle, inner: Container) -> "Guest":
        if bundle.within is None:
            return Guest(self, bundle, inner)
        from bulkhead.boundaries.guest.member import Member  # which is made of Guest

        return Member(self, bundle, inner)

    def _inner(self, bundle: Bundle) -> Bundle:
        if bundle.within is not None:
            from bulkhead.boundaries.guest import member

            return jail.jail_bundle(
                member.own_bundle(bundle), member.jail_of(bundle, terminal=False), ()
            )
        return jail.jail_bundle(bundle, self.shape(bundle, terminal=False), ())

    def plugs(self, pid: int, cards: int) -> hotplug.Plugs:
        """The slots for disks of the running guest whose monitor is process `pid`."""
        raise Unsupported(
            f"a guest behind the boundary {self.name} takes no further workloads: --boundary "
            "sandbox or microvm"
        )

    def cards(self, pid: int, cards: int) -> Cards:
        """The network cards of the running guest, which was started with `cards` of them."""
        raise Unsupported(
            f"the networks of a running guest behind the boundary {self.name} cannot change: stop "
            "it first"
        )

    def resize(self, pid: int, cards: int, memory_bytes: int) -> None:
        """Take memory from the running guest, or give it again, until it has so much; in a thread.

        What is taken is the host's again. As far as the guest can do without it; where a machine
        cannot be told, nothing happens.
        """
        return

    def given_back(self, pid: int, cards: int, memory_bytes: int) -> int:
        """How much of `memory_bytes` the guest has given back; in a thread."""
        return 0

    def share_modules(self, bundle: Bundle) -> Sequence[str]:
        """Files of the initramfs that a guest without shares may not have loaded, in order."""
        return ()


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

    def shape(self, *, terminal: bool) -> jail.Jail:
        """The jail's shape, for one more process in it."""
        return self.boundary.shape(self.bundle, terminal=terminal)

    # --- seam ------------------------------------------------------------------------------

    async def start(self, stdio: Stdio) -> Launched:
        """Boot the guest and run the configured process in it, or go on with a saved one."""
        if self.bundle.saved:
            return await self._boot(
                stdio,
                lambda machine: resuming.resume(self.bundle, machine, terminal=stdio.terminal),
                shared=False,
            )
        await self.boundary.ready(self.bundle)
        return await self._boot(
            stdio,
            lambda machine: plan.start(
                self.bundle,
                machine,
                terminal=stdio.terminal,
                rows=stdio.rows,
                columns=stdio.columns,
            ),
            shared=True,
        )

    async def show(self, stdio: Stdio) -> Launched:
        """Boot the guest only for its files: none of the workload's programs runs.

        They are there (`interior`) until the standard input ends.
        """
        return await self._boot(
            stdio, lambda machine: plan.show(self.bundle, machine), shared=False
        )

    async def _boot(
        self, stdio: Stdio, planning: Callable[[plan.Machine], plan.Planned], *, shared: bool
    ) -> Launched:
        bundle, uid = self.bundle, jail.uid_of(self.bundle.id)
        prepared = await asyncio.to_thread(
            lambda: self.boundary.prepare(bundle, terminal=stdio.terminal)
        )
        for image in bundle.disks.values():
            os.chown(image, uid, uid)
        machine = prepared.machine
        shares = None
        if shared:
            known = (*plan.engine_files(bundle.spec), *machine.sources)
            shares = files.Shares(bundle, known)
            machine = dataclasses.replace(machine, sources={**shares.sources, **machine.sources})
        planned = planning(machine)
        with contextlib.ExitStack() as undo:
            for fd in (*prepared.fds, *(nic.tap for nic in bundle.nics)):
                undo.callback(fd.close)
            lock = undo.enter_context(await own_disk(bundle.rootfs.disk))
            frames = undo.enter_context(memfd(planned.frames))
            report = undo.enter_context(Report(self._reports, uid))
            taps = [int(nic.tap) for nic in bundle.nics]
            # The lock is the last: it ends with the last process of the jail.
            fds = (int(frames), *taps, *(int(fd) for fd in prepared.fds), int(lock))
            options = prepared.options
            if shares:
                program = native_program("bulkhead-files")
                size = prepared.jail.guest_bytes
                served = await shares.serve(self.inner, self.boundary.roots, program, size)
                undo.callback(served.close)
                options += ("--files-fd", str(jail.FIRST_FD + len(fds)))
                fds += (int(served),)
            inside = jail.jail_bundle(bundle, prepared.jail, fds)
            inside.spec.mounts.append(reports_mount(self._reports))
            inside.spec.mounts.append(_detail_mount(self._reports, uid))
            note(self._reports, "memory", str(prepared.jail.guest_bytes))
            note(self._reports, "cards", str(len(bundle.nics)))
            cards.write(self._reports, cards.Wires([nic.name for nic in bundle.nics]))
            note(self._reports, "places", json.dumps(_places(bundle, machine, shares)))
            hotplug.write(f"{self._reports}/{hotplug.NAME}", dict.fromkeys(prepared.slots, ("", 0)))
            assert inside.spec.process is not None
            inside.spec.process.args = [
                MONITOR, "run", "--socket", SOCKET, "--report", report.inside,
                "--detail", _DETAIL, *options, "--", *prepared.jail.args,
            ]  # fmt: skip
            self.inner.bundle = inside
            launched = await self.inner.start(stdio)
            try:
                await self._reported(launched, report, planned.steps, START_S)
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
        return await self.run_client(identity, stdio, planned, ("--socket", SOCKET), ())

    async def run_client(
        self,
        identity: str,
        stdio: Stdio,
        planned: plan.Planned,
        way: Sequence[str],
        more: Sequence[int],
    ) -> Launched:
        """Run a client of the monitor in the jail, which reaches it by the options `way`."""
        uid = jail.uid_of(self.bundle.id)
        with contextlib.ExitStack() as undo:
            frames = undo.enter_context(memfd(planned.frames))
            report = undo.enter_context(Report(self._reports, uid))
            shape = self.shape(terminal=stdio.terminal)
            client = jail.process(self.bundle, shape)
            client.args = [MONITOR, "exec", *way, "--report", report.inside]
            launched = await self.inner.exec(identity, client, stdio, (int(frames), *more))
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
        """Thaw it, and set its clock."""
        await self.inner.resume()
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._set_clock)

    async def snapshot(self, directory: str) -> None:
        """Save the guest as it runs, and its disk, in `directory`; it stands still meanwhile.

        Unsupported where that cannot be done, Unavailable if it did not succeed.
        """
        await asyncio.to_thread(lambda: self._snapshot(directory))

    def _snapshot(self, directory: str) -> None:
        pid = self._running()
        if cards.read(self._reports).changed:
            raise Conflict("its networks have changed since it was started: restart it first")
        if any(owner for owner, _ in hotplug.read(f"{self._reports}/{hotplug.NAME}").values()):
            raise Conflict("other workloads run in this guest, which cannot be saved with it")
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(link.Link(pid))
            connection.set_up(link.settings([(resuming.FREEZE, "1")]))
            undo.callback(connection.set_up, link.settings([(resuming.FREEZE, "0")]))
            self.boundary.save(self.bundle, pid, directory)

    def _set_clock(self) -> None:
        with link.Link(self._running()) as connection:
            connection.set_up(link.clock(time.time_ns()))
            # An engine that died while it saved the guest has left it frozen from inside.
            connection.set_up(link.settings([(resuming.FREEZE, "0")]))

    async def update(self, resources: Resources) -> None:
        """Apply changed limits: of memory and tasks in the guest too, of processors outside.

        Conflict for more memory or processors than the guest was booted with.
        """
        linux = msgspec.structs.replace(self.bundle.spec.linux, resources=resources)
        spec = msgspec.structs.replace(self.bundle.spec, linux=linux)
        wanted = dataclasses.replace(self.bundle, spec=spec)
        shape = self.boundary.shape(wanted, terminal=False)
        await asyncio.to_thread(self._update_inside, resources)
        limited = jail.resources(resources, jail.with_files(self.bundle, shape))
        limited.memory = None
        await self.inner.update(limited)

    def _update_inside(self, resources: Resources) -> None:
        limit = resources.memory.limit if resources.memory is not None else None
        booted = int(noted(self._reports, "memory") or 0)
        if limit is not None and booted and limit > booted:
            raise Conflict(
                f"the guest was started with {booted >> 20} MiB of memory: more than that takes a "
                "restart with --memory"
            )
        interior = self.interior()
        cpu = resources.cpu
        if cpu is not None and cpu.quota and cpu.quota > 0:
            processors = math.ceil(cpu.quota / (cpu.period or 100_000))
            if processors > (present := interior.processors()):
                raise Conflict(
                    f"the guest was started with {present} processor{'s' * (present > 1)}: more "
                    "than that takes a restart with --cpus"
                )
        tasks = resources.pids.limit if resources.pids is not None else None
        interior.limit(memory=limit, tasks=tasks)
        if limit is not None and booted:
            wanted = booted if limit <= 0 else min(booted, limit + KERNELS_OWN)
            note(self._reports, "wanted", str(wanted))
            self.boundary.resize(self._running(), self._cards(), wanted)

    def _cards(self) -> int:
        return int(noted(self._reports, "cards") or 0)

    def wires(self) -> cards.Running:
        """Its network cards; Conflict if it is paused, Unavailable if it does not run."""
        pid = self._running()
        return cards.Running(self._reports, pid, self.boundary.cards(pid, self._cards()))

    def rewrite_files(self) -> None:
        """Write the engine's files of /etc anew, as they are now; blocks."""
        program = Program()
        plan.plan_files(program, plan.engine_files(self.bundle.spec), self._base())
        with link.Link(self._monitor()) as connection:
            connection.set_up(program)

    def _base(self) -> str:
        return ""

    def _monitor(self) -> int:
        return self._running()

    def given_back(self) -> int:
        """Bytes of its memory that the guest has given back to the host; blocks."""
        booted, wanted = (int(noted(self._reports, one) or 0) for one in ("memory", "wanted"))
        if not wanted or wanted == booted:
            return 0
        return self.boundary.given_back(self._running(), self._cards(), booted)

    def stats(self) -> dict[str, Any]:
        """Usage of guest and monitor together, in the shape of Docker's statistics."""
        return self.inner.stats()

    def processes(self) -> list[int]:
        """Process ids on the host: the monitor's and its guest's."""
        return self.inner.processes()

    def oom_kills(self) -> int:
        """How many the host's kernel has killed for want of memory, or, by the end, the guest's."""
        return self.inner.oom_kills() or self.inside_kills()

    def inside_kills(self) -> int:
        """How many processes the guest's own kernel had killed for want of memory when it ended."""
        found = self._detail().get("oom_kills", 0)
        return found if isinstance(found, int) and found > 0 else 0

    def failure(self) -> str:
        """Why the guest itself failed, with its console's last words; "" if it did not."""
        detail = self._detail()
        text, console = detail.get("text"), detail.get("console")
        if detail.get("reason") != "failed" or not isinstance(text, str):
            return ""
        return text[:200] + last_words(console if isinstance(console, str) else "")

    def _detail(self) -> dict[str, Any]:
        """What the monitor wrote at its end, or nothing. It is believed no more than the guest."""
        try:
            found = json.loads(noted(self._reports, "detail") or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def memory(self) -> int:
        """Bytes of memory that the guest was started with, 0 if that is not known."""
        return int(noted(self._reports, "memory") or 0)

    def interior(self, *, shown: bool = False) -> Interior:
        """Files, processes and limits inside; `shown`: of one that was only shown.

        Conflict if it is paused, Unavailable if it does not run.
        """
        return Interior(self._running(), shown=shown)

    def _running(self) -> int:
        state = self.state()
        if state.status == "paused":
            raise Conflict(f"container {self.bundle.id} is paused: its kernel stands still")
        if state.status != "running" or not state.pid:
            raise Unavailable(f"container {self.bundle.id} does not run")
        return state.pid

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of one that does not run; for any thread."""
        self.inner.dispose(timeout_s)


def native_program(name: str) -> str:
    """The path of one of our native programs; Unsupported if it was not built."""
    path = f"{os.path.dirname(os.path.abspath(str(_native.__file__)))}/{name}"
    if not os.access(path, os.X_OK):
        raise Unsupported(f"{path} is not there: build it with `make -C native`")
    return path


def memfd(data: bytes) -> OwnedFd:
    """A file of memory with these bytes, at its start."""
    fd = OwnedFd(os.memfd_create("frames", os.MFD_CLOEXEC))
    view = memoryview(data)
    while view:
        view = view[os.write(int(fd), view) :]
    os.lseek(int(fd), 0, os.SEEK_SET)
    return fd


def _places(
    bundle: Bundle, machine: plan.Machine, shares: files.Shares | None
) -> dict[str, tuple[str, bool]]:
    """Where in the guest files of the host are, and whether they can be written; for members."""
    found = shares.places() if shares else {}
    for position, source in machine.sources.items():
        if isinstance(source, plan.Disk):
            mount = bundle.spec.mounts[position]
            bases = (one for one in bundle.disks if f"{mount.source}/".startswith(f"{one}/"))
            found |= dict.fromkeys(bases, (f"/volumes/{position}", not source.readonly))
    return found


async def own_disk(path: str | None) -> OwnedFd:
    """The writable disk, locked: two kernels with one file system would destroy it. flock(2)."""
    assert path is not None
    fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    deadline = time.monotonic() + _DISK_S
    while True:
        try:
            fcntl.flock(int(fd), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                fd.close()
                raise Conflict(f"another guest still uses the disk {path}") from None
            await asyncio.sleep(0.02)
        except BaseException:
            fd.close()
            raise


def _detail_mount(directory: str, uid: int) -> Mount:
    """Where the monitor writes how the guest ended."""
    path = f"{directory}/detail"
    with open(path, "wb") as file:
        os.fchown(file.fileno(), uid, uid)
    return Mount(_DETAIL, path, "bind", ["bind", "rw", "nosuid", "nodev", "noexec"])


def note(directory: str, name: str, text: str) -> None:
    """Write down something about a running guest."""
    with open(f"{directory}/{name}", "w", encoding="utf-8") as file:
        file.write(text)


def noted(directory: str, name: str) -> str:
    """A note, or what the jail wrote; "" without one."""
    try:
        with open(f"{directory}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(_DETAIL_MAX)
    except OSError:
        return ""


def reports_mount(directory: str) -> Mount:
    """Where a jail finds the sockets that are reported to."""
    options = ["bind", "ro", "nosuid", "nodev", "noexec"]
    return Mount(INSIDE, directory, "bind", options)
