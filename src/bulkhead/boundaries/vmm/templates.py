"""Templates: a guest that has booted and does nothing, from which others are cloned.

A template is two sealed memory files: the guest's memory, and the state of its devices. A clone
maps the memory copy-on-write (MAP_PRIVATE) and loads the state, which takes milliseconds instead of
a boot; pages that no clone has changed are there once. Nobody can write to a sealed file, so no
clone, whatever it has broken out of, can change what others begin with.

What is the same in all clones must be what may be: the init has spoken to nobody but us, drivers of
disks and cards are loaded but bound to nothing (drivers_autoprobe is off), no file system of a
workload was ever mounted. A clone gets its own entropy and clock with the monitor's greeting, its
addresses and names by its set-up, and its disks and cards are looked at for the first time when
the set-up binds them, so their sizes need not be those of the template's empty ones.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.vmm import qmp
from bulkhead.errors import Unavailable
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Program
from bulkhead.oci.runtime import Mount

KEPT = 2
"""Templates that stay; each is as much memory as its guest used, some 60 to 90 MB."""
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}
_SETUP = 1
_BOOT_S = 120.0
_SAVE_S = 60.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Key:
    """What a template and its clones have in common; `files` names kernel, initramfs and QEMU."""

    files: str
    memory_bytes: int
    cards: int
    disks: int
    accelerator: str


@dataclass(slots=True)
class Template:
    """Sealed files with memory and device state."""

    memory: OwnedFd
    state: OwnedFd

    def close(self) -> None:
        """Let go; clones go on."""
        self.memory.close()
        self.state.close()


Boot = Callable[[socket.socket, socket.socket, OwnedFd], Awaitable[Callable[[], Awaitable[str]]]]
"""Start a machine with the key's layout: channel, control and shared memory file (lent) are given.
The result is to be awaited once: it ends the machine, and tells what its console said."""
PROC = Mount("/proc", "proc", "proc", ["nosuid", "nodev", "noexec", "ro", "subset=pid"])
"""In the jail, for QEMU opens a memory file by its name only: /proc/self/fd/N."""


class Templates:
    """The templates of one engine, made when first asked for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, Template] = OrderedDict()
        self._locks: dict[Key, asyncio.Lock] = {}

    def find(self, key: Key) -> Template | None:
        """The template, if there is one."""
        return self._kept.get(key)

    async def ensure(self, key: Key, modules: Sequence[str], boot: Boot) -> Template:
        """The template of `key`, made by `boot` if there is none; `modules` are loaded in it."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = await _make(key, modules, boot)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].close()
            return found


async def _make(key: Key, modules: Sequence[str], boot: Boot) -> Template:
    with contextlib.ExitStack() as undo:
        memory = _memory_file("guest memory", key.memory_bytes)
        undo.callback(memory.close)
        state = _memory_file("guest state", 0)
        undo.callback(state.close)
        channel, guest_end = socket.socketpair()
        undo.enter_context(channel)
        control, machine_end = socket.socketpair()
        undo.enter_context(control)
        with guest_end, machine_end:
            end = await boot(guest_end, machine_end, memory)
        try:
            await _settle(channel, modules)
            await _save(control, state)
        except Unavailable as error:
            said = await end()
            raise Unavailable(f"{error}; its console: {said}" if said else str(error)) from error
        except BaseException:
            await end()
            raise
        await end()
        for file in (memory, state):
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(int(file), fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        return Template(memory.duplicate(), state.duplicate())


def _memory_file(name: str, size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(int(fd), size)
    return fd


async def _settle(channel: socket.socket, modules: Sequence[str]) -> None:
    """Greet the init, and bring the guest to where clones begin."""
    program = Program()
    program.write("bind no drivers", AT_FDCWD, "/sys/bus/virtio/drivers_autoprobe", "0")
    for path in modules:
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = program.call(f"open {path}", "openat", AT_FDCWD, f"/initramfs{path}", flags, 0)
        program.call(f"load module {path}", "finit_module", fd, "", 0)
        program.call("close", "close", fd)
    compiled = program.compile()
    channel.setblocking(False)
    nonce = os.urandom(16)
    greeting = frames.hello(nonce, time.time_ns(), os.urandom(32))
    decoder = frames.Decoder()
    loop = asyncio.get_running_loop()
    greeted = False
    try:
        async with asyncio.timeout(_BOOT_S):
            while True:
                data = await loop.sock_recv(channel, 65536)
                if not data:
                    raise Unavailable("the template's guest has ended")
                for frame in decoder.feed(data):
                    if frame.type == frames.Type.GUEST_HELLO and not greeted:
                        greeted = True
                        setup = frames.run(_SETUP, compiled.data, frames.Mode.SETUP)
                        await loop.sock_sendall(channel, greeting + setup)
                    elif frame.type == frames.Type.FAILED:
                        raise frames.failure(frame, compiled.steps)
                    elif frame.type == frames.Type.DONE:
                        return
    except TimeoutError:
        raise Unavailable(f"the template's guest has not booted in {_BOOT_S:.0f} s") from None
    except OSError as error:
        raise Unavailable(f"the template's guest: {error.strerror}") from error


async def _save(control: socket.socket, state: OwnedFd) -> None:
    async with qmp.Qmp(control) as machine:
        await machine.execute("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
        await machine.execute("getfd", fds=[int(state)], fdname="state")
        await machine.execute("migrate", uri="fd:state")
        deadline = time.monotonic() + _SAVE_S
        while True:
            answer = await machine.execute("query-migrate")
            status = answer.get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise Unavailable(f"saving a template: {status}: {answer.get('error-desc', '')}")
            await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Clone:
    """What one clone's QEMU has open, with the numbers that it has them by."""

    fds: tuple[OwnedFd, ...]
    memory_file: str
    control_fd: int


def clone(template: Template, first_fd: int) -> Clone:
    """Descriptors for one clone, to be its `first_fd` and those that follow.

    The commands that load the state lie in the control socket already, whose other end stays open
    in QEMU itself: nobody needs to speak to it.
    """
    with contextlib.ExitStack() as undo:
        memory = template.memory.duplicate()
        undo.callback(memory.close)
        # A description of its own, for it has an offset.
        state = OwnedFd(os.open(f"/proc/self/fd/{int(template.state)}", os.O_RDONLY | os.O_CLOEXEC))
        undo.callback(state.close)
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        undo.callback(theirs.close)
        ours.sendall(load_commands(first_fd + 1))
        undo.pop_all()
        fds = (memory, state, OwnedFd(theirs.detach()), OwnedFd(ours.detach()))
    return Clone(fds, f"/proc/self/fd/{first_fd}", first_fd + 2)


def load_commands(state_fd: int) -> bytes:
    """What a clone's QEMU is told to do; it runs as soon as the state is there."""
    return (
        qmp.encode("qmp_capabilities")
        + qmp.encode("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
        + qmp.encode("migrate-incoming", uri=f"fd:{state_fd}")
    )
