"""Templates: a guest that has booted and does nothing, from which others are cloned.

With the translator a template is an image of the whole QEMU process (images.py), a file:

    <root>/templates/BOOT-KEY.image      BOOT: of the host, whose kernel's pages are in it

It outlives the engine. With KVM it is two sealed memory files, as long as the engine lives: the
guest's memory, and the state of its devices, which a new QEMU loads. Both are mapped copy-on-write
(MAP_PRIVATE): pages that no clone has changed are there once. Nobody in a jail can write to either,
so no clone, whatever it has broken out of, can change what others begin with.

What is the same in all clones must be what may be: the init has spoken to nobody but us, drivers of
disks and cards are loaded but bound to nothing (drivers_autoprobe is off), no file system of a
workload was ever mounted. A clone gets its own entropy and clock with the monitor's greeting, its
addresses and names by its set-up, and its disks and cards are looked at for the first time when
the set-up binds them, so their sizes need not be those of the template's empty ones.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.vmm import images, qemu, qmp
from bulkhead.boundaries.vmm.training import Lesson
from bulkhead.errors import Unavailable
from bulkhead.home import Home
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount

KEPT = 4
"""Templates that stay; each is as much memory or disk as its guest and QEMU used: 70 to 200 MB."""
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BOOT_S = 120.0
_SAVE_S = 60.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Key:
    """What a template and its clones have in common; `files` names kernel, initramfs and QEMU.

    `command` is a hash of the template's command line, which a newer version of ours may change.
    """

    files: str
    memory_bytes: int
    cards: int
    vcpus: int
    accelerator: str
    command: str = ""

    @property
    def imaged(self) -> bool:
        """Whether the whole process is cloned."""
        return self.accelerator == "tcg"


@dataclass(slots=True)
class Template:
    """The image of a process, or (with `state`) a guest's memory and the state of its devices."""

    memory: OwnedFd
    state: OwnedFd | None = None

    def close(self) -> None:
        """Let go; clones go on."""
        self.memory.close()
        if self.state is not None:
            self.state.close()


@dataclass(frozen=True, slots=True)
class Booted:
    """A machine with the key's layout, and disks for the lesson, in the order of their places.

    `pid` is QEMU's; `end`, to be awaited once, ends the machine and gives what its console said.
    """

    pid: int
    disks: tuple[qemu.Disk, ...]
    end: Callable[[], Awaitable[str]]


Boot = Callable[[socket.socket, socket.socket, socket.socket, OwnedFd], Awaitable[Booted]]
"""Start one; the channel, the control socket and its other end, the shared memory file are lent."""
PROC = Mount("/proc", "proc", "proc", ["nosuid", "nodev", "noexec", "ro", "subset=pid"])
"""In the jail: QEMU opens a memory file by its name only, /proc/self/fd/N; images need maps."""


class Templates:
    """The templates of one installation, made when first asked for."""

    def __init__(self, home: Home) -> None:
        self._folder = home.in_root("templates")
        with open(_BOOT_ID, "rb") as file:
            self._boot = hashlib.sha256(file.read()).hexdigest()[:8]
        self._kept: OrderedDict[Key, Template] = OrderedDict()
        self._locks: dict[Key, asyncio.Lock] = {}
        self._making: set[str] = set()
        """Names of images that are being written: not to be cleared away by others' makers."""

    def find(self, key: Key) -> Template | None:
        """The template, if there is one."""
        return self._kept.get(key)

    async def ensure(self, key: Key, teach: Callable[[], Lesson], boot: Boot) -> Template:
        """The template of `key`; if there is none, what `boot` starts gets the lesson."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            found = self._kept.get(key)
            if found is None and key.imaged:
                found = self._open(key)
            if found is None:
                make = self._make_image if key.imaged else _make_state
                found = await make(key, teach(), boot)
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].close()
            return found

    # --- images ----------------------------------------------------------------------------

    def _name(self, key: Key) -> str:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        return f"{self._boot}-{digest}.image"

    def _open(self, key: Key) -> Template | None:
        path = f"{self._folder}/{self._name(key)}"
        try:
            file = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        os.utime(path)
        return Template(file)

    async def _make_image(self, key: Key, lesson: Lesson, boot: Boot) -> Template:
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as undo:
            file, scratch = tempfile.mkstemp(dir=self._folder, prefix=f"{self._boot}-new-")
            image = undo.enter_context(OwnedFd(file))
            removal = undo.enter_context(contextlib.ExitStack())
            removal.callback(os.unlink, scratch)
            self._making.add(os.path.basename(scratch))
            undo.callback(self._making.discard, os.path.basename(scratch))
            with _Machine() as machine:
                booted = await machine.boot(boot, image)

                async def save(control: qmp.Qmp) -> None:
                    await control.execute("stop")
                    await asyncio.to_thread(images.take, booted.pid, int(image))

                await machine.use(booted, lesson, save)
            name = self._name(key)
            os.rename(scratch, f"{self._folder}/{name}")
            removal.pop_all()
            self._making.discard(os.path.basename(scratch))
            used = [*(self._name(one) for one in self._kept), *self._making]
            images.forget_others(self._folder, self._boot, [name, *used], KEPT)
        found = self._open(key)
        if found is None:
            raise Unavailable("the template was removed while it was made")
        return found


class _Machine:
    """The sockets of a machine that becomes a template."""

    def __enter__(self) -> "_Machine":
        self.channel, self._guest_end = socket.socketpair()
        self.control, self._machine_end = socket.socketpair()
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self.channel, self._guest_end, self.control, self._machine_end):
            one.close()

    async def boot(self, boot: Boot, memory: OwnedFd) -> Booted:
        """Start it."""
        booted = await boot(self._guest_end, self._machine_end, self.control, memory)
        self._guest_end.close()
        self._machine_end.close()
        return booted

    async def use(
        self, booted: Booted, lesson: Lesson, save: Callable[[qmp.Qmp], Awaitable[None]]
    ) -> None:
        """Teach it, save it, end it; Unavailable with what its console said."""
        try:
            async with qmp.Qmp(self.control) as control:
                disks = dict(zip(qemu.places(booted.disks, 0), booted.disks, strict=True))
                for place, disk in disks.items():
                    node = qemu.disk_node(disk, place)
                    await control.execute("blockdev-add", **node)
                    await _use_node(control, place, node["node-name"])
                await _teach(self.channel, lesson)
                for place, disk in disks.items():
                    await _use_node(control, place, qemu.empty_name(place))
                    name = qemu.disk_node(disk, place)["node-name"]
                    await control.execute("blockdev-del", **{"node-name": name})
                await save(control)
        except Unavailable as error:
            said = await booted.end()
            raise Unavailable(f"{error}; its console: {said}" if said else str(error)) from error
        except BaseException:
            await booted.end()
            raise
        await booted.end()


async def _use_node(control: qmp.Qmp, place: int, name: str) -> None:
    path = f"/machine/peripheral/{qemu.device_name(place)}"
    await control.execute("qom-set", path=path, property="drive", value=name)


async def _make_state(key: Key, lesson: Lesson, boot: Boot) -> Template:
    with contextlib.ExitStack() as undo:
        memory = undo.enter_context(_memory_file("guest memory", key.memory_bytes))
        state = undo.enter_context(_memory_file("guest state", 0))
        with _Machine() as machine:
            booted = await machine.boot(boot, memory)
            await machine.use(booted, lesson, lambda control: _save(control, state))
        for file in (memory, state):
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(int(file), fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        return Template(memory.duplicate(), state.duplicate())


def _memory_file(name: str, size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(int(fd), size)
    return fd


async def _teach(channel: socket.socket, lesson: Lesson) -> None:
    """Greet the init, and bring the guest to where clones begin."""
    channel.setblocking(False)
    greeting = frames.hello(os.urandom(16), time.time_ns(), os.urandom(32))
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
                        await loop.sock_sendall(channel, greeting + lesson.stages[0].frames)
                    elif greeted:
                        more = lesson.heard(frame)
                        if more is None:
                            return
                        await asyncio.sleep(lesson.pause_s)
                        await loop.sock_sendall(channel, more)
    except TimeoutError:
        raise Unavailable(f"the template's guest has not booted in {_BOOT_S:.0f} s") from None
    except OSError as error:
        raise Unavailable(f"the template's guest: {error.strerror}") from error


async def _save(machine: qmp.Qmp, state: OwnedFd) -> None:
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
    if template.state is None:
        raise ValueError("not a saved guest")
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


def clone_image(template: Template, orders: bytes) -> tuple[OwnedFd, ...]:
    """Likewise for a clone of an image: the image, and the control socket with `orders` in it."""
    with contextlib.ExitStack() as undo:
        image = template.memory.duplicate()
        undo.callback(image.close)
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        undo.callback(theirs.close)
        ours.sendall(orders)
        undo.pop_all()
        return image, OwnedFd(theirs.detach()), OwnedFd(ours.detach())


def load_commands(state_fd: int) -> bytes:
    """What a clone's QEMU is told to do; it runs as soon as the state is there."""
    return (
        qmp.encode("qmp_capabilities")
        + qmp.encode("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
        + qmp.encode("migrate-incoming", uri=f"fd:{state_fd}")
    )
