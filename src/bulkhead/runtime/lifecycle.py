"""create, start, run, kill, delete: a container's life without an engine.

`create` launches the container's own program (boundaries/container_plan.py) with two gates: at
"hooks" the hooks run that belong before the pivot, at "start" the child waits in a fifo for
`start`, which is another process. Whoever calls us is its parent or subreaper.
"""

import contextlib
import errno
import os
import pwd
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache

import msgspec

from bulkhead import home
from bulkhead.boundaries.container import Container, ContainerBoundary
from bulkhead.boundaries.container_process import candidates
from bulkhead.boundary.failures import EXEC, launch_failure
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import Bundle, Rootfs, Stdio
from bulkhead.errors import Conflict, Internal, Invalid, NotFound, Unavailable
from bulkhead.isolation import mounts
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.linux import openat2, pidfd, procfs
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import DeviceCgroup, Hooks, Mount, Process, Resources, Spec, decode
from bulkhead.runtime import console, extras, hooks, scopes
from bulkhead.runtime.driving import drive, run
from bulkhead.runtime.records import Record, Records, alive, state
from bulkhead.runtime.spawner import PTY, Spawner, read_progress

_FORK_NO_EXEC = 0x40
"""PF_FORKNOEXEC of the kernel's process flags: it has not executed a program yet."""
_LOOK_S = 0.0002

Warn = Callable[[str], None]

_DEVICES = (
    *(DeviceCgroup(allow=True, type_=kind, access="m") for kind in "cb"),
    *(
        DeviceCgroup(allow=True, type_="c", major=major, minor=minor, access="rwm")
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))
    ),
)
"""What every container may use, whatever its rules: null, zero, full, random, urandom, tty, ptmx,
terminals; and the making of nodes (config-linux.md, "Default Devices")."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to create; `warn` is told what does not stop it."""

    bundle: str
    console_socket: str = ""
    pid_file: str = ""
    pidfd_socket: str = ""
    systemd: bool = False
    """cgroupsPath is systemd's (scopes.py)."""
    fds: Sequence[int] = ()
    keyring: bool = True
    pivot: bool = True
    warn: Warn = field(default=lambda _text: None)
    master: list[OwnedFd] = field(default_factory=list)
    """Where the terminal's master goes without a console socket."""


def read_bundle(path: str) -> tuple[Spec, str]:
    """(configuration, absolute root) of the bundle at `path`; NotFound, Invalid in one line."""
    name = os.path.join(path, "config.json")
    try:
        with open(name, "rb") as file:
            spec = decode(file.read())
    except FileNotFoundError:
        raise NotFound(f"JSON specification file {name} not found") from None
    except OSError as error:
        raise Invalid(f"{name}: {error.strerror}") from None
    if spec.root is None:
        raise Invalid("config.json has no root: nothing to run in")
    if spec.process is None:
        raise Invalid("config.json has no process: nothing to run")
    root = os.path.join(path, spec.root.path)
    if not os.path.isdir(root):
        raise Invalid(f"root.path {root} is not a directory")
    return spec, os.path.realpath(root)


def prepare(spec: Spec, bundle: str, group: str) -> Spec:
    """The configuration as our boundary takes it: absolute binds, device rules, cgroup path."""
    linux = spec.linux
    resources = linux.resources or Resources()
    resources = msgspec.structs.replace(resources, devices=[*resources.devices, *_DEVICES])
    linux = msgspec.structs.replace(linux, resources=resources, cgroups_path=group)
    process = None if spec.process is None else usable(spec.process)
    binds = [_absolute(mount, bundle) for mount in spec.mounts]
    return msgspec.structs.replace(spec, linux=linux, process=process, mounts=binds)


def usable(process: Process) -> Process:
    """The process without ambient capabilities that it could not have; capabilities(7).

    Engines name them without making them inheritable, and the runtimes that they know let it pass.
    """
    sets = process.capabilities
    if sets is None:
        return process
    both = set(sets.permitted) & set(sets.inheritable)
    ambient = [name for name in sets.ambient if name in both]
    return msgspec.structs.replace(
        process, capabilities=msgspec.structs.replace(sets, ambient=ambient)
    )


def _absolute(mount: Mount, bundle: str) -> Mount:
    if not mounts.is_bind(mount) or os.path.isabs(mount.source):
        return mount
    return msgspec.structs.replace(mount, source=os.path.join(bundle, mount.source))


def cgroup_path(path: str, identity: str) -> str:
    """cgroupsPath as an absolute path below the hierarchies; Invalid for systemd's form."""
    if path.count(":") == 2 and not path.startswith("/"):
        raise Invalid(f"linux.cgroupsPath {path!r} is systemd's form: it takes --systemd-cgroup")
    return "/" + os.path.normpath(path).lstrip("/") if path else f"/bulkhead-runtime-{identity}"


@cache
def _boundary(place: home.Home) -> ContainerBoundary:
    """One for all commands of this process: it keeps programs and filters."""
    return ContainerBoundary(Services(place, Spawner()))


def boundary_of(spawner: Spawner) -> ContainerBoundary:
    """The container boundary over `spawner`."""
    return _boundary(home.default()).over(spawner)


class _Creation:
    """One `create` under way."""

    def __init__(self, records: Records, identity: str, options: Options) -> None:
        records.path(identity)
        self.records, self.options = records, options
        self.bundle = os.path.realpath(options.bundle)
        self.spec, root = read_bundle(self.bundle)
        _check_console(self.spec, options)
        extras.check_listener(self.spec.linux.seccomp)
        self.hooks = self.spec.hooks or Hooks()
        self.scope: scopes.Scope | None = None
        wanted = self.spec.linux.cgroups_path
        if options.systemd:
            scopes.check()
            self.scope = scopes.parse(wanted, identity)
        group = self.scope.path if self.scope else cgroup_path(wanted, identity)
        self.spec = prepare(self.spec, self.bundle, group)
        self.record = Record(
            id=identity,
            bundle=self.bundle,
            rootfs=root,
            created=_now(),
            oci_version=self.spec.oci_version,
            cgroup=self.spec.linux.cgroups_path,
            owner=_owner(),
            annotations=self.spec.annotations,
            unit=self.scope.unit if self.scope else "",
        )

    def run(self) -> Record:
        """Create the container; nothing of it is left if that fails."""
        identity = self.record.id
        with self.records.made(identity) as path, ExitStack() as kept:
            kept.callback(self.records.remove, identity)
            self.records.save(self.record)
            spawner = Spawner(f"{path}/progress")
            boundary = boundary_of(spawner)
            with ExitStack() as lent:
                container = self._launch(boundary, spawner, path, kept, lent)
            pid = container.state().pid
            kept.callback(_end, container)
            self.record.pid, self.record.start_time = pid, procfs.start_time(pid)
            self.records.save(self.record)
            if self.options.pid_file:
                write_pid(self.options.pid_file, pid)
            if self.options.pidfd_socket:
                extras.send_pidfd(self.options.pidfd_socket, pid)
            kept.pop_all()
        return self.record

    def _launch(
        self,
        boundary: ContainerBoundary,
        spawner: Spawner,
        path: str,
        undo: ExitStack,
        lent: ExitStack,
    ) -> Container:
        fifo = f"{path}/start.fifo"
        os.mkfifo(fifo, 0o600)
        # Open for both: a fifo that nobody has open for writing is at its end.
        gate = lent.enter_context(OwnedFd(os.open(fifo, os.O_RDWR | os.O_CLOEXEC)))
        read, write = os.pipe2(os.O_CLOEXEC)
        waits = lent.enter_context(OwnedFd(read))
        opens = lent.enter_context(OwnedFd(write))
        bundle = Bundle(
            self.record.id,
            self.spec,
            Rootfs(directory=self.record.rootfs, mapped=False),
            path,
            gates={"hooks": int(waits), "start": int(gate)},
            fds=tuple(self.options.fds),
            keep_numbers=True,
            keyring=self.options.keyring,
            pivot=self.options.pivot,
            listener=extras.listener(self.spec, state(self.record, "creating"), spawner, lent),
        )
        container = drive(boundary.create(bundle))
        undo.callback(container.group.delete)

        def hooks_due(pid: int, _fd: OwnedFd) -> bool:
            if self.scope is not None:
                scopes.start(self.scope, pid, self.record.id, self.spec.linux.resources)
                # systemd may have taken controllers from the group, and their limits with them.
                container.group.apply(self.spec.linux.resources or Resources())
            self._run_hooks(pid, container)
            os.write(int(opens), b"0")
            return False

        spawner.notes |= {
            PTY: self._take_terminal,
            "hooks": hooks_due,
            "start": self._ready,
        }
        terminal = self.spec.process is not None and self.spec.process.terminal
        stdio = Stdio(terminal=True) if terminal else streams(lent)
        execute = run if self.spec.linux.namespace("user") is not None else drive
        execute(container.start(stdio))
        self.records.save_spec(self.record.id, self.spec, spawner.steps)
        return container

    def _ready(self, pid: int, _fd: OwnedFd) -> bool:
        assert self.spec.process is not None
        check_program(pid, self.spec.process)
        return True

    def _take_terminal(self, _pid: int, master: OwnedFd) -> bool:
        if self.options.console_socket:
            console.send(self.options.console_socket, int(master))
        else:
            self.options.master.append(master.duplicate())
        return False

    def _run_hooks(self, pid: int, container: Container) -> None:
        told = state(self.record, "creating") | {"pid": pid}
        for name, members in (
            ("prestart", self.hooks.prestart),
            ("createRuntime", self.hooks.create_runtime),
        ):
            hooks.Point(name, members, hooks.outside).call(told)
        if self.hooks.create_container:
            with inside(self.spec, pid, container) as there:
                point = hooks.Point(
                    "createContainer", self.hooks.create_container, there.before_pivot
                )
                point.call(told)


def check_program(pid: int, process: Process) -> None:
    """Refuse a program that is not in the root of `pid`, or that nobody can execute.

    CommandNotFound, CommandNotExecutable; `start` would find out too late for those who ask.
    """
    problem = errno.ENOENT
    with OwnedFd(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        for path in candidates(process):
            inside_root = os.path.join(process.cwd, path)
            try:
                with openat2.openat2(int(root), inside_root, os.O_PATH, openat2.IN_ROOT) as fd:
                    mode = os.fstat(int(fd)).st_mode
            except OSError:
                continue
            if stat.S_ISREG(mode) and mode & 0o111:
                return
            problem = errno.EACCES
    name = process.args[0].encode(errors="surrogateescape")
    raise launch_failure(EXEC, 0, problem, name, ["execute the program"], no_interpreter=False)


def read(
    records: Records, identity: str, options: Options
) -> tuple[Spec, Record, scopes.Scope | None]:
    """What a bundle is to become, before any of it is there; Invalid for one that cannot be."""
    creation = _Creation(records, identity, options)
    return creation.spec, creation.record, creation.scope


def create(records: Records, identity: str, options: Options) -> Record:
    """Make the container `identity` up to the moment before its program runs."""
    return _Creation(records, identity, options).run()


def load(records: Records, record: Record, spawner: Spawner | None = None) -> Container:
    """The container of an earlier command; `spawner` runs what is executed in it."""
    spec = records.spec(record.id)
    bundle = Bundle(record.id, spec, Rootfs(directory=record.rootfs), records.path(record.id))
    boundary = boundary_of(spawner or Spawner())
    return drive(boundary.load(bundle, record.pid if alive(record) else 0))


@contextlib.contextmanager
def inside(spec: Spec, pid: int, container: Container) -> Iterator[hooks.Inside]:
    """`hooks.Inside` with the control groups of `container`."""
    with ExitStack() as undo:
        joins = container.group.join_fds()
        for fd in joins:
            undo.callback(fd.close)
        born = container.group.clone_fd()
        if born is not None:
            undo.callback(born.close)
        yield hooks.Inside(spec, pid, joins, -1 if born is None else int(born))


def start(records: Records, identity: str, warn: Warn) -> None:
    """Let a created container run its program; LaunchFailed if that cannot be executed."""
    with records.locked(identity):
        record = records.load(identity)
        status = records.status(record)
        if status == "stopped":
            raise Conflict("cannot start a container that has stopped")
        if status != "created":
            raise Conflict("cannot start an already running container")
        spec = records.spec(identity)
        declared = spec.hooks or Hooks()
        if declared.start_container:
            _start_container_hooks(records, record, spec, declared)
        fifo = records.path(identity, "start.fifo")
        with pidfd.open_process(record.pid) as process:
            _open_gate(fifo)
            os.unlink(fifo)
            _wait_for_exec(records, record, process)
        point = hooks.Point("poststart", declared.poststart, hooks.outside)
        point.try_(state(record, "running"), warn)


def _start_container_hooks(records: Records, record: Record, spec: Spec, declared: Hooks) -> None:
    container = load(records, record)
    filter_ = container.boundary.templates.filter(spec)
    with inside(spec, record.pid, container) as there:
        hooks.Point(
            "startContainer",
            declared.start_container,
            lambda hook, given, said: there.as_workload(hook, given, said, filter_),
        ).call(state(record, "created"))


def _open_gate(fifo: str) -> None:
    try:
        with OwnedFd(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as gate:
            os.write(int(gate), b"0")
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            raise Conflict("cannot start a container that has stopped") from None
        raise


def _wait_for_exec(records: Records, record: Record, process: OwnedFd) -> None:
    """Until the child has become its program; LaunchFailed if it has ended instead."""
    poller = select.poll()
    poller.register(int(process), select.POLLIN)
    with contextlib.suppress(ProcessLookupError):  # ended, and reaped by its parent
        while procfs.kernel_flags(record.pid) & _FORK_NO_EXEC and not poller.poll(0):
            time.sleep(_LOOK_S)
    with open(records.path(record.id, "progress"), "rb") as file:
        progress = read_progress(file.read())
    if not progress.executed:
        raise progress.failure(records.steps(record.id), 0)


def kill(records: Records, identity: str, number: int, *, everyone: bool) -> None:
    """Signal the first process, or everyone; Conflict if the container does not run."""
    record = records.load(identity)
    if everyone:
        group = load(records, record).group
        if number == signal.SIGKILL:
            group.kill()
        else:
            group.signal(number)
        return
    if not alive(record):
        raise Conflict("container not running")
    with pidfd.open_process(record.pid) as process:
        if not alive(record):
            raise Conflict("container not running")
        pidfd.send_signal(process, number)
    if number == signal.SIGKILL:
        # Whoever waits for its end may have removed the container by now.
        group = cgroups.detect().open(record.cgroup)
        if group.frozen():
            group.thaw()


def delete(records: Records, identity: str, *, force: bool, warn: Warn) -> None:
    """Remove a stopped or created container; with `force` a running one, or one that is gone."""
    try:
        with records.locked(identity):
            _delete(records, identity, force=force, warn=warn)
    except NotFound:
        if not force or identity in records.ids():
            raise


def _delete(records: Records, identity: str, *, force: bool, warn: Warn) -> None:
    record = records.load(identity)
    status = records.status(record)
    if status in ("running", "paused") and not force:
        raise Conflict(f"cannot delete container {identity} that is not stopped: {status}")
    group = cgroups.detect().open(record.cgroup)
    if group.exists():  # also after a `create` that was killed
        group.kill()
        if record.pid:
            _await_end(record)
        group.delete()
    if record.unit:
        try:
            scopes.stop(record.unit)
        except Unavailable as error:  # its processes and its group are gone: that is what counts
            warn(f"{record.unit}: {error}")
    declared = (records.spec(identity).hooks if record.pid else None) or Hooks()
    point = hooks.Point("poststop", declared.poststop, hooks.outside)
    point.try_(state(record, "stopped"), warn)
    records.remove(identity)


def _await_end(record: Record) -> None:
    """Until the first process is no more than a zombie."""
    with contextlib.suppress(ProcessLookupError), pidfd.open_process(record.pid) as process:
        if procfs.start_time(record.pid) != record.start_time:
            return
        poller = select.poll()
        poller.register(int(process), select.POLLIN)
        if not poller.poll(30_000):
            raise Internal(f"process {record.pid} survives SIGKILL (uninterruptible I/O?)")


def _end(container: Container) -> None:
    container.group.kill()


def streams(undo: ExitStack) -> Stdio:
    """Copies of our standard streams: a program cannot put a descriptor onto itself."""
    copies = [undo.enter_context(OwnedFd(os.dup(number))) for number in range(3)]
    return Stdio(stdin=int(copies[0]), stdout=int(copies[1]), stderr=int(copies[2]))


def _check_console(spec: Spec, options: Options) -> None:
    terminal = spec.process is not None and spec.process.terminal
    if options.console_socket and not terminal:
        raise Invalid("--console-socket needs process.terminal in config.json")
    if options.console_socket and not stat.S_ISSOCK(_mode(options.console_socket)):
        raise Invalid(f"--console-socket {options.console_socket} is not a socket")


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from None


def write_pid(path: str, pid: int) -> None:
    """The process id in a file that appears whole."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}")
    with open(beside, "w", encoding="ascii") as file:
        file.write(str(pid))
    os.replace(beside, path)


def _now() -> str:
    nanoseconds = time.time_ns()
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def _owner() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
