"""What a guest is told to do, made from a workload's configuration: pure, but for the small files
that the engine writes (resolv.conf and such), which are read here.

    planned = start(bundle, machine, terminal=…)     # set-up, mounts of shares, main program, end
    planned = exec_(bundle, process, terminal=…)     # one more process beside the main one
    planned.frames   for `bulkhead-monitor run` or `exec` (descriptor 10)
    planned.steps    for `frames.failure`: the steps' names by the id of their RUN

The main program is the container boundary's own plan: the workload is confined inside its guest by
the same namespaces, capabilities, masks and filter. It shares the guest's network namespace, which
is its own anyway. Places in the guest:

    /layers/N    the image's layers, topmost first, from their EROFS disks
    /upper       the writable disk: upper/, work/
    /files/N     small files of the engine's, by the position of their mount
    /shares/ID   directories of the host over the channel (FUSE)
    /volumes/N   disks that are volumes, by the position of their mount

A member of a pod (member.py) has all that below a directory of its own (`Machine.base`).
"""

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from bulkhead.boundaries.container_exec import exec_template
from bulkhead.boundaries.container_plan import Ground, Template, plan_launch
from bulkhead.boundaries.container_process import Filter
from bulkhead.boundaries.guest import frames, wiring
from bulkhead.boundaries.guest.frames import Mode
from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation import mounts, sysctl
from bulkhead.isolation.rootfs import OVERLAY_OPTIONS
from bulkhead.isolation.seccomp.cache import FilterCache
from bulkhead.linux import capabilities as kernel_capabilities
from bulkhead.linux.mounts import AT_FDCWD, MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY
from bulkhead.linux.program import Fd, Program
from bulkhead.linux.terminals import window_size
from bulkhead.oci.runtime import Linux, Mount, Namespace, Process, Rlimit, Spec

MAIN = frames.MAIN
"""The main process's id, and an exec's own id towards the monitor."""
SETUP = 10
FIRST_SHARE = 100
POWER_OFF = 0x4321FEDC
RESTART = 0x01234567
"""LINUX_REBOOT_CMD_*: how the guest ends itself; reboot(2)."""
INITRAMFS = "/initramfs"
"""Where the guest's init leaves the initramfs."""
GROUP = "/sys/fs/cgroup/workload"
VIEW = "/view"
"""Where a guest that is only shown has the workload's root."""
INIT = f"{INITRAMFS}/bulkhead-init"
"""The program of --init."""
_ENGINE_FILES = frozenset({"/etc/resolv.conf", "/etc/hosts", "/etc/hostname"})
_FILE_MAX = 256 << 10
_OPEN_FILES = 1 << 20
_ALL_CAPABILITIES = frozenset(kernel_capabilities.NAMES)
JOINED = frozenset({"pid", "ipc"})
"""The namespaces, beside the network's, that workloads of one guest may share."""
_JOINING = ("ns-pid", "ns-ipc")
_DEVICES = frozenset({"/dev/fuse", "/dev/net/tun", "/dev/kmsg"})
_filters = FilterCache(None)
_LAZY = "noinit_itable,no_prefetch_block_bitmaps"
"""ext4(5), Linux 5.13: tables of inodes that were never used stay holes of the image, and what is
free is looked up when something is written."""
_replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class Written:
    """A small file, written into the guest."""

    content: bytes
    mode: int = 0o644
    directory = False


@dataclass(frozen=True, slots=True)
class Share:
    """Files of the host by way of the file server: `path` in the mount of frame id `number`.

    Several binds may come from one mount; `options` are those of its first.
    """

    number: int
    path: str = ""
    directory: bool = True
    options: str = "allow_other,default_permissions"


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system on a disk of the guest; `path` inside of it."""

    device: str
    fstype: str = "ext4"
    path: str = ""
    readonly: bool = False
    directory: bool = True


@dataclass(frozen=True, slots=True)
class Inside:
    """A file or directory that the guest has anyway."""

    path: str
    directory: bool = False


Source = Written | Share | Disk | Inside


@dataclass(frozen=True, slots=True)
class Machine:
    """What the guest has: device paths as its kernel names them."""

    layers: tuple[str, ...]
    """Of the layers' disks, topmost first."""
    upper: str
    """Of the writable disk; "" for a root of layers that is read-only (two layers at least)."""
    modules: tuple[str, ...] = ()
    """Files in the initramfs, in the order in which they are to be loaded."""
    devices: tuple[tuple[str, str], ...] = ()
    """(driver, device) on the virtio bus, to be bound in this order: in clones (vmm/templates)."""
    interfaces: tuple[str, ...] = ()
    """The kernel's names of the network interfaces, in the order of `Bundle.nics`."""
    sources: Mapping[int, Source] = field(default_factory=dict)
    """Where binds come from, by their position in the configuration's mounts."""
    cgroups: bool = True
    """Whether the guest's kernel has control groups (v2)."""
    poweroff: int = POWER_OFF
    write_back: bool = True
    """Whether the writable disk will be wanted again: the guest then ends by itself."""
    base: str = ""
    """A directory for all of the workload's places; "" for that of a guest of its own."""
    group: str = GROUP
    """The workload's control group, if there are any."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Frames for the monitor, and the names of the steps in them by RUN."""

    frames: bytes
    steps: dict[int, list[str]]
    listing: tuple[str, ...] = ()
    """One line per step, for people."""


@dataclass(frozen=True, slots=True)
class VolumeDisks:
    """Volumes that are disks of the guest: their image files (and whether it may write them), in
    the order of its disks, and what the binds get from them.
    """

    files: tuple[tuple[str, bool], ...]
    sources: Mapping[int, Source]


def volume_disks(bundle: Bundle, device: Callable[[int], str]) -> VolumeDisks:
    """What of `bundle.disks` its binds need; `device` names the guest's N-th volume disk."""
    files: dict[str, bool] = {}
    found: dict[int, tuple[int, str]] = {}
    for position, mount in enumerate(bundle.spec.mounts):
        for base, image in bundle.disks.items():
            if mounts.is_bind(mount) and f"{mount.source}/".startswith(f"{base}/"):
                writable = {"ro", "rro"}.isdisjoint(mount.options)
                files[image] = files.get(image, False) or writable
                found[position] = list(files).index(image), mount.source[len(base) + 1 :]
    modes = list(files.values())
    # One file system has one mode, whichever of its binds asked for what; they have their own.
    sources = {
        position: Disk(device(number), path=inside, readonly=not modes[number])
        for position, (number, inside) in found.items()
    }
    return VolumeDisks(tuple(files.items()), sources)


def start(
    bundle: Bundle,
    machine: Machine,
    *,
    terminal: bool,
    rows: int = 0,
    columns: int = 0,
    filter_: Filter | None = None,
) -> Planned:
    """Everything from the guest's greeting to its end.

    Unsupported for what a guest cannot have: namespaces of others, devices, binds without a source.
    `filter_` saves the compilation of the configuration's system call filter.
    """
    sources = {**engine_files(bundle.spec), **machine.sources}
    spec = guest_spec(bundle.spec, sources, cgroups=machine.cgroups)
    setup = _setup(bundle, spec, machine, sources)
    main = _main(spec, machine, sources, filter_, terminal=terminal)
    program = _sized(main, terminal=terminal, rows=rows, columns=columns)
    mode = Mode.TERMINAL if terminal else Mode.PIPES
    parts = [frames.run(SETUP, setup.data, Mode.SETUP)]
    shares = {one.number: one for one in reversed(sources.values()) if isinstance(one, Share)}
    for number, share in sorted(shares.items()):
        parts.append(frames.fuse_mount(number, f"/shares/{number}", share.options))
    flags = main.clone_flags
    parts.append(frames.run(MAIN, program, mode, clone_flags=flags, rows=rows, columns=columns))
    if machine.write_back and _wanted_again(bundle, sources):
        parts.append(frames.shutdown(machine.poweroff, unmounts(machine, sources)))
    return Planned(
        b"".join(parts),
        {SETUP: setup.steps, MAIN: main.compiled.steps},
        (*setup.listing, *main.compiled.listing),
    )


def _wanted_again(bundle: Bundle, sources: Mapping[int, Source]) -> bool:
    """Whether anything that the guest has written is to be read after its end."""
    lasting = (one for one in sources.values() if isinstance(one, (Share, Disk)))
    return not bundle.rootfs.volatile or any(lasting)


def member(
    bundle: Bundle,
    machine: Machine,
    sources: Mapping[int, Source],
    *,
    context: int,
    terminal: bool,
    rows: int,
    columns: int,
) -> Planned:
    """The main program of a workload in another's guest, beside process `context`; see pods.py."""
    spec = guest_spec(bundle.spec, sources, joined=JOINED, base=machine.base)
    main = _main(spec, machine, sources, None, terminal=terminal)
    program = _sized(main, terminal=terminal, rows=rows, columns=columns)
    mode, flags = Mode.TERMINAL if terminal else Mode.PIPES, main.clone_flags
    data = frames.run(
        MAIN, program, mode, clone_flags=flags, context=context, rows=rows, columns=columns
    )
    return Planned(data, {MAIN: main.compiled.steps}, tuple(main.compiled.listing))


def exec_(
    bundle: Bundle,
    process: Process,
    *,
    terminal: bool,
    rows: int = 0,
    columns: int = 0,
    group: str = GROUP,
    context: int = MAIN,
    filter_: Filter | None = None,
) -> Planned:
    """One more process in the namespaces of process `context`, the main one."""
    spec = guest_spec(bundle.spec, cgroups=bool(group), joined=JOINED)
    template = exec_template(
        spec,
        _confined(process),
        joins=0,
        terminal=terminal,
        filter_=filter_ or _filter(spec),
        oom_score_adj=0,
        group=group,
        available=_ALL_CAPABILITIES,
    )
    _expect_descriptors(template, (*frames.STREAMS, "target"))
    mode = Mode.TERMINAL if terminal else Mode.PIPES
    program = _sized(template, terminal=terminal, rows=rows, columns=columns)
    data = frames.run(MAIN, program, mode, context=context, rows=rows, columns=columns)
    compiled = template.compiled
    return Planned(data, {MAIN: compiled.steps}, tuple(compiled.listing))


def show(bundle: Bundle, machine: Machine) -> Planned:
    """A guest that runs nothing of the workload and shows its files until its input ends."""
    setup = _setup(bundle, bundle.spec, machine, {}, view=True)
    program = Program()
    for number, name in enumerate(frames.STREAMS):
        program.call(f"set {name}", "dup3", Fd(number), number, 0)
    program.call("session", "setsid")
    program.exec("execute the tool", [f"{INITRAMFS}/init"], ["bulkhead-guest", "hold"], [])
    main = program.compile()
    parts = [
        frames.run(SETUP, setup.data, Mode.SETUP),
        frames.run(MAIN, main.data, Mode.PIPES),
        frames.shutdown(machine.poweroff, [VIEW, *unmounts(machine, {})]),
    ]
    steps = {SETUP: setup.steps, MAIN: main.steps}
    return Planned(b"".join(parts), steps, (*setup.listing, *main.listing))


def guest_spec(
    spec: Spec,
    sources: Mapping[int, Source] | None = None,
    *,
    cgroups: bool = True,
    joined: frozenset[str] = frozenset(),
    base: str = "",
) -> Spec:
    """The configuration as it is carried out inside: without what belongs to the host.

    Security labels are dropped (the guest's kernel has no such policy), network settings move to
    the set-up, control groups are v2's. `sources` give the binds' places inside. Of the namespaces
    of others, which are those of the same guest, the kinds `joined` may be shared.
    """
    linux = spec.linux
    apart = {"network", *joined}
    shared = [n.type_ for n in linux.namespaces if n.path and n.type_ not in apart]
    if shared:
        raise Unsupported(
            f"a workload with a kernel of its own cannot share {', '.join(shared)} namespaces"
        )
    if linux.namespace("user") is not None:
        raise Unsupported("a workload with a kernel of its own cannot have a user namespace")
    if linux.namespace("pid") is None or linux.namespace("ipc") is None:
        raise Unsupported("a workload with a kernel of its own cannot share the host's processes")
    devices = [d.path for d in linux.devices if d.path not in _DEVICES]
    if devices:
        raise Unsupported(f"a guest does not have the host's devices: {', '.join(devices)}")
    kept = [n for n in linux.namespaces if n.type_ != "network"]
    if not cgroups:
        kept = [n for n in kept if n.type_ != "cgroup"]
    inside: Linux = _replace(
        linux,
        namespaces=[Namespace(n.type_, n.path) for n in kept],
        sysctl={name: value for name, value in linux.sysctl.items() if not _is_network(name)},
        mount_label="",
        cgroups_path="",
        resources=None,
        rootfs_propagation="",
    )
    process = _confined(spec.process) if spec.process is not None else None
    found: Spec = _replace(
        spec,
        linux=inside,
        process=process,
        mounts=_mounts(spec, sources or {}, cgroups=cgroups, base=base),
    )
    return found


def _is_network(name: str) -> bool:
    return sysctl.normalize(name).startswith("net.")


def _confined(process: Process) -> Process:
    limits = list(process.rlimits)
    if not any(limit.type_ == "RLIMIT_NOFILE" for limit in limits):
        # A kernel's own default is 1024 and 4096; containers inherit the engine's.
        limits.append(Rlimit("RLIMIT_NOFILE", _OPEN_FILES, _OPEN_FILES))
    found: Process = _replace(process, apparmor_profile="", selinux_label="", rlimits=limits)
    return found


def _mounts(spec: Spec, sources: Mapping[int, Source], *, cgroups: bool, base: str) -> list[Mount]:
    """In the positions of `spec`; a guest without control groups has an empty directory there."""
    found: list[Mount] = []
    for position, mount in enumerate(spec.mounts):
        if mounts.is_bind(mount):
            source = sources.get(position)
            place = mount.source if source is None else _place(base, position, source)
            kept = [o for o in mount.options if mounts.parse([o]).propagation == 0]
            mount = _replace(mount, source=place, options=kept)
        elif mount.type_ in ("cgroup", "cgroup2"):
            mount = _replace(mount, type_="cgroup2", source="cgroup")
            if not cgroups:
                options = ["nosuid", "nodev", "noexec", "ro", "mode=755"]
                mount = Mount(mount.destination, "tmpfs", "tmpfs", options)
        found.append(mount)
    return found


def _place(base: str, position: int, source: Source) -> str:
    if isinstance(source, Written):
        return f"{base}/files/{position}"
    if isinstance(source, Inside):
        return source.path
    place = f"{base}/volumes/{position}"
    if isinstance(source, Share):
        place = f"{base}/shares/{source.number}"
    return f"{place}/{source.path}" if source.path else place


def engine_files(spec: Spec) -> dict[int, Source]:
    """The engine's own files among the binds, as they are now."""
    found: dict[int, Source] = {}
    for position, mount in enumerate(spec.mounts):
        if not mounts.is_bind(mount):
            continue
        if os.path.basename(mount.source) == os.path.basename(INIT):
            found[position] = Inside(INIT)
            continue
        if mount.destination not in _ENGINE_FILES:
            continue
        try:
            with open(mount.source, "rb") as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode) or info.st_size > _FILE_MAX:
                    continue
                found[position] = Written(file.read(_FILE_MAX), stat.S_IMODE(info.st_mode))
        except OSError as error:
            raise Invalid(f"bind source {mount.source}: {error.strerror}") from None
    return found


def _filter(spec: Spec) -> Filter | None:
    if spec.linux.seccomp is None:
        return None
    compiled = _filters.get(spec.linux.seccomp)
    return Filter(compiled.program, compiled.flags)


# --- the main program ----------------------------------------------------------------------------


def _main(
    spec: Spec,
    machine: Machine,
    sources: Mapping[int, Source],
    filter_: Filter | None,
    *,
    terminal: bool,
) -> Template:
    if not machine.layers:
        raise Invalid("a guest needs at least one layer")
    for position, mount in enumerate(spec.mounts):
        if mounts.is_bind(mount) and position not in sources:
            raise Unsupported(
                f"mount {mount.destination}: this boundary cannot bind {mount.source} of the host"
            )
    base = machine.base
    lowers = tuple(f"{base}/layers/{number}" for number in range(len(machine.layers)))
    rootfs = Rootfs(lowers)
    if machine.upper:
        rootfs = Rootfs(lowers, f"{base}/upper/upper", f"{base}/upper/work")
    ground = Ground(
        appends_layers=False,
        cgroup_version=2,
        directories=tuple(
            position not in sources or sources[position].directory
            for position in range(len(spec.mounts))
        ),
        available=_ALL_CAPABILITIES,
        group=machine.group if machine.cgroups else "",
    )
    template = plan_launch(spec, rootfs, ground, filter_ or _filter(spec), terminal=terminal)
    joined = tuple(key for key in template.fds if key in _JOINING)
    _expect_descriptors(template, (*frames.STREAMS, *joined))
    return template


def _expect_descriptors(template: Template, wanted: tuple[str, ...]) -> None:
    if template.fds != wanted:
        raise Unsupported(f"a guest's program cannot have descriptors {template.fds}")


def _sized(template: Template, *, terminal: bool, rows: int, columns: int) -> bytes:
    if terminal and "window" in template.compiled.holes():
        return template.compiled.filled({"window": window_size(rows, columns)})
    return template.compiled.data


def unmounts(machine: Machine, sources: Mapping[int, Source]) -> list[str]:
    """What is to be unmounted before the disks are whole, in that order."""
    base = machine.base
    disks = [f"{base}/volumes/{n}" for n, source in sources.items() if isinstance(source, Disk)]
    return [*disks, f"{base}/upper"] if machine.upper else disks


# --- set-up --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Compiled:
    data: bytes
    steps: list[str]
    listing: list[str]


def _setup(
    bundle: Bundle,
    spec: Spec,
    machine: Machine,
    sources: Mapping[int, Source],
    *,
    view: bool = False,
) -> _Compiled:
    program = Program()
    program.call("clear the umask", "umask", 0)
    plan_modules(program, machine.modules)
    for driver, device in machine.devices:
        path = f"/sys/bus/virtio/drivers/{driver}/bind"
        program.write(f"use {device} as {driver}", AT_FDCWD, path, device)
    plan_disks(program, machine, sources)
    if machine.cgroups:
        plan_group(program, bundle.spec, machine.group)
    plan_files(program, sources, machine.base)
    _plan_network(program, bundle, machine)
    if spec.hostname and spec.linux.namespace("uts") is None:
        name = spec.hostname.encode()
        program.call("set the host name", "sethostname", name, len(name))
    if view:
        _plan_view(program, machine)
    compiled = program.compile()
    return _Compiled(compiled.data, compiled.steps, compiled.listing)


def plan_modules(program: Program, modules: Sequence[str]) -> None:
    """Load these files of the initramfs, in their order."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    for path in modules:
        fd = program.call(f"open module {path}", "openat", AT_FDCWD, INITRAMFS + path, flags, 0)
        program.call(f"load module {path}", "finit_module", fd, "", 0, ok=(errno.EEXIST,))
        program.call("close", "close", fd)


def _plan_view(program: Program, machine: Machine) -> None:
    lowers = ":".join(f"/layers/{number}" for number in range(len(machine.layers)))
    options = f"lowerdir={lowers},upperdir=/upper/upper,workdir=/upper/work"
    options += "".join(f",{name}={value}" for name, value in OVERLAY_OPTIONS)
    _directory(program, VIEW)
    program.call("mount the root", "mount", "overlay", VIEW, "overlay", 0, options)


def _directory(program: Program, path: str, mode: int = 0o755) -> None:
    step = f"make {path}"
    program.call(step, "mkdirat", AT_FDCWD, path, mode, ok=(errno.EEXIST,))


def _mount(program: Program, device: str, path: str, fstype: str, flags: int) -> None:
    _directory(program, path)
    options = _LAZY if fstype == "ext4" else None
    step = f"mount {fstype} {device} on {path}"
    program.call(step, "mount", device, path, fstype, flags, options)


def plan_disks(program: Program, machine: Machine, sources: Mapping[int, Source]) -> None:
    """Mount layers, writable disk and volumes; make the places of what comes otherwise."""
    base = machine.base
    _directory(program, f"{base}/layers")
    for number, device in enumerate(machine.layers):
        _mount(program, device, f"{base}/layers/{number}", "erofs", MS_RDONLY)
    if machine.upper:
        _mount(program, machine.upper, f"{base}/upper", "ext4", MS_NOATIME)
        _directory(program, f"{base}/upper/upper")
        _directory(program, f"{base}/upper/work", 0o700)
    for folder in ("files", "shares", "volumes"):
        _directory(program, f"{base}/{folder}")
    for position, source in sorted(sources.items()):
        if isinstance(source, Disk):
            flags = MS_NODEV | MS_NOSUID | (MS_RDONLY if source.readonly else 0)
            place = f"{base}/volumes/{position}"
            _mount(program, source.device, place, source.fstype, flags)
        elif isinstance(source, Share):
            _directory(program, f"{base}/shares/{source.number}")


def plan_files(program: Program, sources: Mapping[int, Source], base: str = "") -> None:
    """Write the small files among `sources`, or write them anew."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    for position, source in sorted(sources.items()):
        if isinstance(source, Written):
            step = f"write file {position}"
            path = f"{base}/files/{position}"
            fd = program.call(step, "openat", AT_FDCWD, path, flags, source.mode)
            if source.content:
                program.call(step, "write", fd, source.content, len(source.content))
            program.call(step, "close", fd)


def plan_group(program: Program, spec: Spec, group: str) -> None:
    """The workload's control group: its number of tasks; memory and CPU are the machine's size."""
    base = "/sys/fs/cgroup"
    mounted = (errno.EBUSY,)
    program.call("mount cgroups", "mount", "cgroup2", base, "cgroup2", 0, None, ok=mounted)
    none = (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP)
    for controller in ("memory", "pids", "cpu", "io", "cpuset"):
        step = f"pass on controller {controller}"
        program.write(step, AT_FDCWD, f"{base}/cgroup.subtree_control", f"+{controller}", ok=none)
    _directory(program, group)
    resources = spec.linux.resources
    limit = resources.pids.limit if resources is not None and resources.pids is not None else 0
    if limit > 0:
        program.write("limit the number of tasks", AT_FDCWD, f"{group}/pids.max", str(limit))


def _plan_network(program: Program, bundle: Bundle, machine: Machine) -> None:
    wiring.plan_loopback(program)
    if len(machine.interfaces) < len(bundle.nics):
        raise Invalid("a guest needs a kernel's name for each of its network interfaces")
    for nic, kernel_name in zip(bundle.nics, machine.interfaces, strict=False):
        wiring.plan_interface(program, nic, kernel_name)
    for name, value in bundle.spec.linux.sysctl.items():
        if _is_network(name):
            path = f"/proc/{sysctl.path(name)}"
            program.write(f"set {sysctl.normalize(name)}", AT_FDCWD, path, value)
