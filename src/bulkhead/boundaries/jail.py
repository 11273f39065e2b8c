"""The jail of a machine monitor: a container with nothing in it but the monitor's own files.

    <root>/jails/KIND-HASH/        read-only root: programs, their libraries, what a kind adds
        dev/ tmp/ run/             mount points
        disks/0 … disks/31         mount points of the guest's disks

A root is made once per set of files (named by their inodes and times) and shared by every guest of
its kind; it is made of hard links where that is possible. There is no /proc and no shell in it.
"""

import contextlib
import hashlib
import os
import resource
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.errors import Unsupported
from bulkhead.home import Home
from bulkhead.isolation import mounts
from bulkhead.linux import elf
from bulkhead.oci.runtime import (
    Capabilities,
    Device,
    Linux,
    Memory,
    Mount,
    Namespace,
    Pids,
    Process,
    Resources,
    Rlimit,
    Root,
    Seccomp,
    Spec,
    User,
)

DISKS = 32
FIRST_FD = 10
"""The number of the first descriptor that a jail's process is given."""
DISK_BYTES = 10 << 30
"""A guest's writable disk, if nothing else is asked for."""
MOST_TASKS = 4096
"""Likewise its tasks: those of a sandbox are processes of the host."""
_FILES_BYTES = 16 << 20
_FIRST_UID = 0x70000000
_FOLDERS = ("dev", "tmp", "run", "disks")


@dataclass(frozen=True, slots=True)
class JailRoot:
    """A root directory on the host, and where its libraries are inside."""

    directory: str
    library_path: str


class Roots:
    """The jail roots of one installation; remembers what it has looked up."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._known: dict[tuple[object, ...], JailRoot] = {}

    def make(
        self,
        kind: str,
        programs: Mapping[str, str],
        files: Mapping[str, str | bytes] | None = None,
    ) -> JailRoot:
        """The root with `programs` and `files`: place inside → file of the host, or its text.

        Unsupported if a program or one of its libraries is missing.
        """
        extra = files or {}
        sources = (*programs.values(), *(one for one in extra.values() if isinstance(one, str)))
        texts = (one for one in extra.values() if isinstance(one, bytes))
        places = (*programs, *extra)
        key = (kind, *places, *texts, *(_stamp(path) for path in sources))
        found = self._known.get(key)
        if found is None or not os.path.isdir(found.directory):
            found = self._known[key] = self._find(kind, programs, extra)
        return found

    def _find(
        self, kind: str, programs: Mapping[str, str], extra: Mapping[str, str | bytes]
    ) -> JailRoot:
        contents: dict[str, str | bytes] = dict(extra)
        for place, program in programs.items():
            try:
                closure = elf.closure(program)
            except (elf.ElfError, OSError) as error:
                raise Unsupported(f"the jail of {program}: {error}") from error
            contents |= {path: real for path, real in closure.items() if path != program}
            contents[place] = os.path.realpath(program)
        libraries = {os.path.dirname(path) for path in contents if ".so" in os.path.basename(path)}
        key = hashlib.sha256(b"1")
        for place in sorted(contents):
            source = contents[place]
            what = source if isinstance(source, bytes) else repr(_stamp(source)).encode()
            key.update(b"%d\0%d\0" % (len(place), len(what)) + place.encode() + what)
        directory = self._home.in_root("jails", f"{kind}-{key.hexdigest()[:16]}")
        if not os.path.isdir(directory):
            _build(directory, contents)
        return JailRoot(directory, ":".join(sorted(libraries)))


def _stamp(path: str) -> tuple[object, ...]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise Unsupported(f"{path}: {error.strerror}") from error
    return path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _build(directory: str, contents: Mapping[str, str | bytes]) -> None:
    parent = os.path.dirname(directory)
    os.makedirs(parent, mode=0o711, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=parent, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, scratch)
        for folder in _FOLDERS:
            os.mkdir(f"{scratch}/{folder}", 0o755)
        for number in range(DISKS):
            os.close(os.open(f"{scratch}/disks/{number}", os.O_CREAT | os.O_WRONLY, 0o444))
        for place, source in contents.items():
            target = f"{scratch}/{place.lstrip('/')}"
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            _place(source, target)
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, directory)
        except OSError:
            if not os.path.isdir(directory):
                raise
            return  # another made it meanwhile
        undo.pop_all()


def _place(source: str | bytes, target: str) -> None:
    if isinstance(source, bytes):
        with open(target, "xb") as file:
            file.write(source)
        os.chmod(target, 0o444)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or links to others' files are forbidden
        shutil.copyfile(source, target)
        shutil.copymode(source, target)


def uid_of(identity: str) -> int:
    """The user and group id of a workload's monitor: its own, far from those of people."""
    return _FIRST_UID + int(hashlib.sha256(identity.encode()).hexdigest()[:6], 16)


@dataclass(frozen=True, slots=True)
class Jail:
    """What a kind of monitor needs beyond what every jail has. Sizes in bytes."""

    root: JailRoot
    args: Sequence[str]
    seccomp: Seccomp
    disks: Sequence[tuple[str, bool]]
    """Files of the host, to be /disks/0 and so on; and whether they may be written."""
    guest_bytes: int
    """The guest's memory."""
    overhead_bytes: int
    """What the monitor may use beside it."""
    tasks: int
    """Processes and threads of the monitor beside those the guest's own count for."""
    terminal: bool
    devices: Sequence[Device] = ()
    mounts: Sequence[Mount] = ()
    """Beside those of every jail."""
    environment: Sequence[str] = ()
    """Likewise."""


def jail_bundle(bundle: Bundle, jail: Jail, fds: tuple[int, ...]) -> Bundle:
    """The container in which the monitor of `bundle`'s guest runs."""
    return Bundle(
        id=bundle.id,
        spec=_spec(bundle, jail),
        rootfs=Rootfs(directory=jail.root.directory),
        directory=bundle.directory,
        fds=fds,
    )


def process(bundle: Bundle, jail: Jail) -> Process:
    """A process of the jail: nobody's user, no powers."""
    uid = uid_of(bundle.id)
    given = bundle.spec.process
    return Process(
        args=list(jail.args),
        env=[
            "TMPDIR=/tmp",
            "HOME=/tmp",
            f"LD_LIBRARY_PATH={jail.root.library_path}",
            *jail.environment,
        ],
        terminal=jail.terminal,
        user=User(uid=uid, gid=uid),
        capabilities=Capabilities([], [], [], [], []),
        rlimits=[
            Rlimit("RLIMIT_CORE", 0, 0),
            Rlimit("RLIMIT_NOFILE", 4096, 4096),
            *_file_size(bundle, jail),
        ],
        no_new_privileges=True,
        oom_score_adj=given.oom_score_adj if given is not None else None,
    )


def _file_size(bundle: Bundle, jail: Jail) -> list[Rlimit]:
    """No file grows beyond what its disk, or its memory, is: whoever has broken out of the guest
    cannot fill the host's disk. The disks of a whole machine grow, with its snapshots.
    """
    if bundle.machine is not None:
        return []
    sizes = [os.stat(path).st_size for path, writable in jail.disks if writable]
    most = max(DISK_BYTES, 2 * (jail.guest_bytes + jail.overhead_bytes), *sizes)
    return [Rlimit("RLIMIT_FSIZE", most, most)]


def raise_file_size(pid: int, size: int) -> None:
    """Let process `pid` and its descendants write files of `size` bytes; prlimit(2)."""
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError, ValueError):
            soft, _ = resource.prlimit(one, resource.RLIMIT_FSIZE)
            if 0 <= soft < size:
                resource.prlimit(one, resource.RLIMIT_FSIZE, (size, size))
            with open(f"/proc/{one}/task/{one}/children", encoding="ascii") as file:
                waiting += [int(child) for child in file.read().split()]


def _spec(bundle: Bundle, jail: Jail) -> Spec:
    uid = uid_of(bundle.id)
    return Spec(
        root=Root(path="rootfs", readonly=True),
        hostname="guest",
        process=process(bundle, jail),
        mounts=_mounts(jail, uid),
        linux=Linux(
            namespaces=isolated(bundle.spec.linux),
            cgroups_path=bundle.spec.linux.cgroups_path,
            resources=resources(bundle.spec.linux.resources, with_files(bundle, jail)),
            devices=list(jail.devices),
            seccomp=jail.seccomp,
        ),
    )


def with_files(bundle: Bundle, jail: Jail) -> Jail:
    """With room for the file server, which keeps some 150 bytes for each file the guest knows."""
    if not has_files(bundle):
        return jail
    more = _FILES_BYTES + jail.guest_bytes // 6
    return replace(jail, overhead_bytes=jail.overhead_bytes + more, tasks=jail.tasks + 1)


def has_files(bundle: Bundle) -> bool:
    """Whether the workload has binds other than the engine's own small files."""
    own = f"{bundle.directory}/"
    return any(mounts.is_bind(m) and not m.source.startswith(own) for m in bundle.spec.mounts)


def isolated(linux: Linux) -> list[Namespace]:
    """New namespaces of every kind, but for the network that the workload was given."""
    network = linux.namespace("network")
    path = network.path if network is not None else ""
    new = [Namespace(kind) for kind in ("mount", "pid", "ipc", "uts", "cgroup")]
    return [*new, Namespace("network", path)]


def _mounts(jail: Jail, uid: int) -> list[Mount]:
    own = f"uid={uid},gid={uid}".split(",")
    memory = jail.guest_bytes + jail.overhead_bytes
    found = [
        Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "noexec", "mode=755", "size=65536"]),
        Mount(
            "/dev/pts", "devpts", "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        ),
        # The memory file of user-mode-linux is mapped executable.
        Mount("/tmp", "tmpfs", "tmpfs", ["nosuid", "nodev", "mode=700", f"size={memory}", *own]),
        Mount(
            "/run", "tmpfs", "tmpfs",
            ["nosuid", "nodev", "noexec", "mode=700", "size=65536", *own],
        ),
    ]  # fmt: skip
    found.extend(jail.mounts)
    for number, (path, writable) in enumerate(jail.disks):
        mode = "rw" if writable else "ro"
        options = ["bind", mode, "nosuid", "nodev", "noexec"]
        found.append(Mount(f"/disks/{number}", path, "bind", options))
    return found


def resources(given: Resources | None, jail: Jail) -> Resources:
    """The workload's limits with room for the monitor.

    Memory is always limited, by the guest's size; the guest limits what runs in it by that too.
    """
    base = given or Resources()
    limit = jail.guest_bytes + jail.overhead_bytes
    memory = msgspec.structs.replace(base.memory or Memory(), limit=limit)
    if memory.swap is not None and memory.swap >= 0:
        memory.swap += jail.overhead_bytes
    asked = base.pids.limit if base.pids is not None else 0
    pids = Pids((asked if asked > 0 else MOST_TASKS) + jail.tasks)
    return msgspec.structs.replace(base, memory=memory, pids=pids)
