"""checkpoint and restore: a container's processes into files and back, by CRIU (criu.py).

<image path>/             CRIU's images, and
    descriptors.json      what the first process had as its standard streams, as runc keeps it

CRIU makes again what is the container's own: namespaces, mounts, memory, sockets, filters. What
came from outside has a name in the images and is given anew: bind mounts and masked files by their
destinations, standard streams, namespaces that were joined by path.
"""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from bulkhead.errors import Conflict, Invalid, Unsupported
from bulkhead.isolation import mounts as planned
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.isolation.cgroups.group import Group
from bulkhead.linux import mountinfo, mounts, namespaces, openat2, procfs
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Hooks, Resources, Spec
from bulkhead.runtime import console, criu, hooks, lifecycle, parent, scopes
from bulkhead.runtime.main import Context
from bulkhead.runtime.records import Record, state

_MODES = {"ignore": 0, "full": 4, "strict": 5, "soft": 3}
"""--manage-cgroups-mode: criu_cg_mode."""
_NEW_NETWORK = 0x40000000
_NEW_MOUNTS = 0x20000
"""clone(2)."""
_IPTABLES, _NFTABLES = 1, 2
"""criu_network_lock_method."""
_NULL = "/dev/null"
_LOG_LEVEL = 4
_STREAMS = "descriptors.json"
_JOINED: dict[Literal["network", "pid"], str] = {"network": "extRootNetNS", "pid": "extRootPidNS"}
"""Names in the images of namespaces that come from outside."""
_DEVICES = ("/dev/full", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero")
"""Bound from the host in a user namespace."""


def checkpoint(context: Context) -> int:
    """Save a container; unless it is to go on, or this is a --pre-dump, it is removed."""
    _refuse(context)
    records, identity = context.records, context.arguments[0]
    pre_dump = context.flag("pre-dump")
    with records.locked(identity):
        record = records.load(identity)
        if records.status(record) not in ("running", "paused"):
            raise Conflict("container must be running or paused to be checkpointed")
        spec = records.spec(identity)
        group = cgroups.detect().open(record.cgroup)
        with _places(context, make=True) as (images, work):
            given = _common(context, images, work, "dump")
            streams, external = _streams(record.pid)
            given |= {
                "pid": record.pid,
                "root": record.rootfs,
                "leave_running": context.flag("leave-running"),
                "link_remap": context.flag("link-remap"),
                "tcp_skip_in_flight": context.flag("tcp-skip-in-flight"),
                "parent_img": context.text("parent-path"),
                "track_mem": pre_dump or bool(context.text("parent-path")),
                "freeze_cgroup": _freezer(group),
                "external": [*external, *_outside_mounts(record.pid, spec), *_joined(spec)],
            }
            with OwnedFd(os.open(_STREAMS, _WRITE, 0o600, dir_fd=images)) as fd:
                os.write(int(fd), json.dumps(streams).encode())
            kind = criu.PRE_DUMP if pre_dump else criu.DUMP
            _criu(context).run(kind, given, _told, log=_log(context, "dump"))
    if not context.flag("leave-running") and not pre_dump:
        lifecycle.delete(records, identity, force=True, warn=context.warn)
    return 0


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def _told(_point: str, _pid: int, _fd: "OwnedFd | None") -> None:
    """Nothing is done at the points of a dump."""


def _refuse(context: Context) -> None:
    for name, why in (
        ("lazy-pages", "pages are in the image path"),
        ("page-server", "pages are in the image path"),
        ("status-fd", "the command has ended when all is done"),
        ("lsm-mount-context", "mounts keep their contexts"),
        ("no-pivot", "the root is always changed by pivot_root"),
        ("no-new-keyring", "keyrings are not restored"),
        ("preserve-fds", "a container gets its streams only"),
    ):
        if context.values.get(name):
            raise Unsupported(f"--{name} is not supported: {why}")
    for name in context.texts("empty-ns"):
        if name != "network":
            raise Unsupported(f"--empty-ns {name}: only network can be left empty")


def _criu(context: Context) -> criu.Criu:
    return criu.Criu(str(context.general["criu"]) or "criu")


def _work(context: Context) -> str:
    return context.text("work-path") or _images(context)


def _images(context: Context) -> str:
    return os.path.abspath(context.text("image-path") or "checkpoint")


def _log(context: Context, name: str) -> str:
    return f"{os.path.abspath(_work(context))}/{name}.log"


@contextlib.contextmanager
def _places(context: Context, *, make: bool) -> Iterator[tuple[int, int]]:
    """Descriptors of the image and work paths."""
    flags = os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC
    opened = []
    with ExitStack() as undo:
        for path, made in ((_images(context), make), (_work(context), True)):
            try:
                if made:
                    os.makedirs(path, mode=0o700, exist_ok=True)
                opened.append(int(undo.enter_context(OwnedFd(os.open(path, flags)))))
            except OSError as error:
                raise Invalid(f"{path}: {error.strerror}") from error
        yield opened[0], opened[1]


def _common(context: Context, images: int, work: int, name: str) -> dict[str, criu.Given]:
    mode = context.text("manage-cgroups-mode")
    if mode not in _MODES:
        raise Invalid(f"--manage-cgroups-mode {mode!r}: {', '.join(sorted(_MODES))}")
    return {
        "images_dir_fd": images,
        "work_dir_fd": work,
        "log_level": _LOG_LEVEL,
        "log_file": f"{name}.log",
        "notify_scripts": True,
        "orphan_pts_master": True,
        "network_lock": _IPTABLES if shutil.which("iptables-restore") else _NFTABLES,
        "manage_cgroups": mode != "ignore",
        "manage_cgroups_mode": _MODES[mode],
        "tcp_established": context.flag("tcp-established"),
        "tcp_close": context.flag("tcp-close"),
        "ext_unix_sk": context.flag("ext-unix-sk"),
        "shell_job": context.flag("shell-job"),
        "file_locks": context.flag("file-locks"),
        "auto_dedup": context.flag("auto-dedup"),
        "empty_ns": _NEW_NETWORK if context.texts("empty-ns") else 0,
    }


# --- what came from outside


def _streams(pid: int) -> tuple[list[str], list[str]]:
    """(what the three standard streams are called in the images, of these what is external)."""
    own = {mount.mount_id for mount in mountinfo.read(pid)}
    names, external = [], []
    for number in range(3):
        try:
            name = os.readlink(f"/proc/{pid}/fd/{number}")
            found = os.stat(f"/proc/{pid}/fd/{number}")
        except OSError:
            names.append("")  # it has closed it
            continue
        mount_id = _mount_id(pid, number)
        if stat.S_ISSOCK(found.st_mode):
            external.append(f"unix[{found.st_ino}]")
        elif not stat.S_ISFIFO(found.st_mode) and mount_id not in own:
            name = f"file[{mount_id:x}:{found.st_ino:x}]"
            external.append(name)
        names.append(name)
    return names, sorted(set(external))


def _mount_id(pid: int, number: int) -> int:
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return int(fields["mnt_id"])


def _given_anew(name: str) -> bool:
    """Whether a standard stream of this name is made of the caller's."""
    return name.startswith(("pipe:[", "file[", "socket:["))


def _outside_mounts(pid: int, spec: Spec) -> list[str]:
    """--external of every mount whose files are not the container's own."""
    found = mountinfo.read(pid)
    whole = {mount.device for mount in found if mount.root == "/" and mount.target != "/"}
    masked = {os.path.normpath(path) for path in spec.linux.masked_paths}
    out = []
    for mount in found:
        if mount.target == "/" or mount.device in whole or mount.fstype.startswith("cgroup"):
            continue
        name = _NULL if mount.target in masked else mount.target
        out.append(f"mnt[{mount.target}]:{name}")
    return out


def _sources(spec: Spec) -> list[str]:
    """--external of a restore: where these mounts come from."""
    sources = {_NULL: _NULL, **{path: path for path in _DEVICES}}
    for mount in spec.mounts:
        if planned.is_bind(mount):
            sources[os.path.normpath(mount.destination)] = mount.source
    return [f"mnt[{name}]:{path}" for name, path in sources.items()]


def _joined(spec: Spec) -> list[str]:
    """--external of namespaces that the configuration names by path."""
    out = []
    for kind, name in _JOINED.items():
        namespace = spec.linux.namespace(kind)
        if namespace is not None and namespace.path:
            out.append(
                f"{'net' if kind == 'network' else kind}[{os.stat(namespace.path).st_ino}]:{name}"
            )
    return out


def _freezer(group: Group) -> str:
    folders = group.folders()
    return next((path for path in folders if "freezer" in path), folders[0]) if folders else ""


# --- restore


@dataclass
class _Restoration:
    """One `restore` under way."""

    context: Context
    record: Record
    spec: Spec
    group: Group
    options: lifecycle.Options
    scope: scopes.Scope | None
    pid: int = 0
    lent: list[int] = field(default_factory=list)

    def note(self, point: str, pid: int, fd: "OwnedFd | None") -> None:
        """What is to be done at CRIU's points."""
        if point == "orphan-pts-master" and fd is not None:
            if self.options.console_socket:
                console.send(self.options.console_socket, int(fd))
            else:
                self.options.master.append(fd.duplicate())
        elif point == "setup-namespaces":
            declared = self.spec.hooks or Hooks()
            told = state(self.record, "creating") | {"pid": pid}
            hooks.Point("prestart", declared.prestart, hooks.outside).call(told)
            hooks.Point("createRuntime", declared.create_runtime, hooks.outside).call(told)
        elif point == "post-restore":
            self.pid = pid
            if self.scope is not None:
                resources = self.spec.linux.resources or Resources()
                scopes.start(self.scope, pid, self.record.id, resources)
                self.group.apply(resources)
            if _readonly(self.spec):
                _protect_root(pid)

    def run(self, given: dict[str, criu.Given], images: int, undo: ExitStack) -> None:
        """Restore the processes; they are this process's children."""
        self._make_mount_points()
        root = self.context.records.path(self.record.id, "root")
        given |= {
            "root": _mounted(self.record.rootfs, root, undo),
            "rst_sibling": True,
            "lsm_profile": self.context.text("lsm-profile"),
            "cg_root": _group_roots(self.group),
            "external": [*_sources(self.spec)],
            "inherit_fd": self._inherited(images, undo),
        }
        log = _log(self.context, "restore")
        _criu(self.context).run(criu.RESTORE, given, self.note, fds=self.lent, log=log)
        if not self.pid:
            raise Conflict(f"criu named no process; see {log}")

    def _lend(self, fd: int, name: str) -> bytes:
        self.lent.append(fd)
        return criu.pair((1, name), (2, fd))

    def _inherited(self, images: int, undo: ExitStack) -> list[bytes]:
        try:
            with OwnedFd(os.open(_STREAMS, os.O_RDONLY | os.O_CLOEXEC, dir_fd=images)) as fd:
                names = json.loads(os.read(int(fd), 1 << 16))
        except (OSError, ValueError) as error:
            raise Invalid(
                f"{_images(self.context)} is no checkpoint: {_STREAMS}: {error}"
            ) from error
        out, taken = [], set()
        for number, name in enumerate(names[:3]):
            if isinstance(name, str) and _given_anew(name) and name not in taken:
                taken.add(name)
                copy = undo.enter_context(OwnedFd(os.dup(number)))
                out.append(self._lend(int(copy), name))
        for kind, name in _JOINED.items():
            namespace = self.spec.linux.namespace(kind)
            if namespace is not None and namespace.path:
                joined = undo.enter_context(namespaces.open_namespace(namespace.path))
                out.append(self._lend(int(joined), name))
        return out

    def _make_mount_points(self) -> None:
        """Places in the root that mounts need, where they are not there; never outside of it."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        with OwnedFd(os.open(self.record.rootfs, flags)) as root:
            for mount in self.spec.mounts:
                bound = planned.is_bind(mount)
                folder = not bound or os.path.isdir(mount.source)
                _make(root, mount.destination, folder=folder)


def _make(root: OwnedFd, path: str, *, folder: bool) -> None:
    parts = [part for part in os.path.normpath(path).split("/") if part]
    with ExitStack() as undo:
        place = root
        for number, part in enumerate(parts):
            try:
                here = openat2.openat2(
                    int(root), "/".join(parts[: number + 1]), os.O_PATH, openat2.IN_ROOT
                )
            except FileNotFoundError:
                if number + 1 == len(parts) and not folder:
                    os.close(os.open(part, _WRITE, 0o644, dir_fd=int(place)))
                    return
                os.mkdir(part, 0o755, dir_fd=int(place))
                here = openat2.openat2(
                    int(root), "/".join(parts[: number + 1]), os.O_PATH, openat2.IN_ROOT
                )
            place = undo.enter_context(here)


def _leave_mounts() -> None:
    """A mount namespace that ends with us; descriptors from before cannot be mounted on."""
    namespaces.unshare(_NEW_MOUNTS)
    mounts.mount("", "/", "", mounts.MS_REC | mounts.MS_SLAVE)


def _readonly(spec: Spec) -> bool:
    return spec.root is not None and spec.root.readonly


def _protect_root(pid: int) -> None:
    """Make the root of `pid` read-only, which CRIU does not; nothing of it runs yet."""
    ours = namespaces.open_namespace("/proc/self/ns/mnt")
    with ours, namespaces.open_namespace(f"/proc/{pid}/ns/mnt") as theirs:
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with OwnedFd(here):
            namespaces.setns(int(theirs), _NEW_MOUNTS)
            try:
                with OwnedFd(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
                    mounts.set_attributes(int(root), set_=mounts.ATTR_RDONLY)
            finally:
                namespaces.setns(int(ours), _NEW_MOUNTS)
                os.fchdir(here)


def _mounted(rootfs: str, place: str, undo: ExitStack) -> str:
    """The root file system as a mount of its own."""
    os.mkdir(place, 0o700)
    undo.callback(os.rmdir, place)
    mounts.mount(rootfs, place, "", mounts.MS_BIND | mounts.MS_REC)
    undo.callback(mounts.unmount, place, mounts.MNT_DETACH)
    return place


def _group_roots(group: Group) -> list[bytes]:
    """cgroup_root for every hierarchy: the container's processes go to its group there."""
    version = cgroups.detect().version
    if version == 2:
        return [criu.pair((1, b""), (2, group.path))]
    found = []
    for folder in group.folders():
        controllers = os.path.basename(folder.removesuffix(group.path))
        found += [criu.pair((1, name), (2, group.path)) for name in controllers.split(",")]
    return found


def restore(context: Context) -> int:
    """Make a container of a checkpoint; then as `run`."""
    _refuse(context)
    options = lifecycle.Options(
        bundle=context.text("bundle") or ".",
        console_socket=context.text("console-socket"),
        pid_file=context.text("pid-file"),
        warn=context.warn,
        systemd=bool(context.general["systemd-cgroup"]),
    )
    identity, detach = context.arguments[0], context.flag("detach")
    if not detach and not context.flag("no-subreaper"):
        parent.current().adopt_orphans()
    record = _restored(context, identity, options)
    if detach:
        return 0
    for master in options.master:
        console.relay(master)
    return parent.current().follow(record.pid, (*context.again(), "delete", "--force", identity))


def _restored(context: Context, identity: str, options: lifecycle.Options) -> Record:
    records = context.records
    with ExitStack() as undo, ExitStack() as lent:
        _leave_mounts()
        images, work = lent.enter_context(_places(context, make=False))
        spec, record, scope = lifecycle.read(records, identity, options)
        undo.enter_context(records.made(identity))
        undo.callback(records.remove, identity)
        records.save(record)
        group = cgroups.detect().create(record.cgroup, spec.linux.resources)
        undo.callback(group.delete)
        undo.callback(group.kill)
        one = _Restoration(context, record, spec, group, options, scope)
        one.run(_common(context, images, work, "restore"), images, lent)
        record.pid = one.pid
        record.start_time = procfs.start_time(one.pid)
        records.save_spec(identity, spec, [])
        records.save(record)
        if options.pid_file:
            lifecycle.write_pid(options.pid_file, one.pid)
        undo.pop_all()
    return record
