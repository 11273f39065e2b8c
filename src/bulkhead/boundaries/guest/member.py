"""A workload in the guest of another: a pod.

Its jail has nothing but a client of that guest's monitor, which carries its streams and ends as it
does; layers, writable disk and volumes are put into the running guest (hotplug.py), binds come by a
file server of its own, and pods.py says what the guest does. When all that it ran has ended, the
guest's monitor has its places unmounted; until then it holds the lock of the disk. It ends with
the guest, with code 137.

    <workload run directory>/guest/process     what the guest calls its first process
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import time

import msgspec

from bulkhead.boundaries import jail, sandbox_syscalls
from bulkhead.boundaries.guest import disks, files, hotplug, link, plan, pods
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    START_S,
    Guest,
    memfd,
    native_program,
    note,
    noted,
    own_disk,
    reports_mount,
)
from bulkhead.boundaries.guest.interior import Interior, Seat
from bulkhead.boundaries.guest.report import Report
from bulkhead.boundary.seam import Bundle, Launched, Stdio, Within
from bulkhead.errors import BulkheadError, Conflict, Unavailable, Unsupported
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Linux, Namespace, Process, Resources

_PROCESS = "process"
_OVERHEAD = 16 << 20
_TASKS = 4
_FAREWELL_S = 20.0


def jail_of(bundle: Bundle, *, terminal: bool) -> jail.Jail:
    """The client's."""
    return jail.Jail(
        root=jail.JailRoot("", ""),
        args=(),
        seccomp=sandbox_syscalls.profile(),
        disks=(),
        guest_bytes=0,
        overhead_bytes=_OVERHEAD,
        tasks=_TASKS,
        terminal=terminal,
    )


def own_bundle(bundle: Bundle) -> Bundle:
    """Without what concerns the guest: limits hold inside, the network is the guest's."""
    linux: Linux = msgspec.structs.replace(
        bundle.spec.linux, resources=None, namespaces=[Namespace("network")]
    )
    return dataclasses.replace(bundle, spec=msgspec.structs.replace(bundle.spec, linux=linux))


class Member(Guest):
    """One workload in the guest that `bundle.within` names."""

    @property
    def within(self) -> Within:
        """The guest."""
        assert self.bundle.within is not None
        return self.bundle.within

    @property
    def _host(self) -> str:
        return f"{self.within.directory}/guest"

    def _board(self) -> hotplug.Board:
        within = self.within
        cards = int(noted(self._host, "cards") or 0)
        return hotplug.Board(self._host, within.pid, self.boundary.plugs(within.pid, cards))

    def _seat(self) -> Seat:
        process = int(noted(self._reports, _PROCESS) or 0)
        if not process:
            raise Unavailable(f"container {self.bundle.id} does not run in its guest")
        identity = self.bundle.id
        return Seat(process, pods.group(identity), pods.base(identity))

    def shape(self, *, terminal: bool) -> jail.Jail:
        """The client's jail."""
        return jail_of(self.bundle, terminal=terminal)

    # --- seam ------------------------------------------------------------------------------

    async def start(self, stdio: Stdio) -> Launched:
        """Run the configured process in the guest."""
        bundle, within = self.bundle, self.within
        disk, size = bundle.rootfs.disk, bundle.rootfs.disk_size
        if disk is None or bundle.saved:
            raise Unsupported("a saved workload has a guest of its own: it cannot join another's")
        uid, home = jail.uid_of(within.id), self.boundary.home
        await asyncio.to_thread(lambda: disks.make_disk(home, disk, size, uid=uid))
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, self._detach)
            with contextlib.ExitStack() as lent:
                launched = await self._begin(stdio, lent.enter_context(await own_disk(disk)), lent)
            undo.pop_all()
        return launched

    async def _begin(self, stdio: Stdio, lock: OwnedFd, lent: contextlib.ExitStack) -> Launched:
        bundle, within = self.bundle, self.within
        machine = await asyncio.to_thread(self._attach)
        known = (*plan.engine_files(bundle.spec), *machine.sources)
        shares = files.Shares(bundle, known)
        machine = dataclasses.replace(machine, sources={**shares.sources, **machine.sources})
        context = self._context()
        planned = pods.make(
            bundle,
            machine,
            context=context,
            terminal=stdio.terminal,
            rows=stdio.rows,
            columns=stdio.columns,
        )
        connection = lent.enter_context(await asyncio.to_thread(link.Link, within.pid))
        fds = [int(lock)]
        if shares:
            program = native_program("bulkhead-files")
            memory = int(noted(self._host, "memory") or 0)
            served = await shares.serve(self.inner, self.boundary.roots, program, memory)
            fds.append(int(lent.enter_context(served)))

        def set_up() -> None:
            connection.become_member(planned.farewell, fds)
            connection.set_up(planned.setup, context=context)
            for number, share in shares.mounts().items():
                connection.mount(number, f"{machine.base}/shares/{number}", share.options)

        await asyncio.to_thread(set_up)
        return await self._launch(stdio, connection, planned.main)

    def _attach(self) -> plan.Machine:
        """Put its disks into the guest."""
        bundle, within = self.bundle, self.within
        uid = jail.uid_of(within.id)
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        assert disk is not None
        known = json.loads(noted(self._host, "places") or "{}")
        inner = pods.inner_sources(bundle, pods.base(bundle.id), known)
        apart = {base: image for base, image in bundle.disks.items() if base not in known}
        own = dataclasses.replace(bundle, disks=apart)
        volumes = plan.volume_disks(own, str)
        for image, _ in volumes.files:
            os.chown(image, uid, uid)
        images = [(disk, True), *volumes.files, *((path, False) for path in layers)]
        first, *devices = self._board().take(bundle.id, images)
        count = len(volumes.files)
        sources = {**inner, **plan.volume_disks(own, devices.__getitem__).sources}
        return plan.Machine(
            layers=tuple(devices[count:]),
            upper=first,
            modules=tuple(self.boundary.share_modules(bundle)),
            sources=sources,
            base=pods.base(bundle.id),
            group=pods.group(bundle.id),
        )

    def _detach(self) -> None:
        """Take its disks out of the guest, when that has let go of them; else they stay there."""
        disk = self.bundle.rootfs.disk
        if disk is None or not os.path.exists(disk):
            return
        with OwnedFd(os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd:
            deadline = time.monotonic() + _FAREWELL_S
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(int(fd), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            with contextlib.suppress(BulkheadError, OSError):
                self._board().give_back(self.bundle.id)

    def _context(self) -> int:
        """The guest's id of the process whose namespaces it joins; 0 for none."""
        joined = self.within.joined
        if not joined:
            return 0
        if joined == self.within.directory:
            return plan.MAIN
        process = int(noted(f"{joined}/guest", _PROCESS) or 0)
        if not process:
            raise Conflict("cannot join the namespaces of a container that does not run")
        return process

    async def _launch(self, stdio: Stdio, connection: link.Link, main: plan.Planned) -> Launched:
        """The client, which has the connection and ends as the process does."""
        bundle = self.bundle
        uid = jail.uid_of(bundle.id)
        with contextlib.ExitStack() as undo:
            frames = undo.enter_context(memfd(main.frames))
            report = undo.enter_context(Report(self._reports, uid))
            fds = (int(frames), connection.fileno())
            root = self.boundary.roots.make("member", {MONITOR: native_program("bulkhead-monitor")})
            shape = dataclasses.replace(jail_of(bundle, terminal=stdio.terminal), root=root)
            inside = jail.jail_bundle(own_bundle(bundle), shape, fds)
            inside.spec.mounts.append(reports_mount(self._reports))
            assert inside.spec.process is not None
            inside.spec.process.args = [
                MONITOR, "exec", "--channel", str(jail.FIRST_FD + 1), "--member",
                "--report", report.inside,
            ]  # fmt: skip
            self.inner.bundle = inside
            launched = await self.inner.start(stdio)
            try:
                await self._reported(launched, report, main.steps, START_S)
            except BaseException:
                await self._discard(bundle.id)
                raise
            note(self._reports, _PROCESS, str(report.process))
        return launched

    async def delete(self, *, force: bool = False) -> None:
        """Remove the control group, end what is in it, and take the disks out of the guest."""
        await super().delete(force=force)
        await asyncio.to_thread(self._detach)

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of one that does not run; for any thread."""
        super().dispose(timeout_s)
        self._detach()

    async def exec(self, identity: str, process: Process, stdio: Stdio) -> Launched:
        """Run `process` beside the workload's first."""
        seat = self._seat()
        planned = plan.exec_(
            self.bundle,
            process,
            terminal=stdio.terminal,
            rows=stdio.rows,
            columns=stdio.columns,
            group=seat.group,
            context=seat.process,
        )
        connection = await asyncio.to_thread(link.Link, self.within.pid)
        with connection:
            more = ("--channel", str(jail.FIRST_FD + 1))
            return await self.run_client(identity, stdio, planned, more, (connection.fileno(),))

    # --- optional --------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freeze its processes inside, and its client."""
        await asyncio.to_thread(self._freeze, "1")
        await self.inner.pause()

    async def resume(self) -> None:
        """Thaw them."""
        await self.inner.resume()
        await asyncio.to_thread(self._freeze, "0")

    def _freeze(self, value: str) -> None:
        seat = self._seat()
        Interior(self.within.pid, seat=seat).set([(f"{seat.group}/cgroup.freeze", value)])

    async def snapshot(self, directory: str) -> None:
        """Unsupported: a guest is saved as a whole."""
        raise Unsupported("a workload in the guest of another cannot be saved by itself")

    async def update(self, resources: Resources) -> None:
        """Apply changed limits, inside the guest."""
        limits = pods.cgroup_limits(resources)
        group = self._seat().group
        if resources.pids is not None:
            most = resources.pids.limit
            limits["pids.max"] = str(most) if most > 0 else "max"
        inside = self.interior()
        values = [(f"{group}/{name}", value) for name, value in limits.items()]
        await asyncio.to_thread(inside.set, values)

    def _base(self) -> str:
        return pods.base(self.bundle.id)

    def _monitor(self) -> int:
        return self.within.pid

    def given_back(self) -> int:
        """Nothing: the memory is that of the guest's first workload."""
        return 0

    def interior(self, *, shown: bool = False) -> Interior:
        """Files, processes and limits inside. Conflict if it is paused, Unavailable if it ended."""
        self._running()
        return Interior(self.within.pid, seat=self._seat())
