"""Real containers without an engine: a busybox root, a holder of its own, the container boundary.

    with Lab(tmp_path) as lab:
        assert lab.run(["echo", "hello"]).out == "hello\n"

Needs root, and busybox-static on the host. Everything is below `tmp_path`; leaving the block ends
the holder and removes the control groups.
"""

import asyncio
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from bulkhead.boundaries.container import Container, ContainerBoundary
from bulkhead.boundary.registry import Services, boundary
from bulkhead.boundary.seam import Bundle, Launched, Rootfs, Stdio
from bulkhead.home import Home
from bulkhead.isolation import capabilities
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.keeper.holder import Exit, HolderClient, ensure_holder
from bulkhead.oci.runtime import (
    Capabilities,
    Linux,
    Mount,
    Namespace,
    Process,
    Root,
    Spec,
)
from tests.helpers.waiting import DEADLINE_S

T = TypeVar("T")

MASKED = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
SAFE = ["nosuid", "noexec", "nodev"]
_identities = itertools.count()


def default_spec(args: Sequence[str]) -> Spec:
    """What Docker gives a container by default, without a network."""
    own = list(capabilities.select())
    return Spec(
        root=Root("rootfs"),
        hostname="box",
        process=Process(
            args=list(args),
            env=["PATH=/usr/local/bin:/bin:/sbin", "HOME=/root"],
            capabilities=Capabilities(own, own, own, [], []),
            oom_score_adj=0,
        ),
        mounts=[
            Mount("/proc", "proc", "proc", SAFE),
            Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
            Mount(
                "/dev/pts",
                "devpts",
                "devpts",
                ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            Mount("/sys", "sysfs", "sysfs", [*SAFE, "ro"]),
            Mount("/sys/fs/cgroup", "cgroup", "cgroup", ["ro", *SAFE]),
            Mount("/dev/mqueue", "mqueue", "mqueue", SAFE),
            Mount("/dev/shm", "shm", "tmpfs", [*SAFE, "mode=1777", "size=67108864"]),
        ],
        linux=Linux(
            namespaces=[
                Namespace("mount"),
                Namespace("network"),
                Namespace("uts"),
                Namespace("pid"),
                Namespace("ipc"),
                Namespace("cgroup"),
            ],
            masked_paths=list(MASKED),
            readonly_paths=list(READONLY),
        ),
    )


def build_root(path: Path) -> None:
    """A minimal busybox root at `path`."""
    binary = shutil.which("busybox")
    assert binary is not None, "busybox-static is not installed"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var"):
        (path / name).mkdir(parents=True)
    (path / "tmp").chmod(0o1777)
    shutil.copy(binary, path / "bin/busybox")
    listing = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True)
    for applet in listing.stdout.split():
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n"
    )
    (path / "etc/group").write_text("root:x:0:\ntty:x:5:\nalice:x:1000:\nwheel:x:10:alice\n")


@dataclass(slots=True)
class Result:
    """How a process ended and what it wrote."""

    code: int
    """As os.waitstatus_to_exitcode: negative for a signal."""
    out: str
    err: str


@dataclass(slots=True)
class Running:
    """A started process, whose output goes to files."""

    lab: "Lab"
    container: Container
    id: str
    launched: Launched
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        """On the host."""
        return self.launched.pid

    def wait(self) -> Result:
        """Wait for its end; the holder forgets it."""
        code = self.lab.wait(self.id)
        return Result(code, self.out.read_text(errors="replace"), self.err.read_text())

    def exec(self, args: Sequence[str], **process: Any) -> Result:
        """Run one more process inside to its end."""
        return self.start_exec(args, **process).wait()

    def start_exec(self, args: Sequence[str], **process: Any) -> "Running":
        """Start one more process inside."""
        return self.lab.start_exec(self.container, args, **process)

    def kill(self) -> Result:
        """Kill all of it, wait, remove its control group."""
        self.lab.do(self.container.kill(9, everyone=True))
        result = self.wait()
        self.lab.do(self.container.delete(force=True))
        return result


@dataclass(slots=True)
class Lab:
    """A holder and a boundary below `folder`."""

    folder: Path
    home: Home = field(init=False)
    boundary: ContainerBoundary = field(init=False)
    holder: HolderClient = field(init=False)
    image: Path = field(init=False)
    _runner: asyncio.Runner = field(init=False)
    _exits: dict[str, "asyncio.Future[Exit]"] = field(init=False, default_factory=dict)
    _containers: list[Container] = field(init=False, default_factory=list)

    def __enter__(self) -> Self:
        self.image = self.folder / "image"
        build_root(self.image)
        (self.folder / "run").mkdir()
        (self.folder / "state").mkdir()
        self.home = Home(str(self.folder / "state"), str(self.folder / "run"))
        self._runner = asyncio.Runner()
        self.holder = self.do(ensure_holder(self.home))
        self.holder.on_exit(self._ended)
        made = boundary("container", Services(self.home, self.holder))
        assert isinstance(made, ContainerBoundary)
        self.boundary = made
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for container in self._containers:
                if container.group.exists():
                    container.group.kill()
                    container.group.delete()
            cgroups.detect().remove_parent(self._parent)
            self.do(self._reaped())
            self.do(self.holder.shutdown())
            self.do(self.holder.close())
        finally:
            self._runner.close()
            self.boundary.null.close()

    async def _reaped(self) -> None:
        """Return when the holder has seen the end of everything, or the deadline passes."""
        end = asyncio.get_running_loop().time() + DEADLINE_S
        while any(entry.running for entry in await self.holder.entries()):
            if asyncio.get_running_loop().time() > end:
                break  # the shutdown will say what is running
            await asyncio.sleep(0.01)

    @property
    def _parent(self) -> str:
        return f"/bulkhead-lab{os.getpid()}"

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the lab's loop."""
        return self._runner.run(work)

    def _future(self, identity: str) -> "asyncio.Future[Exit]":
        if identity not in self._exits:
            self._exits[identity] = self._runner.get_loop().create_future()
        return self._exits[identity]

    def _ended(self, exit_: Exit) -> None:
        future = self._future(exit_.id)
        if not future.done():
            future.set_result(exit_)

    def wait(self, identity: str) -> int:
        """The exit code of a process; the holder forgets it."""

        async def ended() -> Exit:
            try:
                found = await asyncio.wait_for(asyncio.shield(self._future(identity)), DEADLINE_S)
            except TimeoutError:
                raise AssertionError(await self.describe([identity])) from None
            await self.holder.forget(identity)
            return found

        return os.waitstatus_to_exitcode(self.do(ended()).wait_status)

    async def describe(self, identities: Sequence[str]) -> str:
        """What holder and kernel say of processes whose end was not told within the deadline."""
        entries = {entry.id: entry for entry in await self.holder.entries()}
        lines = [f"not within {DEADLINE_S:.0f} s: the end of {', '.join(identities)}"]
        for identity in identities[:3]:
            entry = entries.get(identity)
            lines.append(f"the holder: {entry}")
            if entry is not None:
                lines.append(_kernel_says(entry.pid))
        return "\n".join(lines)

    def rootfs(self, name: str, lowers: Sequence[str] = ()) -> Rootfs:
        """An overlay of the busybox root (or `lowers`) under an empty upper directory."""
        upper, work = self.folder / name / "upper", self.folder / name / "work"
        upper.mkdir(parents=True)
        work.mkdir()
        layers = tuple(lowers) or (str(self.image),)
        return Rootfs(layers, str(upper), str(work))

    def create(
        self, spec: Spec, rootfs: Rootfs | None = None, *, identity: str | None = None
    ) -> Container:
        """A container that does not run yet."""
        name = identity or f"lab{os.getpid()}-{next(_identities)}"
        directory = self.folder / "run" / name
        directory.mkdir(exist_ok=True)
        spec.linux.cgroups_path = spec.linux.cgroups_path or f"{self._parent}/{name}"
        bundle = Bundle(name, spec, rootfs or self.rootfs(name), str(directory))
        container = self.do(self.boundary.create(bundle))
        self._containers.append(container)
        return container

    def start(
        self,
        args: Sequence[str],
        change: Callable[[Spec], object] | None = None,
        *,
        rootfs: Rootfs | None = None,
    ) -> Running:
        """Start a container of the default configuration, after `change` was applied to it."""
        spec = default_spec(args)
        if change is not None:
            change(spec)
        container = self.create(spec, rootfs)
        name = container.bundle.id
        return self._started(container, name, self._launch(container, name, None))

    def start_exec(self, container: Container, args: Sequence[str], **process: Any) -> Running:
        """Start one more process in `container`; `process` overrides members of its Process."""
        base = container.bundle.spec.process
        assert base is not None
        wanted = Process(
            args=list(args), env=list(base.env), cwd="/", capabilities=base.capabilities
        )
        for key, value in process.items():
            setattr(wanted, key, value)
        label = f"e{next(_identities)}"
        name = f"{container.bundle.id}/{label}"
        return self._started(container, name, self._launch(container, label, wanted))

    def _files(self, name: str) -> tuple[Path, Path]:
        stem = name.replace("/", "-")
        return self.folder / f"{stem}.out", self.folder / f"{stem}.err"

    def _started(self, container: Container, name: str, launched: Launched) -> Running:
        out, err = self._files(name.rpartition("/")[2])
        return Running(self, container, name, launched, out, err)

    def _launch(self, container: Container, name: str, process: Process | None) -> Launched:
        out, err = self._files(name)
        with open("/dev/null") as null, out.open("w") as stdout, err.open("w") as stderr:
            stdio = Stdio(stdin=null.fileno(), stdout=stdout.fileno(), stderr=stderr.fileno())
            if process is None:
                return self.do(container.start(stdio))
            return self.do(container.exec(name, process, stdio))

    def run(
        self,
        args: Sequence[str],
        change: Callable[[Spec], object] | None = None,
        *,
        rootfs: Rootfs | None = None,
    ) -> Result:
        """Run a container to its end and delete it."""
        running = self.start(args, change, rootfs=rootfs)
        result = running.wait()
        self.do(running.container.delete(force=True))
        return result

    def shell(
        self,
        script: str,
        change: Callable[[Spec], object] | None = None,
        *,
        rootfs: Rootfs | None = None,
    ) -> Result:
        """Run a shell script in a container."""
        return self.run(["sh", "-c", script], change, rootfs=rootfs)


def _kernel_says(pid: int) -> str:
    """State, place in the kernel and system call of a process."""
    found = []
    for name in ("stat", "wchan", "syscall", "stack", "cgroup", "status"):
        try:
            found.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return "\n".join(found)


def cannot_run() -> str:
    """Why containers cannot be run here, "" if they can; found out by trying."""
    if shutil.which("busybox") is None:
        return "busybox-static is not installed"
    try:
        cgroups.detect()
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
        )
    except Exception as error:
        return str(error)
    return "" if done.returncode == 0 else f"no namespaces: {done.stderr.decode().strip()}"
