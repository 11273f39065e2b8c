"""A program of the host's run once, in a jail: for reading files that nobody vouches for.

It has its own executable and libraries, the files it is given by name (/disks/0 and so on), no
network, no capability, a user id of its own, and limits of memory, processes and time. Its output
is bounded.
"""

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.boundaries import microvm_syscalls
from bulkhead.boundaries.container import ContainerBoundary
from bulkhead.boundaries.jail import Jail, Roots, jail_bundle, uid_of
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, Rootfs, Stdio
from bulkhead.errors import Conflict, NotFound, Unavailable
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Linux, Pids, Resources, Spec

MEMORY = 512 << 20
_OUTPUT = 1 << 20
_TASKS = 80
_FORGET_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: its code (128 + signal), and what it wrote to both outputs (at most 1 MiB)."""

    code: int
    output: str


class Tools:
    """Runs programs in jails; `parent` is the control group that theirs are made in."""

    def __init__(self, services: Services, parent: str) -> None:
        self._services = services
        self._container = ContainerBoundary(services)
        self._roots = Roots(services.home)
        self._parent = parent

    async def run(
        self, argv: Sequence[str], files: Sequence[tuple[str, bool]], *, timeout_s: float
    ) -> Outcome:
        """Run `argv`, whose first word is a program's path; `files` may be written where True.

        The writable ones are given to its user. Unavailable if it takes too long.
        """
        identity = f"tool-{os.urandom(8).hex()}"
        root = await asyncio.to_thread(
            self._roots.make, os.path.basename(argv[0]), {argv[0]: argv[0]}
        )
        uid = uid_of(identity)
        for path, writable in files:
            if writable:
                os.chown(path, uid, uid)
        jail = Jail(
            root=root, args=argv, seccomp=microvm_syscalls.profile(), disks=files,
            guest_bytes=0, overhead_bytes=MEMORY, tasks=_TASKS, terminal=False,
        )  # fmt: skip
        linux = Linux(
            cgroups_path=f"{self._parent}/{identity}", resources=Resources(pids=Pids(_TASKS))
        )
        directory = self._services.home.in_run("tools", identity)
        bundle = Bundle(identity, Spec(linux=linux), Rootfs(), directory)
        async with contextlib.AsyncExitStack() as undo:
            os.makedirs(directory, mode=0o700)
            undo.callback(shutil.rmtree, directory)
            output = undo.enter_context(OwnedFd(os.memfd_create("output", os.MFD_CLOEXEC)))
            container = await self._container.create(jail_bundle(bundle, jail, ()))
            undo.push_async_callback(container.delete, force=True)
            launched = await container.start(Stdio(stdout=int(output), stderr=int(output)))
            undo.push_async_callback(self._forget, identity)
            undo.push_async_callback(asyncio.to_thread, container.group.kill)
            await _ended(launched.pid, launched.pidfd, argv[0], timeout_s)
            code = await _code(f"{directory}/exit.json")
            return Outcome(code, os.pread(int(output), _OUTPUT, 0).decode("utf-8", "replace"))

    async def _forget(self, identity: str) -> None:
        deadline = time.monotonic() + _FORGET_S
        while True:
            try:
                await self._services.launcher.forget(identity)
                return
            except NotFound:
                return
            except Conflict:  # its end has not been noticed yet
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.01)


async def _ended(pid: int, known: OwnedFd | None, name: str, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with known.duplicate() if known is not None else pidfd.open_process(pid) as fd:
        loop.add_reader(int(fd), ended.set)
        try:
            await asyncio.wait_for(ended.wait(), timeout_s)
        except TimeoutError:
            raise Unavailable(
                f"{os.path.basename(name)} did not end within {timeout_s:g} s"
            ) from None
        finally:
            loop.remove_reader(int(fd))


async def _code(path: str) -> int:
    """The code in the holder's exit record, which it writes when it reaps."""
    deadline = time.monotonic() + _FORGET_S
    while True:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            status = json.load(file)["wait_status"]
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            raise Unavailable(f"the holder wrote no exit record {path}")
        await asyncio.sleep(0.005)
