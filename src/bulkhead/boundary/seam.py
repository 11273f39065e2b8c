"""The seam: what every boundary is to the rest of the project.

Two Protocols, eight methods together. The OCI bundle is the contract: a runtime-spec config plus a
root file system. Anything beyond (pause, update, stats, processes) is a small optional Protocol
that the boundary's `Report` declares.

The methods are coroutines because launching, killing and waiting cross process boundaries; none of
them blocks the loop for longer than a few system calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Process as ProcessSpec
from bulkhead.oci.runtime import Resources, Spec


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing a host lacks: what it is, and the command or setting that mends it."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a boundary can do on this host; the conformance suite holds it to this."""

    name: str
    usable: bool
    missing: tuple[Missing, ...] = ()
    optional: frozenset[str] = frozenset()
    """Names of the optional Protocols that its instances implement, e.g. "pausable"."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """For people: kernel, acceleration and the like."""


@dataclass(frozen=True, slots=True)
class Rootfs:
    """The root file system of a workload.

    Either `directory` (an OCI bundle's unpacked root), or an overlay of `lowers` (mounted
    directories, topmost first) under `upper` with `work` beside it on one file system.
    """

    lowers: tuple[str, ...] = ()
    upper: str | None = None
    work: str | None = None
    directory: str | None = None
    layer_files: tuple[str, ...] = ()
    """The EROFS images of the layers, topmost first, for boundaries with a kernel of their own."""
    disk: str | None = None
    """Where a guest's writable layer is kept, an ext4 image; made if it is missing."""
    disk_size: int = 0
    """Its size in bytes, 0 for the default."""
    volatile: bool = False
    """Writes to the overlay need not survive a loss of power, not even those that were fsynced."""
    mapped: bool = True
    """Owners are seen through the maps of the workload's user namespace, if it has one."""


@dataclass(frozen=True, slots=True)
class Nic:
    """One network interface of a guest and the tap it is on, which is the boundary's to close."""

    name: str
    tap: OwnedFd
    mac: str
    addresses: tuple[str, ...]
    """With prefix lengths."""
    routes: tuple[tuple[str, str], ...]
    """(destination, gateway); the gateway is "" for what is on the link."""
    mtu: int


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of a whole machine: a file of the host in format `format` ("qcow2" or "raw").

    `base` is the qcow2 file that it lies on, "" for none.
    """

    path: str
    format: str
    base: str = ""
    readonly: bool = False
    cdrom: bool = False


@dataclass(frozen=True, slots=True)
class WholeMachine:
    """A machine that boots from its own disks, with nothing of ours inside. Sizes in bytes.

    `code` and `nvram` are UEFI's code and its variables, "" for BIOS. `pinned` are the host's
    processors that its own run on, in order. `iops` and `bytes_per_second` limit each disk.
    """

    drives: tuple[Drive, ...]
    memory_bytes: int
    vcpus: int
    code: str = ""
    nvram: str = ""
    sata: bool = False
    screen: bool = False
    reserved: bool = False
    link: bool = False
    """Whether there is a port for the engine inside, at link.sock of the run directory."""
    pinned: tuple[int, ...] = ()
    iops: int = 0
    bytes_per_second: int = 0


@dataclass(frozen=True, slots=True)
class Within:
    """The guest of another workload, in which this one runs: a pod.

    `id` is that workload's, `pid` its monitor's process, `directory` its runtime directory. The PID
    and IPC namespaces that the configuration joins are those of the workload with the runtime
    directory `joined`.
    """

    id: str
    pid: int
    directory: str
    joined: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A workload to be: its id, its OCI configuration, its root and a private runtime directory."""

    id: str
    spec: Spec
    rootfs: Rootfs
    directory: str
    fds: tuple[int, ...] = ()
    """Descriptors lent until `start` returns; the process has them as 10, 11 and so on."""
    keep_numbers: bool = False
    """`fds` are 3, 4 and so on instead."""
    listener: tuple[int, int] = (-1, -1)
    """Who is told of system calls: a connected socket, a pipe with the state that goes along;
    see container_process.Listener."""
    keyring: bool = True
    """Whether the process gets a session keyring of its own."""
    pivot: bool = True
    """False: the root is moved over the host's and entered with chroot(2), for a root that is in
    no file system that pivot_root(2) takes (a ramdisk)."""
    gates: Mapping[str, int] = field(default_factory=dict)
    """Descriptors that a container waits at on its way, for a byte; see container_plan.Ground."""
    nics: tuple[Nic, ...] = ()
    """A guest's network interfaces; a container has them in its network namespace instead."""
    kernel: str = ""
    """The guest kernel's name, "" for the boundary's default."""
    exclusive: frozenset[str] = frozenset()
    """Sources of binds that nobody but this workload writes while it runs; for caches."""
    disks: Mapping[str, str] = field(default_factory=dict)
    """For guests: sources of binds that are file systems of their own, and their image files."""
    saved: str = ""
    """A directory that `Saving.snapshot` has filled: go on with what was saved there."""
    machine: WholeMachine | None = None
    """What the workload is instead of a program: a machine with disks of its own."""
    within: Within | None = None
    """For guests: it has no kernel of its own, but runs in that guest."""


@dataclass(frozen=True, slots=True)
class Stdio:
    """Where a process's standard streams go.

    Without `terminal`: `stdin`, `stdout`, `stderr` are the child's ends (descriptors of the caller,
    lent). With it: they are ignored, the child opens a pseudo-terminal in its own devpts and the
    launcher receives the master. `keep` are the other ends, which the launcher holds for `meta`'s
    reader (keeper/).
    """

    terminal: bool = False
    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    keep: tuple[int, ...] = ()
    meta: bytes = b""
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """One compiled launch program (`linux/program.py`) and what it needs.

    `id` names the process to the launcher: the workload's id, or "ID/EXEC" for an exec.
    `fds` are lent; the program refers to them by index. `uid_map` and `gid_map`, in the format of
    user_namespaces(7), are written for a child born in a new user namespace. `record` is the path
    where the exit record is written. `steps` names the program's steps, for errors.
    """

    id: str
    program: bytes
    clone_flags: int
    fds: Sequence[int]
    steps: Sequence[str]
    record: str = ""
    keep: Sequence[int] = ()
    meta: bytes = b""
    uid_map: str = ""
    gid_map: str = ""
    cgroup_fd: int = -1
    """CLONE_INTO_CGROUP target (cgroup v2), or -1."""


@dataclass(slots=True)
class Launched:
    """A process that has executed its program."""

    pid: int
    started_ns: int
    """CLOCK_REALTIME."""
    pidfd: OwnedFd | None = None


class Launcher(Protocol):
    """What runs launch programs: the holder, or the calling process itself."""

    async def launch(self, request: LaunchRequest) -> Launched:
        """Run the program up to its exec; LaunchFailed names the step that failed."""
        ...

    async def signal(self, identity: str, signal: int) -> None:
        """Send `signal` to the process launched as `identity`; NotFound when it is gone."""
        ...

    async def forget(self, identity: str) -> None:
        """Drop what is remembered of an ended process."""
        ...


@dataclass(frozen=True, slots=True)
class InstanceState:
    """OCI runtime-spec state: status is creating, created, running, paused or stopped."""

    id: str
    status: str
    pid: int = 0


class Instance(Protocol):
    """One workload behind a boundary."""

    async def start(self, stdio: Stdio) -> Launched:
        """Run the workload's program."""
        ...

    def state(self) -> InstanceState:
        """What the kernel says now."""
        ...

    async def kill(self, signal: int, *, everyone: bool = False) -> None:
        """Signal the first process, or every one of the workload."""
        ...

    async def delete(self, *, force: bool = False) -> None:
        """Remove all that create and start acquired; Conflict while it runs, unless `force`."""
        ...

    async def exec(self, identity: str, process: ProcessSpec, stdio: Stdio) -> Launched:
        """Run one more process inside, known to the launcher as "ID/`identity`"."""
        ...


class Boundary(Protocol):
    """One way to isolate workloads."""

    name: str

    def probe(self) -> Report:
        """What this host can do, found out by trying."""
        ...

    async def create(self, bundle: Bundle) -> Instance:
        """Acquire what the workload needs (control groups, devices), start nothing."""
        ...

    async def load(self, bundle: Bundle, pid: int) -> Instance:
        """The instance of an earlier process of ours; `pid` 0 if it does not run."""
        ...


_implemented: dict[tuple[type, type], bool] = {}


def implements(instance: object, protocol: Any) -> bool:
    """isinstance for optional Protocols on the path of every run.

    Python finds out anew what a Protocol asks for each time, which takes 30 µs.
    """
    key = type(instance), protocol
    found = _implemented.get(key)
    if found is None:
        found = _implemented[key] = isinstance(instance, protocol)
    return found


@runtime_checkable
class Pausable(Protocol):
    """Optional, "pausable"."""

    async def pause(self) -> None:
        """Freeze every process."""
        ...

    async def resume(self) -> None:
        """Thaw them."""
        ...


@runtime_checkable
class Disposable(Protocol):
    """Optional, without a word in the report: a `delete` that any thread can do."""

    def dispose(self) -> None:
        """`delete` after the last process's end; Conflict if something lives on."""
        ...


@runtime_checkable
class Stocking(Protocol):
    """Optional, of a boundary: what can be made before it is known for what. Any thread may ask."""

    def stock(
        self, identity: str, cgroup_path: str, resources: Resources, rootfs: Rootfs | None
    ) -> None:
        """Make what a workload of that id will need; `create` takes it if it fits.

        From then until `create` or `unstock` nobody else may use the writable part of `rootfs`.
        """
        ...

    def unstock(self, identity: str) -> None:
        """Undo `stock` for an id that nobody took."""
        ...


@runtime_checkable
class Updatable(Protocol):
    """Optional, "updatable"."""

    async def update(self, resources: Resources) -> None:
        """Apply changed limits at once; members that are None stay as they are."""
        ...


@runtime_checkable
class Saving(Protocol):
    """Optional, without a word in the report: a running workload can be saved with its memory."""

    async def snapshot(self, directory: str) -> None:
        """Write it to `directory`; it stands still meanwhile, and goes on. Unsupported says why."""
        ...


@runtime_checkable
class Measured(Protocol):
    """Optional, "measured"."""

    def stats(self) -> dict[str, Any]:
        """Usage in the shape of Docker's ContainerStatsResponse (cpu_stats, memory_stats, …)."""
        ...

    def processes(self) -> list[int]:
        """Process ids on the host of everything inside."""
        ...

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        ...


@runtime_checkable
class Secluded(Protocol):
    """Optional, with the word "guest": an instance with a kernel of its own."""

    def inside_kills(self) -> int:
        """How many processes that kernel had killed for want of memory when it ended."""
        ...

    def failure(self) -> str:
        """Why that kernel or its machine failed, "" if it ended with the workload."""
        ...
