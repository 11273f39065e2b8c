"""A holder and a keeper of a test's own, and trivial programs for them."""

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.home import Home
from bulkhead.keeper import logs
from bulkhead.keeper.client import (
    KeeperClient,
    LogOptions,
    StdioMeta,
    make_stdio,
    supervise_keeper,
)
from bulkhead.keeper.holder import Exit, HolderClient, ensure_holder
from bulkhead.linux import pidfd
from bulkhead.linux.program import Argument, Compiled, Fd, Program

DEADLINE_S = 60.0
AT_FDCWD = -100
PYTHON = sys.executable
ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Return once `condition()` is true; AssertionError naming `what` after a minute."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < end, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


async def within(awaitable: Awaitable[object]) -> object:
    """The result, TimeoutError after a minute."""
    return await asyncio.wait_for(awaitable, DEADLINE_S)


def stdio_steps(program: Program) -> None:
    """Descriptors 0, 1, 2 of the request become the standard streams."""
    for n in range(3):
        program.call(f"stdio {n}", "dup3", Fd(n), n, 0)


def terminal_steps(program: Program) -> None:
    """A terminal of the host's devpts becomes the standard streams; its master goes away."""
    master = program.call("ptmx", "openat", AT_FDCWD, "/dev/ptmx", os.O_RDWR | os.O_CLOEXEC, 0)
    program.call("unlock", "ioctl", master, 0x40045431, bytes(4))
    slave = program.call("peer", "ioctl", master, 0x5441, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    program.call("session", "setsid")
    program.call("controlling terminal", "ioctl", slave, 0x540E, 0)
    for n in range(3):
        program.call(f"stdio {n}", "dup3", slave, n, 0)
    program.send_fd("master", "pty", master)


def command(argv: Sequence[str], prepare: Callable[[Program], None] | None = None) -> Compiled:
    """A program that runs `argv` (an absolute path first)."""
    program = Program()
    if prepare is not None:
        prepare(program)
    program.exec("exec", [argv[0]], argv, ENV)
    return program.compile()


def calls(*steps: tuple[str, str, tuple[Argument, ...]]) -> Callable[[Program], None]:
    """Steps that are plain system calls: (name, system call, arguments)."""

    def prepare(program: Program) -> None:
        for step, name, args in steps:
            program.call(step, name, *args)

    return prepare


@dataclass
class Rig:
    """What a test works with."""

    home: Home
    holder: HolderClient
    keeper: KeeperClient
    directory: str
    exits: dict[str, Exit] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)

    async def launch(
        self,
        identity: str,
        compiled: Compiled,
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        keep: Sequence[int] = (),
        meta: bytes = b"",
        maps: str = "",
        record: str = "",
    ) -> Launched:
        """Launch; the process is killed at the end of the test if it lives then."""
        launched = await self.holder.launch(
            LaunchRequest(
                id=identity,
                program=compiled.data,
                clone_flags=flags,
                fds=fds,
                steps=compiled.steps,
                record=record,
                keep=keep,
                meta=meta,
                uid_map=maps,
                gid_map=maps,
            )
        )
        self.pids.append(launched.pid)
        return launched

    async def run_kept(
        self,
        identity: str,
        argv: Sequence[str],
        *,
        tty: bool = False,
        stdin_open: bool = False,
        stdin_once: bool = False,
        max_size: int = 0,
        max_file: int = 1,
        driver: str = "json-file",
    ) -> Launched:
        """Run `argv` with its stdio kept and logged."""
        log = LogOptions(
            driver=driver, path=self.log(identity), max_size=max_size, max_file=max_file
        )
        meta = StdioMeta(tty=tty, stdin_open=stdin_open, stdin_once=stdin_once, log=log)
        with make_stdio(meta) as stdio:
            fds = () if tty else (stdio.stdin, stdio.stdout, stdio.stderr)
            return await self.launch(
                identity,
                command(argv, terminal_steps if tty else stdio_steps),
                fds,
                keep=stdio.keep,
                meta=stdio.meta,
            )

    def log(self, identity: str) -> str:
        """The path of a process's log."""
        return f"{self.directory}/{identity.replace('/', '-')}.log"

    async def logged(self, identity: str, stream: int = 0) -> bytes:
        """The bytes logged so far, of one stream or of both."""
        return b"".join(
            [
                r.data
                async for r in logs.read(self.log(identity))
                if not stream or r.stream == stream
            ]
        )

    async def exited(self, identity: str) -> Exit:
        """The end of a process, once it has come."""
        await eventually(lambda: identity in self.exits, f"{identity} exits")
        return self.exits[identity]


@asynccontextmanager
async def rig(directory: Path, *, keeper: bool = False, idle_s: int = 10) -> AsyncIterator[Rig]:
    """A holder (and a keeper) in `directory`; all ended afterwards."""
    home = Home(f"{directory}/root", f"{directory}/run")
    holder = await ensure_holder(home, idle_s=idle_s)
    client = KeeperClient(home)
    it = Rig(home, holder, client, str(directory))
    holder.on_exit(lambda event: it.exits.__setitem__(event.id, event))
    try:
        if keeper:
            await supervise_keeper(holder)
        yield it
    finally:
        for pid in it.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The test may have put others in the place of those of the beginning.
        await it.keeper.close()
        with contextlib.suppress(Exception):
            await within(it.holder.connect())
        await within(it.holder.shutdown(force=True))
        await it.holder.close()
        await all_gone(str(directory))


def mine(marker: str) -> list[int]:
    """The processes whose command line names `marker`, without this one."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
    return found


async def all_gone(marker: str) -> None:
    """Holder and keeper of this directory have ended (an orphaned keeper is ended here)."""
    run = f"{marker}/run"
    for pid in mine(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    await eventually(lambda: not mine(run), "holder and keeper end")


def kill_and_wait(pid: int) -> None:
    """SIGKILL, and return when the process has ended."""
    try:
        handle = pidfd.open_process(pid)
    except ProcessLookupError:
        return
    with handle, contextlib.suppress(ProcessLookupError):
        pidfd.send_signal(handle, signal.SIGKILL)
        poller = select.poll()
        poller.register(handle.fileno(), select.POLLIN)
        assert poller.poll(DEADLINE_S * 1000), f"process {pid} does not die"
