"""A whole machine behind the seam: QEMU's q35 in a jail, booting from its own disks.

    holder ─▶ jail ─▶ qemu ── serial line = the jail's terminal (logs, attach)
                        ├── control: <run directory>/control.sock, ours, listening (QMP)
                        ├── screen: <run directory>/screen/vnc.sock (VNC), if it has one
                        └── taps of the workload's network

There is no monitor of ours and nothing of ours inside. SIGTERM presses the power button; SIGKILL
pulls the plug.
"""

import asyncio
import contextlib
import glob
import os
import socket
from collections.abc import AsyncIterator
from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any

from bulkhead.boundaries import jail, microvm_syscalls
from bulkhead.boundaries.container import Container
from bulkhead.boundaries.vmm import q35, qemu
from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.boundaries.vmm.qmp import Qmp
from bulkhead.boundary.seam import Bundle, InstanceState, Launched, Stdio, WholeMachine
from bulkhead.errors import BulkheadError, Conflict, Invalid, Unavailable, Unsupported
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Device, Mount, Process, Resources

if TYPE_CHECKING:
    from bulkhead.boundaries.guest.instance import GuestBoundary

OVERHEAD = 256 << 20
"""Bytes of QEMU itself, its translated code and its disks' caches."""
CODE = "/boot/code"
SCREEN = "/run/screen"
CONTROL_FD = 10
LINK = "link.sock"
_FIRST_TAP_FD = 11
_TASKS = 120
_QEMU_DATA = "/usr/share/qemu"
_FIRMWARE = ("bios-256k.bin", "vgabios-stdvga.bin", "kvmvapic.bin", "keymaps/en-us")
"""QEMU's own files that it may look for."""
_PLACES = ("/usr/share/qemu", "/usr/share/seabios")
_CONTROL_S = 20.0


def shape(machine: WholeMachine) -> jail.Jail:
    """The jail without its files."""
    devices = []
    if acceleration().name == "kvm":
        devices.append(Device("/dev/kvm", "c", 10, 232, file_mode=0o666))
    return jail.Jail(
        root=jail.JailRoot("", ""),
        args=(),
        seccomp=microvm_syscalls.profile(),
        disks=(),
        guest_bytes=machine.memory_bytes,
        overhead_bytes=OVERHEAD,
        tasks=_TASKS,
        terminal=True,
        devices=devices,
    )


def control_path(directory: str) -> str:
    """Where the engine talks to the QEMU of the workload with this run directory."""
    return f"{directory}/control.sock"


class Machine:
    """One whole machine; all of the container's, but start, signals and exec."""

    def __init__(self, boundary: "GuestBoundary", bundle: Bundle, inner: Container) -> None:
        assert bundle.machine is not None
        self.boundary = boundary
        self.bundle = bundle
        self.inner = inner
        self.machine = bundle.machine

    # --- seam ------------------------------------------------------------------------------

    async def start(self, stdio: Stdio) -> Launched:
        """Switch it on. It has begun to boot; what comes of that is on its serial line."""
        bundle, uid = self.bundle, jail.uid_of(self.bundle.id)
        prepared = await asyncio.to_thread(_prepare, self.boundary, bundle)
        with contextlib.ExitStack() as undo:
            for nic in bundle.nics:
                undo.callback(nic.tap.close)
            control = undo.enter_context(_listen(control_path(bundle.directory)))
            fds = [control.fileno(), *(int(nic.tap) for nic in bundle.nics)]
            if self.machine.link:
                linked = undo.enter_context(_listen(f"{bundle.directory}/{LINK}"))
                fds.append(linked.fileno())
            inside = jail.jail_bundle(bundle, prepared, tuple(fds))
            if self.machine.screen:
                inside.spec.mounts.append(_screen(bundle.directory, uid))
            self.inner.bundle = inside
            launched = await self.inner.start(stdio)
        try:
            # QEMU greets once its devices are made: what it cannot open, it has said by then.
            async with self.control():
                pass
        except BulkheadError as error:
            with contextlib.suppress(BulkheadError):
                await self.boundary.launcher.signal(bundle.id, SIGKILL)
            with contextlib.suppress(BulkheadError):
                await self.inner.delete(force=True)
            raise Unavailable(
                f"QEMU did not start the machine: {error.message}; see its log"
            ) from error
        self._pin()
        return launched

    @contextlib.asynccontextmanager
    async def control(self, timeout_s: float = _CONTROL_S) -> AsyncIterator[Qmp]:
        """A conversation with QEMU; Conflict if it does not run, Unavailable if it is silent."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            directory = os.open(self.bundle.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            with OwnedFd(directory) as folder:
                try:
                    path = f"/proc/self/fd/{int(folder)}/control.sock"
                    await asyncio.get_running_loop().sock_connect(sock, path)
                except OSError as error:
                    raise Conflict(f"{self.bundle.id[:12]} does not answer: {error}") from error
            try:
                async with asyncio.timeout(timeout_s), Qmp(sock) as qmp:
                    yield qmp
            except TimeoutError:
                raise Unavailable(f"QEMU did not answer within {timeout_s:g} s") from None

    def state(self) -> InstanceState:
        """What the kernel says now."""
        return self.inner.state()

    async def kill(self, signal: int, *, everyone: bool = False) -> None:
        """SIGTERM: the power button. SIGINT: the reset button. SIGKILL: the plug."""
        if signal == SIGKILL:
            await self.inner.kill(SIGKILL, everyone=everyone)
            return
        commands: dict[int, str] = {SIGTERM: "system_powerdown", SIGINT: "system_reset"}
        if signal not in commands:
            raise Invalid(
                f"a whole machine has no signal {signal}: SIGTERM is its power button, SIGINT its "
                "reset button, SIGKILL its plug"
            )
        async with self.control() as qmp:
            await qmp.execute(commands[signal])

    async def delete(self, *, force: bool = False) -> None:
        """Remove the control group and end what is in it."""
        await self.inner.delete(force=force)

    async def exec(self, identity: str, process: Process, stdio: Stdio) -> Launched:
        """Unsupported: nothing of ours is inside."""
        raise Unsupported(
            "a whole machine runs no commands from outside: bulkhead vm console, or ssh"
        )

    # --- optional --------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freeze QEMU."""
        await self.inner.pause()

    async def resume(self) -> None:
        """Thaw it."""
        await self.inner.resume()

    async def update(self, resources: Resources) -> None:
        """Apply changed limits of processors and disks; Conflict for memory."""
        memory = resources.memory
        if memory is not None and memory.limit not in (None, self.machine.memory_bytes):
            raise Conflict("the memory of a running machine cannot change: stop it, then vm update")
        limited = jail.resources(resources, shape(self.machine))
        limited.memory = None
        await self.inner.update(limited)

    def stats(self) -> dict[str, Any]:
        """Usage of QEMU and what runs in it, in the shape of Docker's statistics."""
        return self.inner.stats()

    def processes(self) -> list[int]:
        """QEMU's process id on the host."""
        return self.inner.processes()

    def oom_kills(self) -> int:
        """Whether the host's kernel has killed it for want of memory."""
        return self.inner.oom_kills()

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of one that does not run; for any thread."""
        self.inner.dispose(timeout_s)

    def _pin(self) -> None:
        """Give each of its processors one of the host's, by the threads' names (debug-threads).

        A machine of one processor that is emulated has a thread for "ALL CPUs".
        """
        if not self.machine.pinned:
            return
        pinned = self.machine.pinned
        for pid in self.inner.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/comm", encoding="utf-8") as file:
                        words = file.read().replace("/", " ").split()
                    if words[:2] == ["ALL", "CPUs"]:
                        os.sched_setaffinity(int(task), pinned)
                    elif words[:1] == ["CPU"] and words[1].isdecimal():
                        number = int(words[1])
                        os.sched_setaffinity(int(task), {pinned[number % len(pinned)]})


def _prepare(boundary: "GuestBoundary", bundle: Bundle) -> jail.Jail:
    """The jail with its files and QEMU's command line; runs in a thread."""
    machine, uid = bundle.machine, jail.uid_of(bundle.id)
    assert machine is not None
    files: list[tuple[str, bool]] = []

    def place(path: str, *, writable: bool) -> str:
        if writable:
            os.chown(path, uid, uid)
            # Its directory keeps people out; qemu-img's jails have other users.
            os.chmod(path, 0o644)
        files.append((path, writable))
        return f"/disks/{len(files) - 1}"

    drives = [
        q35.Drive(
            place(one.path, writable=not one.readonly),
            one.format,
            place(one.base, writable=False) if one.base else "",
            one.readonly,
            one.cdrom,
        )
        for one in machine.drives
    ]
    found = acceleration()
    described = q35.Machine(
        drives=drives,
        memory_bytes=machine.memory_bytes,
        vcpus=machine.vcpus,
        control_fd=CONTROL_FD,
        cards=[qemu.Card(_FIRST_TAP_FD + n, nic.mac) for n, nic in enumerate(bundle.nics)],
        accelerator=found.name,
        code=CODE if machine.code else "",
        nvram=place(machine.nvram, writable=True) if machine.code else "",
        sata=machine.sata,
        screen=machine.screen,
        link_fd=_FIRST_TAP_FD + len(bundle.nics) if machine.link else -1,
        reserved=machine.reserved,
        iops=machine.iops,
        bytes_per_second=machine.bytes_per_second,
    )
    given: dict[str, str | bytes] = {CODE: os.path.realpath(machine.code)} if machine.code else {}
    root = boundary.roots.make("vm", programs(), given | firmware())
    base = shape(machine)
    return jail.Jail(
        root=root, args=q35.argv(described), seccomp=base.seccomp, disks=files,
        guest_bytes=base.guest_bytes, overhead_bytes=base.overhead_bytes, tasks=base.tasks,
        terminal=True, devices=base.devices,
    )  # fmt: skip


def programs() -> dict[str, str]:
    """QEMU, and its translator where that is not built in."""
    translator = glob.glob("/usr/lib/*/qemu/accel-tcg-x86_64.so")
    return {qemu.BINARY: qemu.BINARY} | {path: path for path in translator}


def firmware() -> dict[str, str | bytes]:
    """QEMU's own files that a PC needs, by their place in the jail; Unsupported if absent."""
    found: dict[str, str | bytes] = {}
    for name in _FIRMWARE:
        for folder in _PLACES:
            if os.path.exists(f"{folder}/{name}"):
                found[f"{_QEMU_DATA}/{name}"] = os.path.realpath(f"{folder}/{name}")
                break
        else:
            raise Unsupported(
                f"QEMU's file {name} is missing: apt-get install qemu-system-data seabios"
            )
    return found


def _listen(path: str) -> socket.socket:
    """A listening socket that only this user reaches; QEMU is given it open."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with OwnedFd(folder):
            # By way of the descriptor: the path itself may be longer than a socket's may be.
            sock.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        os.chmod(path, 0o600)
        sock.listen(4)
    except BaseException:
        sock.close()
        raise
    return sock


def _screen(directory: str, uid: int) -> Mount:
    """A directory of the host where QEMU puts the socket of its screen."""
    place = f"{directory}/screen"
    os.makedirs(place, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{place}/vnc.sock")
    os.chown(place, uid, uid)
    return Mount(SCREEN, place, "bind", ["bind", "rw", "nosuid", "nodev", "noexec"])
