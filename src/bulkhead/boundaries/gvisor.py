"""gVisor as the kernel of the sandbox boundary: `--boundary sandbox --kernel gvisor`.

gVisor's `runsc`, as installed, is itself an OCI runtime. It runs in a jail (a container: own
namespaces, a read-only root with nothing but its program, our filter) and finds there

    /run/bundle/config.json    the workload's configuration, as far as gVisor knows its parts
    /run/rootfs                the workload's root: the overlay that a container would have
    /run/binds/N               sources of bind mounts
    /run/state                 its own records; the engine reads from them that it has started

`runsc run` is process 1 of the jail and passes signals on; its exit code is the workload's. The
jail has the capabilities that runsc needs to confine its parts further (docs/sandbox.md).
"""

import asyncio
import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from signal import SIGKILL
from typing import Any

import msgspec

from bulkhead.boundaries.container import Container, ContainerBoundary
from bulkhead.boundaries.jail import Roots
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, InstanceState, Launched, Missing, Report, Rootfs, Stdio
from bulkhead.errors import (
    BulkheadError,
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    LaunchFailed,
    NotFound,
    Unavailable,
    Unsupported,
)
from bulkhead.isolation import rootfs as root_plan
from bulkhead.isolation.seccomp import profile
from bulkhead.linux import mounts, overlayfs, pidfd
from bulkhead.linux.fds import readable
from bulkhead.oci import runtime as oci

PROGRAM = "/usr/bin/runsc"
BUNDLE, ROOTFS, STATE, BINDS = "/run/bundle", "/run/rootfs", "/run/state", "/run/binds"
OPTIONAL = frozenset({"pausable", "updatable", "measured", "guest"})
OVERHEAD = 96 << 20
"""Bytes beside the workload's own: gVisor's kernel and its file server, both in Go."""
TASKS = 256
"""Threads of these, and those that run the workload's."""
REMEDY = "apt-get install runsc"
WIRE = "/proc/self/fd/10"
"""The network namespace that gVisor takes the workload's interface from."""
_START_S, _POLL_S, _TELL_S = 120.0, 0.004, 30.0
_CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
    "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID",
    "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
]  # fmt: skip
"""What runsc needs to make its parts' namespaces and roots, and its file server to serve files."""
_LEFT_OUT = frozenset({"cgroup", "cgroup2", "mqueue"})


def program() -> str | None:
    """The installed runsc."""
    return shutil.which("runsc")


class GvisorBoundary:
    """Runs workloads in gVisor."""

    name = "sandbox"

    def __init__(self, services: Services) -> None:
        self.home = services.home
        self.launcher = services.launcher
        self.container = ContainerBoundary(services)
        self.roots = Roots(services.home)

    def probe(self) -> Report:
        """Whether runsc is there; that it works is seen at the first start."""
        found = program()
        missing = () if found else (Missing("gVisor's runsc", REMEDY),)
        return Report(self.name, found is not None, missing, OPTIONAL, {"runsc": found or ""})

    async def create(self, bundle: Bundle) -> "Gvisor":
        """Make the control group of a workload; nothing runs yet."""
        if program() is None:
            raise Unsupported(f"gVisor's runsc is not installed: {REMEDY}")
        return Gvisor(self, bundle, await self.container.create(self.jail(bundle, ())))

    async def load(self, bundle: Bundle, pid: int) -> "Gvisor":
        """A workload of an earlier engine."""
        return Gvisor(self, bundle, await self.container.load(self.jail(bundle, ()), pid))

    def jail(self, bundle: Bundle, args: tuple[str, ...], *, terminal: bool = False) -> Bundle:
        """The container in which runsc runs `args`."""
        found = program()
        directory = "/nonexistent"  # of a workload whose runsc has gone: it can still be removed
        if found is not None:
            files = {"/proc/none": b"", "/sys/none": b"", "/etc/none": b""}
            directory = self.roots.make("gvisor", {PROGRAM: found}, files).directory
        network = bundle.spec.linux.namespace("network")
        namespaces = [oci.Namespace(kind) for kind in ("mount", "pid", "ipc", "uts", "cgroup")]
        namespaces.append(oci.Namespace("network", network.path if network else ""))
        spec = oci.Spec(
            root=oci.Root(path="rootfs", readonly=True),
            hostname="gvisor",
            process=process(bundle, args, terminal=terminal),
            mounts=_jail_mounts(bundle),
            linux=oci.Linux(
                namespaces=namespaces,
                cgroups_path=bundle.spec.linux.cgroups_path,
                resources=resources(bundle.spec.linux.resources),
                seccomp=_filter(),
            ),
        )
        return Bundle(bundle.id, spec, Rootfs(directory=directory), bundle.directory, bundle.fds)


@functools.cache
def _filter() -> oci.Seccomp:
    """The default one for these capabilities, and pivot_root(2), which Docker's never has."""
    base = profile.default_for(frozenset(_CAPABILITIES))
    more = oci.Syscall(names=["pivot_root"], action="SCMP_ACT_ALLOW")
    return msgspec.structs.replace(base, syscalls=[*base.syscalls, more])


def process(bundle: Bundle, args: tuple[str, ...], *, terminal: bool) -> oci.Process:
    """A process of runsc's in the jail."""
    given = bundle.spec.process
    return oci.Process(
        args=list(args),
        env=["PATH=/usr/bin", "HOME=/tmp"],
        terminal=terminal,
        user=oci.User(uid=0, gid=0),
        capabilities=oci.Capabilities(
            bounding=_CAPABILITIES, permitted=_CAPABILITIES, effective=_CAPABILITIES
        ),
        rlimits=[oci.Rlimit("RLIMIT_CORE", 0, 0)],
        oom_score_adj=given.oom_score_adj if given is not None else None,
    )


def _jail_mounts(bundle: Bundle) -> list[oci.Mount]:
    quiet = ["nosuid", "noexec", "nodev"]
    found = [
        oci.Mount("/proc", "proc", "proc", quiet),
        oci.Mount("/sys", "sysfs", "sysfs", [*quiet, "ro"]),
        oci.Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "noexec", "mode=755", "size=65536"]),
        oci.Mount(
            "/dev/pts", "devpts", "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        ),
        oci.Mount("/tmp", "tmpfs", "tmpfs", ["nosuid", "mode=700"]),
        oci.Mount("/run", "tmpfs", "tmpfs", ["nosuid", "nodev", "mode=755"]),
        # runsc takes a namespace with core/rmem_default for the host's; new kernels have it in all.
        oci.Mount("/proc/sys/net", "tmpfs", "tmpfs", ["ro", *quiet]),
        # A user namespace may mount /proc only if there is one with nothing mounted over it.
        oci.Mount("/run/proc", "proc", "proc", quiet),
        oci.Mount(BUNDLE, f"{bundle.directory}/gvisor/bundle", "bind", ["bind", "ro", *quiet]),
        oci.Mount(STATE, f"{bundle.directory}/gvisor/state", "bind", ["bind", "rw", *quiet]),
        oci.Mount(ROOTFS, _root_path(bundle), "bind", ["bind", "rw"]),
    ]  # fmt: skip
    for number, mount in enumerate(_binds(bundle.spec)):
        kept = [word for word in mount.options if word in ("ro", "rro", "rbind", "bind")]
        found.append(oci.Mount(f"{BINDS}/{number}", mount.source, "bind", kept))
    return found


def _root_path(bundle: Bundle) -> str:
    return f"{bundle.directory}/gvisor/rootfs"


def _binds(spec: oci.Spec) -> list[oci.Mount]:
    return [mount for mount in spec.mounts if mount.type_ == "bind"]


def resources(given: oci.Resources | None) -> oci.Resources:
    """The workload's limits with room for gVisor's own processes."""
    found = given or oci.Resources()
    memory, pids = found.memory, found.pids
    if memory is not None and memory.limit is not None and memory.limit > 0:
        swap = memory.swap
        if swap is not None and swap > 0:
            swap += OVERHEAD
        memory = msgspec.structs.replace(memory, limit=memory.limit + OVERHEAD, swap=swap)
    if pids is not None and pids.limit > 0:
        pids = oci.Pids(pids.limit + TASKS)
    return msgspec.structs.replace(found, memory=memory, pids=pids)


def config(spec: oci.Spec, *, terminal: bool) -> bytes:
    """The config.json for runsc."""
    mounts_ = []
    number = 0
    for mount in spec.mounts:
        if mount.type_ in _LEFT_OUT:
            continue
        if mount.type_ == "bind":
            words = [word for word in mount.options if word in ("nosuid", "noexec")]
            words.append("ro" if {"ro", "rro"} & set(mount.options) else "rw")
            mount = oci.Mount(mount.destination, f"{BINDS}/{number}", "bind", ["rbind", *words])
            number += 1
        mounts_.append(mount)
    network = spec.linux.namespace("network")
    wired = network is not None
    given = spec.process
    assert given is not None
    return oci.encode(
        oci.Spec(
            root=oci.Root(path=ROOTFS, readonly=spec.root is not None and spec.root.readonly),
            hostname=spec.hostname,
            process=_inner_process(given, terminal=terminal),
            mounts=mounts_,
            linux=oci.Linux(
                namespaces=[
                    *(oci.Namespace(kind) for kind in ("mount", "pid", "ipc", "uts")),
                    oci.Namespace("network", WIRE if wired else ""),
                ],
                seccomp=spec.linux.seccomp,
            ),
        )
    )


def _inner_process(given: oci.Process, *, terminal: bool) -> oci.Process:
    """Without what is the host's alone; gVisor wants every set of capabilities said."""
    caps = given.capabilities
    if caps is not None:
        caps = msgspec.structs.replace(caps, inheritable=[], ambient=caps.ambient or [])
    return msgspec.structs.replace(
        given,
        terminal=terminal,
        console_size=None,
        capabilities=caps,
        apparmor_profile="",
        selinux_label="",
        oom_score_adj=None,
    )


class Gvisor:
    """One workload in gVisor."""

    def __init__(self, boundary: GvisorBoundary, bundle: Bundle, inner: Container) -> None:
        self.boundary = boundary
        self.bundle = bundle
        self.inner = inner
        self._told = 0

    @property
    def _directory(self) -> str:
        return f"{self.bundle.directory}/gvisor"

    # --- seam ------------------------------------------------------------------------------

    async def start(self, stdio: Stdio) -> Launched:
        """Run the configured process in a kernel of its own."""
        await asyncio.to_thread(self._prepare, terminal=stdio.terminal)
        args = (
            PROGRAM, f"--root={STATE}", f"--log={STATE}/log", "--log-format=json",
            "--ignore-cgroups", "--oci-seccomp", "--net-raw",
            "run", f"--bundle={BUNDLE}", self.bundle.id,
        )  # fmt: skip
        self.inner.bundle = self.boundary.jail(self.bundle, args, terminal=stdio.terminal)
        launched = await self.inner.start(stdio)
        given = self.bundle.spec.process
        name = given.args[0] if given is not None else ""
        state = f"{self._directory}/state/{self.bundle.id}_sandbox:{self.bundle.id}.state"
        try:
            log = f"{self._directory}/state/log"
            await self._until(launched, lambda: _running(state), log, name)
        except BaseException:
            await self._discard(self.bundle.id)
            raise
        return launched

    def _prepare(self, *, terminal: bool) -> None:
        """The directory that the jail sees, and the workload's root mounted in it."""
        self._unmount()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.mkdir(self._directory, 0o700)  # the workload's environment is in there
        for folder in ("bundle", "state", "rootfs"):
            os.mkdir(f"{self._directory}/{folder}", 0o755)
        with open(f"{self._directory}/bundle/config.json", "wb") as file:
            file.write(config(self.bundle.spec, terminal=terminal))
        rootfs = self.bundle.rootfs
        options = root_plan.overlay_options(rootfs.lowers, rootfs.upper, rootfs.work)
        if rootfs.work is not None:
            overlayfs.forget_volatile(rootfs.work)
        try:
            with mounts.new_filesystem("overlay", options) as mounted:
                mounts.attach(int(mounted), _root_path(self.bundle))
        except OSError as error:
            step = root_plan.OVERLAY_STEP
            text = f"{step}: {error.strerror}"
            raise LaunchFailed(text, step=step, errno=error.errno or 0) from error

    def _unmount(self) -> None:
        path = _root_path(self.bundle)
        if os.path.ismount(path):
            mounts.unmount(path, mounts.MNT_DETACH)

    async def _until(
        self, launched: Launched, begun: Callable[[], bool], log: str, program_: str
    ) -> None:
        """Wait until `begun()`, or raise what runsc says why not; one may also have ended."""
        with contextlib.ExitStack() as undo:
            target = launched.pidfd
            if target is None:
                target = undo.enter_context(pidfd.open_process(launched.pid))
            deadline = asyncio.get_running_loop().time() + _START_S
            while not begun():
                if pidfd.ended(target):
                    error = None if begun() else failure(log, program_)
                    if error is not None:
                        raise error
                    return
                if asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(f"gVisor has not started within {_START_S:.0f} s")
                await asyncio.sleep(_POLL_S)

    async def _discard(self, identity: str) -> None:
        with contextlib.suppress(BulkheadError, OSError):
            await self.boundary.launcher.signal(identity, SIGKILL)
        if identity == self.bundle.id:
            with contextlib.suppress(BulkheadError, OSError):
                await self.delete(force=True)

    def state(self) -> InstanceState:
        """What the kernel says now."""
        return self.inner.state()

    async def kill(self, signal: int, *, everyone: bool = False) -> None:
        """Signal the workload's first process; SIGKILL ends the jail with all that is in it."""
        if signal == SIGKILL or not await self._tell(signal):
            await self.inner.kill(signal, everyone=everyone or signal == SIGKILL)

    async def _tell(self, signal: int) -> bool:
        """Have runsc send a signal: `runsc run` passes on only what a terminal sends.

        False if it ended before it could be told.
        """
        self._told += 1
        args = (PROGRAM, f"--root={STATE}", "kill", self.bundle.id, str(signal))
        client = process(self.bundle, args, terminal=False)
        try:
            launched = await self.inner.exec(f"signal{self._told}", client, Stdio())
        except (Conflict, NotFound):
            return False
        await asyncio.to_thread(_wait, launched)
        return True

    async def delete(self, *, force: bool = False) -> None:
        """Remove the control group and end what is in it."""
        await self.inner.delete(force=force)
        await asyncio.to_thread(self._unmount)

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of one that does not run; for any thread."""
        self.inner.dispose(timeout_s)
        self._unmount()

    async def exec(self, identity: str, process_: oci.Process, stdio: Stdio) -> Launched:
        """Run `process_` in the guest, beside the workload's first."""
        place = f"{self._directory}/state/exec-{identity}"
        inner = _inner_process(process_, terminal=stdio.terminal)
        with open(f"{place}.json", "wb") as file:
            file.write(msgspec.json.encode(inner))
        inside = f"{STATE}/exec-{identity}"
        args = (
            PROGRAM, f"--root={STATE}", f"--log={inside}.log", "--log-format=json",
            "--ignore-cgroups", "--oci-seccomp", "--net-raw", "exec", f"--process={inside}.json",
            f"--internal-pid-file={inside}.pid", self.bundle.id,
        )  # fmt: skip
        client = process(self.bundle, args, terminal=stdio.terminal)
        launched = await self.inner.exec(identity, client, stdio)
        try:
            begun = functools.partial(os.path.exists, f"{place}.pid")
            await self._until(launched, begun, f"{place}.log", process_.args[0])
        except BaseException:
            await self._discard(f"{self.bundle.id}/{identity}")
            raise
        return launched

    # --- optional --------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freeze the guest's kernel, and all it runs."""
        await self.inner.pause()

    async def resume(self) -> None:
        """Thaw it."""
        await self.inner.resume()

    async def update(self, wanted: oci.Resources) -> None:
        """Apply changed limits."""
        await self.inner.update(resources(wanted))

    def stats(self) -> dict[str, Any]:
        """Usage of workload and kernel together, in the shape of Docker's statistics."""
        return self.inner.stats()

    def processes(self) -> list[int]:
        """Process ids on the host: gVisor's."""
        return self.inner.processes()

    def oom_kills(self) -> int:
        """How many of them the host's kernel has killed for want of memory."""
        return self.inner.oom_kills()


def _wait(launched: Launched) -> None:
    """Until the process has ended, for some seconds."""
    with contextlib.suppress(ProcessLookupError):
        target = launched.pidfd or pidfd.open_process(launched.pid)
        with target:
            readable(int(target), _TELL_S)


def _running(path: str) -> bool:
    """Whether runsc has written that the workload runs, or has run."""
    try:
        with open(path, "rb") as file:
            status = json.loads(file.read())["status"]
    except (OSError, ValueError, KeyError):
        return False
    return status in ("running", "stopped")


def failure(log: str, program_: str) -> LaunchFailed | None:
    """The last error in runsc's own log, by kind; None if there is none."""
    text = ""
    decoder = json.JSONDecoder()
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
        rest = file.read(1 << 20)
        while rest:
            try:
                entry, end = decoder.raw_decode(rest)
            except ValueError:
                break
            rest = rest[end:].lstrip()
            if entry.get("level") in ("error", "fatal"):
                text = str(entry.get("msg", text))
    if not text:
        return None
    return _by_kind(text, program_)


def _by_kind(text: str, program_: str) -> LaunchFailed:
    step = "start gVisor"
    if "error finding executable" in text:
        named = f'exec: "{program_}": executable file not found in $PATH'
        return CommandNotFound(named, step=step, errno=errno.ENOENT)
    if "failed to load" in text:
        if text.endswith("no such file or directory"):
            named = f"stat {program_}: no such file or directory"
            return CommandNotFound(named, step=step, errno=errno.ENOENT)
        named = f'exec: "{program_}": {text.rpartition(": ")[2]}'
        return CommandNotExecutable(named, step=step, errno=errno.EACCES)
    return LaunchFailed(f"gVisor: {text}", step=step)
