"""A container's launch program, made from its configuration: pure, readable without root.

The order is forced by the kernel: join control groups before the cgroup namespace is made; cut
mount propagation before mounting; everything that names the host's files before the pivot; give up
power last.
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field

from bulkhead.boundaries import container_process as common
from bulkhead.boundaries.container_process import FdTable, Filter
from bulkhead.boundary.seam import Rootfs
from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation import (
    binfmt,
    credentials,
    idmap,
    mounts,
    namespaces,
    nodes,
    sysctl,
    tty,
)
from bulkhead.isolation import (
    rootfs as root_plan,
)
from bulkhead.isolation.masks import Masks
from bulkhead.linux import mounts as kernel
from bulkhead.linux import prctl
from bulkhead.linux.program import Argument, Compiled, Len, Program, Slot
from bulkhead.linux.tree import Tree
from bulkhead.oci.runtime import Linux, Mount, Namespace, Process, Spec

_TTY_GID = 5


@dataclass(frozen=True, slots=True)
class Ground:
    """What of the host a program depends on."""

    appends_layers: bool = True
    cgroup_version: int = 2
    joins: int = 0
    """Control group files the child writes itself into (v1)."""
    views: tuple[str, ...] = ()
    """Names of the v1 hierarchies to show."""
    oom_score_adj: int = 0
    """What the child inherits."""
    directories: tuple[bool, ...] = ()
    """For each mount of the configuration: whether a bind's source is a directory."""
    prepared: frozenset[str] = frozenset()
    """Detached mounts that come along as descriptors: "root", "mount3"; and those that are in one
    of them already: "inside4"."""
    available: frozenset[str] | None = None
    """Capabilities the launcher can give; None: ask the kernel about this process."""
    kept: int = 0
    """Descriptors the process is to have besides its standard streams."""
    keep_numbers: bool = False
    listener: bool = False
    keyring: bool = True
    pivot: bool = True
    """See seam.Bundle."""
    group: str = ""
    """The directory of a control group (v2) to join by its path: in a guest."""
    gates: frozenset[str] = frozenset()
    """Where the child says so and waits for a byte on the descriptor of that name: "hooks", with
    everything mounted and the host's files still in reach; "start", before it gives up power."""


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled program with holes, and the descriptors it takes by name."""

    compiled: Compiled
    fds: tuple[str, ...]
    clone_flags: int
    holes: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Made:
    """Slots that later steps need."""

    proc: Slot | None = None
    dev: Slot | None = None
    devpts: Slot | None = None
    readonly: list[tuple[str, Slot]] = field(default_factory=list)


def plan_launch(
    spec: Spec,
    rootfs: Rootfs,
    ground: Ground,
    filter_: Filter | None = None,
    *,
    terminal: bool = False,
    hole_values: Mapping[str, str] | None = None,
) -> Template:
    """The program that turns a fresh child into the container's first process.

    `hole_values` are the defaults of holes that are not in `spec` (control group paths).
    """
    return _Planner(spec, rootfs, ground, filter_, terminal, hole_values or {}).plan()


class _Planner:
    def __init__(
        self,
        spec: Spec,
        rootfs: Rootfs,
        ground: Ground,
        filter_: Filter | None,
        terminal: bool,
        values: Mapping[str, str],
    ) -> None:
        if spec.process is None:
            raise Invalid("config.json has no process: nothing to run")
        self.spec = spec
        self.linux: Linux = spec.linux
        self.process: Process = spec.process
        self.rootfs = rootfs
        self.ground = ground
        self.filter = filter_
        self.terminal = terminal
        self.values = values
        self.program = Program()
        self.fds = FdTable()
        self.made = _Made()
        self.userns = self.linux.namespace("user") is not None
        _refuse(spec, hooks="hooks" in ground.gates, listener=ground.listener)

    def plan(self) -> Template:
        program = self.program
        flags = namespaces.clone_flags(self.linux)
        # First of all: until 0, 1 and 2 are taken, an open would get one of these numbers.
        common.plan_streams(program, self.fds)
        program.call("clear the umask", "umask", 0)
        proc = common.plan_host_proc(program) if self._needs_host_proc() else None
        if proc is not None:
            common.plan_oom_score(
                program, self.process.oom_score_adj, self.ground.oom_score_adj, proc
            )
        self._join(proc)
        slave = self._slave()
        root_plan.plan_private(program, slave=slave)
        tree = Tree(program, self._root())
        for position, mount in enumerate(self.spec.mounts):
            self._mount(tree, position, mount, slave=slave)
        self._nodes(tree)
        slave_end = self._terminal() if self.terminal else None
        self._settings()
        Masks(tree).plan(self.linux.masked_paths, self.linux.readonly_paths)
        for destination, mount_slot in self.made.readonly:
            mounts.plan_attributes(
                program, f"make {destination} read-only", mount_slot, set_=kernel.ATTR_RDONLY
            )
        self._names()
        self._gate("hooks")
        self._pivot(tree)
        credentials.plan_session(program, keyring=self.ground.keyring)
        if slave_end is not None:
            tty.plan_control(program, slave_end)
        if self.linux.personality is not None:
            credentials.plan_personality(program, self.linux.personality)
        if self.linux.memory_policy is not None:
            credentials.plan_memory_policy(program, self.linux.memory_policy)
        common.plan_directory(tree, self.process.cwd, create=True)
        common.plan_label(program, proc, self.process)
        listener = common.plan_listener(program, self.fds) if self.ground.listener else None
        self._gate("start")
        common.plan_identity(
            program,
            self.process,
            self.filter,
            available=self.ground.available,
            keep=[self.fds.fd(f"kept{number}") for number in range(self.ground.kept)],
            keep_numbers=self.ground.keep_numbers,
            listener=listener,
        )
        common.plan_exec(program, self.process, common.candidates(self.process))
        compiled = program.compile()
        return Template(compiled, tuple(self.fds.keys), flags, compiled.holes())

    def _gate(self, name: str) -> None:
        if name not in self.ground.gates:
            return
        fd = self.fds.fd(name)
        if name == "start":  # from here on it outlives who launched it
            self.program.call("stay", "prctl", prctl.SET_PDEATHSIG, 0, 0, 0, 0)
        self.program.send_fd(f"report before {name}", name, fd)
        self.program.gate(f"wait for {name}", fd)

    def _needs_host_proc(self) -> bool:
        wanted = self.process.oom_score_adj
        inherited = self.ground.oom_score_adj
        scored = wanted is not None and wanted != inherited
        return scored or common.has_label(self.process) or bool(self._foreign_sysctls())

    def _foreign_sysctls(self) -> dict[str, str]:
        """Settings of a network namespace that the user namespace does not own."""
        network = self.linux.namespace("network")
        if not self.userns or network is None or not network.path:
            return {}
        settings = self.linux.sysctl.items()
        return {name: value for name, value in settings if name.startswith(("net.", "net/"))}

    def _join(self, proc: Slot | None) -> None:
        """Control groups, then the namespaces of others, then those that come late."""
        program = self.program
        for position in range(self.ground.joins):
            fd = self.fds.fd(f"join{position}")
            program.call("join the control group", "write", fd, b"0", 1)
        common.plan_group(program, self.ground.group)
        paths = namespaces.paths(self.linux)
        namespaces.plan_join(program, {kind: self.fds.fd(f"ns-{kind}") for kind in paths})
        pid = self.linux.namespace("pid")
        if pid is None or pid.path or self.ground.gates:
            # Others in its PID namespace must not look into it while it holds the host's files.
            program.call("become undumpable", "prctl", prctl.SET_DUMPABLE, 0, 0, 0, 0)
        foreign = self._foreign_sysctls()
        if foreign and proc is not None:
            sysctl.plan(program, foreign, proc)
        if self.userns:
            namespaces.plan_user(program, self.fds.fd("userns"), self.linux)
        if pid is not None and pid.path:
            program.fork("enter the pid namespace")
        if not self.userns and _is_new(self.linux.namespace("cgroup")):
            namespaces.plan_cgroup(program)
        if _is_new(self.linux.namespace("time")):
            namespaces.plan_time(program, self.linux.time_offsets)

    def _slave(self) -> bool:
        """Whether a bind wants to see what is mounted on the host later."""
        if self.linux.rootfs_propagation in ("shared", "slave"):
            return True
        wanted = (kernel.MS_SHARED, kernel.MS_SLAVE)
        return any(mounts.parse(m.options).propagation in wanted for m in self.spec.mounts)

    def _root(self) -> Argument:
        program, rootfs = self.program, self.rootfs
        if "root" in self.ground.prepared:
            fd = self.fds.fd("root")
            root_plan.plan_cover(program, fd)
            return fd
        if rootfs.directory is not None:
            return root_plan.plan_directory(program, program.hole("directory", rootfs.directory))
        lowers: list[Argument] = [
            program.hole(f"lower{position}", path) for position, path in enumerate(rootfs.lowers)
        ]
        if not lowers:
            raise Invalid("the root file system has neither a directory nor layers")
        upper = work = None
        if rootfs.upper is not None:
            upper = program.hole("upper", rootfs.upper)
            work = program.hole("work", rootfs.work or "")
        return root_plan.plan_overlay(
            program,
            lowers,
            upper,
            work,
            appends=self.ground.appends_layers,
        )

    # --- mounts ----------------------------------------------------------------------------

    def _mount(self, tree: Tree, position: int, mount: Mount, *, slave: bool) -> None:
        if f"inside{position}" in self.ground.prepared:
            return
        mount = _clean(mount)
        if mounts.is_bind(mount):
            self._bind(tree, position, mount, slave=slave)
        elif f"mount{position}" in self.ground.prepared:
            made = self.fds.fd(f"mount{position}")
            tree.attach(
                f"mount {mount.type_} on {mount.destination}",
                made,
                mount.destination,
                directory=True,
            )
            tree.made(mount.destination, made)
        elif mount.type_ in ("cgroup", "cgroup2"):
            self._cgroup(tree, mount)
        elif mount.type_ == binfmt.TYPE:
            options, texts = binfmt.split(mount.options)
            place = mounts.plan_new(tree, Mount(mount.destination, "", mount.type_, options))
            binfmt.plan_register(self.program, place, texts)
        else:
            self._new(tree, mount)

    def _bind(self, tree: Tree, position: int, mount: Mount, *, slave: bool) -> None:
        key = f"mount{position}"
        source: Argument = (
            self.fds.fd(key)
            if key in self.ground.prepared
            else self.program.hole(key, mount.source)
        )
        directory = self.ground.directories[position] if self.ground.directories else True
        mounts.plan_bind(tree, mount, source, directory=directory, slave_start=slave)

    def _cgroup(self, tree: Tree, mount: Mount) -> None:
        if self.ground.cgroup_version == 2:
            mounts.plan_cgroup_v2(tree, mount)
            return
        views: list[tuple[str, Argument]] = [
            (name, self.program.hole(f"view-{name}", self.values.get(f"view-{name}", "")))
            for name in self.ground.views
        ]
        mounts.plan_cgroup_v1(tree, mount, views)

    def _new(self, tree: Tree, mount: Mount) -> None:
        options = mounts.parse(mount.options)
        attributes = options.attributes | options.recursive_attributes
        late = mount.type_ == "tmpfs" and bool(attributes & kernel.ATTR_RDONLY)
        if late:
            attributes &= ~kernel.ATTR_RDONLY
        if self.userns and mount.type_ in ("devpts", "tmpfs"):
            mount = self._mapped_only(mount)
        made = mounts.plan_new(tree, mount, attributes=attributes)
        if late:
            self.made.readonly.append((mount.destination, made))
        if mount.type_ == "proc" and mount.destination == "/proc":
            self.made.proc = made
        elif mount.type_ == "devpts" and mount.destination == "/dev/pts":
            self.made.devpts = made
        elif mount.type_ == "tmpfs" and mount.destination == "/dev":
            self.made.dev = made
            skip = [d.path[5:] for d in self.linux.devices if d.path.startswith("/dev/")]
            nodes.plan_default(self.program, made, bind=self.userns, skip=skip)

    def _mapped_only(self, mount: Mount) -> Mount:
        """Without gid= for a group that the user namespace does not have (gid 5, tty)."""
        gids = self.linux.gid_mappings
        kept = [
            option
            for option in mount.options
            if not option.startswith("gid=") or idmap.is_mapped(gids, int(option[4:]))
        ]
        return Mount(mount.destination, mount.source, mount.type_, kept)

    def _nodes(self, tree: Tree) -> None:
        for device in self.linux.devices:
            nodes.plan_device(tree, device, bind=self.userns)

    # --- the rest --------------------------------------------------------------------------

    def _terminal(self) -> Slot:
        """A terminal's slave, which replaces the standard streams after setsid."""
        dev, devpts = self.made.dev, self.made.devpts
        if dev is None or devpts is None:
            raise Unsupported(
                "a terminal needs a tmpfs at /dev and a devpts at /dev/pts in the configuration"
            )
        master = tty.plan_open(self.program, devpts)
        size = common.window(self.program, 0, 0)
        slave = tty.plan_use(self.program, master, uid=self.process.user.uid, size=size)
        tty.plan_console(self.program, dev, devpts)
        return slave

    def _settings(self) -> None:
        settings = self.linux.sysctl
        if not settings:
            return
        own: set[str] = {n.type_ for n in self.linux.namespaces}
        sysctl.check(settings, own)
        foreign = self._foreign_sysctls()
        settings = {name: value for name, value in settings.items() if name not in foreign}
        if self.made.proc is None:
            raise Unsupported("linux.sysctl needs a proc file system at /proc")
        sysctl.plan(self.program, settings, self.made.proc)

    def _names(self) -> None:
        if self.spec.hostname:
            name = self.program.hole("hostname", self.spec.hostname)
            namespaces.plan_hostname(self.program, name, Len(name))
        if self.spec.domainname:
            namespaces.plan_domainname(self.program, self.spec.domainname)

    def _pivot(self, tree: Tree) -> None:
        root = self.spec.root
        wanted = self.linux.rootfs_propagation
        propagation = {
            "private": kernel.MS_PRIVATE,
            "shared": kernel.MS_SHARED,
            "slave": kernel.MS_SLAVE,
            "unbindable": kernel.MS_UNBINDABLE,
        }.get(wanted, 0)
        root_plan.plan_pivot(
            self.program,
            tree.root,
            readonly=root is not None and root.readonly,
            propagation=propagation,
            pivot=self.ground.pivot,
        )


def _is_new(namespace: Namespace | None) -> bool:
    return namespace is not None and not namespace.path


def _clean(mount: Mount) -> Mount:
    """The destination without "..", "." and doubled slashes (lexically: it is the host's word)."""
    clean = "/" + posixpath.normpath(mount.destination).lstrip("/")
    if clean == mount.destination:
        return mount
    return Mount(
        clean, mount.source, mount.type_, mount.options, mount.uid_mappings, mount.gid_mappings
    )


def _refuse(spec: Spec, *, hooks: bool, listener: bool) -> None:
    """What this boundary does not do is refused, never left out."""
    linux = spec.linux
    for name, present in (
        ("hooks", spec.hooks is not None and not hooks),
        ("linux.netDevices", bool(linux.net_devices)),
        ("linux.intelRdt", linux.intel_rdt is not None),
        ("linux.mountLabel", bool(linux.mount_label)),
        (
            "linux.seccomp.listenerPath",
            bool(linux.seccomp and linux.seccomp.listener_path) and not listener,
        ),
    ):
        if present:
            raise Unsupported(f"config.json: {name} is not supported by the container boundary")
