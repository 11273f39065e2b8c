"""The container boundary: the host's own kernel, divided by namespaces, control groups and filters.

Also Pausable, Updatable and Measured. Nothing runs beside a container's own processes: this makes
launch programs and reads the kernel.
"""

import contextlib
import copy
import os
import stat
from collections.abc import Callable, Sequence
from signal import SIGKILL
from typing import Any, TypeVar

from bulkhead.boundaries import (
    container_copyup,
    container_extras,
    container_held,
    container_idmap,
)
from bulkhead.boundaries.container_exec import exec_template
from bulkhead.boundaries.container_extras import NONE, Extras
from bulkhead.boundaries.container_plan import Ground, plan_launch
from bulkhead.boundaries.container_process import candidates
from bulkhead.boundaries.container_stock import Reserved, Stock
from bulkhead.boundaries.container_template import Templates
from bulkhead.boundary.registry import Services
from bulkhead.boundary.seam import (
    Bundle,
    InstanceState,
    Launched,
    Launcher,
    LaunchRequest,
    Missing,
    Report,
    Rootfs,
    Stdio,
)
from bulkhead.errors import Conflict, Denied, Invalid, LaunchFailed, NotFound, Unsupported
from bulkhead.isolation import idmap, mounts, namespaces
from bulkhead.isolation import rootfs as root_plan
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.isolation.cgroups.group import TIMEOUT_S, Group
from bulkhead.linux import mounts as kernel_mounts
from bulkhead.linux import namespaces as kernel_namespaces
from bulkhead.linux import overlayfs, pidfd, procfs
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.terminals import window_size
from bulkhead.oci.runtime import Mount, Process, Resources, Spec, validate_process

T = TypeVar("T")
_OPTIONAL = frozenset({"pausable", "updatable", "measured"})


class ContainerBoundary:
    """Makes containers; `services.launcher` runs their programs."""

    name = "container"

    def __init__(self, services: Services) -> None:
        self.home = services.home
        self.launcher = services.launcher
        self.templates = Templates(services.home.in_root("seccomp"))
        self.stocked = Stock()
        self.null = OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        self._inherited: int | None = None

    def over(self, launcher: Launcher) -> "ContainerBoundary":
        """The same with another launcher: programs, filters and stock are shared."""
        other = copy.copy(self)
        other.launcher, other._inherited = launcher, None
        return other

    def probe(self) -> Report:
        """What this host can do, found out by trying."""
        missing: list[Missing] = []
        facts = {"kernel": os.uname().release}
        try:
            appends = overlayfs.appends_layers()
            facts["overlay"] = "layer by layer" if appends else "by option string"
        except OSError as error:
            missing.append(
                Missing(f"overlay file system: {error}", "modprobe overlay; run as root")
            )
        try:
            facts["cgroups"] = f"v{cgroups.detect().version}"
        except Unsupported as error:
            missing.append(Missing(str(error), "mount -t cgroup2 cgroup2 /sys/fs/cgroup"))
        for kind in kernel_namespaces.FLAGS.keys() - kernel_namespaces.supported():
            missing.append(Missing(f"{kind} namespaces", _remedy(kind)))
        return Report(self.name, not missing, tuple(missing), _OPTIONAL, facts)

    def inherited_oom_score(self) -> int:
        """The oom_score_adj with which the launcher's children are born."""
        if self._inherited is None:
            pid = getattr(self.launcher, "pid", 0)
            self._inherited = procfs.oom_score_adj(pid or "self")
        return self._inherited

    async def create(self, bundle: Bundle) -> "Container":
        """Make the control group of a workload, or take it from stock; nothing runs yet.

        Unsupported for a kind of namespace that this kernel lacks.
        """
        for namespace in bundle.spec.linux.namespaces:
            if namespace.type_ not in kernel_namespaces.supported():
                raise Unsupported(
                    f"this kernel has no {namespace.type_} namespaces: {_remedy(namespace.type_)}"
                )
        ready = self.stocked.take(bundle.id, _group_path(bundle), bundle.spec.linux.resources)
        if ready is None:
            return Container(self, bundle, _make_group(bundle))
        return Container(self, bundle, ready.group, ready)

    def stock(
        self, identity: str, cgroup_path: str, resources: Resources, rootfs: Rootfs | None
    ) -> None:
        """Make the control group and the root of a workload to come (seam: Stocking)."""
        self.stocked.add(identity, cgroup_path, resources)
        if rootfs is not None and rootfs.directory is None and overlayfs.appends_layers():
            self.stocked.add_root(identity, rootfs, _mount_overlay(rootfs))

    def unstock(self, identity: str) -> None:
        """Undo `stock`."""
        self.stocked.discard(identity)

    async def load(self, bundle: Bundle, pid: int) -> "Container":
        """A workload of an earlier engine. `pid` counts only if it is in the workload's group."""
        group = cgroups.detect().open(_group_path(bundle))
        container = Container(self, bundle, group)
        if pid and pid in group.pids():
            with contextlib.suppress(ProcessLookupError):
                container.adopt(pid)
        return container

    def plan(self, bundle: Bundle, *, terminal: bool = False) -> list[str]:
        """Every step of a launch of `bundle`, for people; acquires nothing."""
        spec = bundle.spec
        ground = self.ground(spec, joins=0, directories=source_kinds(spec))
        filter_ = self.templates.filter(spec)
        template = plan_launch(spec, bundle.rootfs, ground, filter_, terminal=terminal)
        born = [
            f"new {kind} namespace"
            for kind, flag in kernel_namespaces.FLAGS.items()
            if template.clone_flags & flag
        ]
        return born + template.compiled.listing

    def ground(
        self,
        spec: Spec,
        *,
        joins: int,
        directories: tuple[bool, ...],
        views: tuple[str, ...] = (),
        prepared: frozenset[str] = frozenset(),
        bundle: Bundle | None = None,
    ) -> Ground:
        """What of this host a program depends on."""
        hierarchy = cgroups.detect()
        return Ground(
            appends_layers=overlayfs.appends_layers(),
            cgroup_version=hierarchy.version,
            joins=joins,
            views=views,
            oom_score_adj=self.inherited_oom_score(),
            directories=directories,
            prepared=prepared,
            **({} if bundle is None else container_extras.ground(bundle)),
        )


def _remedy(kind: str) -> str:
    option = {"network": "CONFIG_NET_NS", "cgroup": "CONFIG_CGROUPS", "mount": "CONFIG_NAMESPACES"}
    return f"use one built with {option.get(kind, f'CONFIG_{kind.upper()}_NS')}"


def _group_path(bundle: Bundle) -> str:
    return bundle.spec.linux.cgroups_path or f"/bulkhead/{bundle.id}"


def _make_group(bundle: Bundle) -> Group:
    return cgroups.detect().create(_group_path(bundle), bundle.spec.linux.resources)


def source_kinds(spec: Spec) -> tuple[bool, ...]:
    """For each mount whether its source is a directory; Invalid if a bind's source is missing."""
    kinds: list[bool] = []
    for mount in spec.mounts:
        if not mounts.is_bind(mount):
            kinds.append(True)
            continue
        try:
            kinds.append(stat.S_ISDIR(os.stat(mount.source).st_mode))
        except FileNotFoundError:
            raise Invalid(
                f'invalid mount config for type "bind": bind source path does not exist: '
                f"{mount.source}"
            ) from None
        except OSError as error:
            raise Invalid(f"bind source {mount.source}: {error.strerror}") from None
    return tuple(kinds)


class Container:
    """One container: a control group, and once started a first process."""

    def __init__(
        self,
        boundary: ContainerBoundary,
        bundle: Bundle,
        group: Group,
        ready: Reserved | None = None,
    ) -> None:
        self._ready = ready
        self._held: list[OwnedFd] = []
        self.boundary = boundary
        self.bundle = bundle
        self.group = group
        self._pid = 0
        self._started = 0
        self._pidfd: OwnedFd | None = None

    def adopt(self, pid: int) -> None:
        """Take `pid` as the first process; ProcessLookupError if it has ended."""
        self._pidfd = pidfd.open_process(pid)
        self._pid = pid
        self._started = procfs.start_time(pid)

    async def start(self, stdio: Stdio) -> Launched:
        """Run the configured process; LaunchFailed and its kinds name the step that failed."""
        if self._running():
            raise Conflict(f"container {self.bundle.id} is already running")
        if self._held:
            await _in_thread(lambda: container_held.let_go(self._held))
        with contextlib.ExitStack() as undo:
            prepared = container_copyup.prepare(self.bundle, undo)
            prepared |= await self._prepare_mapped(undo)
            prepared |= await container_idmap.prepare(self.boundary.launcher, self.bundle, undo)
            root = prepared.pop("root", None)
            if "userns" not in prepared:
                root = self._ready_root()
                root = self._make_root() if root is None else root
            unmount = undo.enter_context(contextlib.ExitStack())
            if root is not None:
                unmount.callback(root.close)
                prepared["root"] = root
            request = self._launch_request(stdio, undo, prepared)
            launched = await self.boundary.launcher.launch(request)
            unmount.pop_all()
        self._held = container_held.hold(self.bundle, root, launched)
        self._pid = launched.pid
        self._started = 0
        self._pidfd = launched.pidfd
        return launched

    async def _prepare_mapped(self, undo: contextlib.ExitStack) -> dict[str, OwnedFd]:
        """For a container with a user namespace: that, the root, the sysfs, mapped binds.

        The root is the caller's to close, the others are closed by `undo`.
        """
        spec, bundle = self.bundle.spec, self.bundle
        user = spec.linux.namespace("user")
        made: dict[str, OwnedFd] = {}
        if user is None:
            return made
        if user.path:
            made["userns"] = kernel_namespaces.open_namespace(user.path)
        else:
            made["userns"] = await container_idmap.make_user_namespace(
                self.boundary.launcher,
                bundle.id,
                spec.linux.uid_mappings,
                spec.linux.gid_mappings,
            )
        undo.callback(made["userns"].close)
        for position, mount in enumerate(spec.mounts):
            fd = await _in_thread(_prepare_mount, spec, mount, made["userns"])
            if fd is not None:
                made[f"mount{position}"] = fd
                undo.callback(fd.close)
        if self._ready is not None:
            await _in_thread(self._ready.drop_root)
        made["root"] = await _in_thread(_mapped_root, bundle, made["userns"])
        return made

    def _ready_root(self) -> OwnedFd | None:
        """The root from stock, if it is what this container needs."""
        ready = self._ready
        if ready is None or ready.root is None or ready.rootfs != self.bundle.rootfs:
            return None
        root, ready.root = ready.root, None
        return root

    def _make_root(self) -> OwnedFd | None:
        """The root overlay, mounted nowhere yet; None where the child must mount it itself.

        This process keeps the descriptor until `delete`: when the container's last process ends,
        its exit is then not held up by the overlay's unmount, which writes the upper layer back.
        """
        rootfs = self.bundle.rootfs
        if rootfs.directory is not None or not overlayfs.appends_layers():
            return None
        return _mount_overlay(rootfs)

    def _launch_request(
        self, stdio: Stdio, undo: contextlib.ExitStack, prepared: dict[str, OwnedFd]
    ) -> LaunchRequest:
        boundary, bundle, spec = self.boundary, self.bundle, self.bundle.spec
        kinds = source_kinds(spec)
        joins, views = self._membership(undo, prepared)
        ground = boundary.ground(
            spec,
            joins=len(joins),
            directories=kinds,
            views=tuple(sorted(views)),
            prepared=frozenset(prepared),
            bundle=bundle,
        )
        template = boundary.templates.launch(spec, bundle.rootfs, ground, terminal=stdio.terminal)
        data = template.fill(spec, bundle.rootfs, views, stdio)
        given: dict[str, int] = {f"join{i}": int(fd) for i, fd in enumerate(joins)}
        given |= self._streams(stdio)
        given |= {key: int(fd) for key, fd in prepared.items()}
        given |= container_extras.given(bundle.fds, bundle.listener) | dict(bundle.gates)
        for kind, path in namespaces.paths(spec.linux).items():
            given[f"ns-{kind}"] = container_extras.open_namespace(kind, path, undo)
        cgroup_fd = self._clone_fd(undo)
        return LaunchRequest(
            id=bundle.id,
            program=data,
            clone_flags=template.template.clone_flags,
            fds=[given[key] for key in template.template.fds],
            steps=template.template.compiled.steps,
            record=f"{bundle.directory}/exit.json",
            keep=stdio.keep,
            meta=stdio.meta,
            cgroup_fd=cgroup_fd,
        )

    def _membership(
        self, undo: contextlib.ExitStack, prepared: dict[str, OwnedFd]
    ) -> tuple[list[OwnedFd], dict[str, str]]:
        """Descriptors to join the group by, and the directories that the child is to show.

        A tree from stock that shows them joins `prepared` instead.
        """
        ready, self._ready = self._ready, None
        if ready is None:
            joins = self.group.join_fds()
            for fd in joins:
                undo.callback(fd.close)
            return joins, self._views()
        undo.callback(ready.close)
        joins = list(ready.joins)
        offered = {} if "userns" in prepared else ready.offer(self.bundle.spec)
        prepared.update(offered)
        return joins, {} if ready.view in offered.values() else self._views()

    def _views(self) -> dict[str, str]:
        """The group's directory in every v1 hierarchy, by the hierarchy's name."""
        if cgroups.detect().version == 2:
            return {}
        path = self.group.path
        return {
            folder.removesuffix(path).rpartition("/")[2]: folder for folder in self.group.folders()
        }

    def _clone_fd(self, undo: contextlib.ExitStack) -> int:
        fd = self.group.clone_fd()
        if fd is None:
            return -1
        undo.callback(fd.close)
        return int(fd)

    def _streams(self, stdio: Stdio) -> dict[str, int]:
        null = int(self.boundary.null)
        given = {"stdin": stdio.stdin, "stdout": stdio.stdout, "stderr": stdio.stderr}
        if stdio.terminal:
            return dict.fromkeys(given, null)
        return {key: fd if fd >= 0 else null for key, fd in given.items()}

    def state(self) -> InstanceState:
        """What the kernel says now."""
        if not self._running():
            return InstanceState(self.bundle.id, "stopped" if self._pid else "created")
        return InstanceState(
            self.bundle.id, "paused" if self.group.frozen() else "running", self._pid
        )

    def _running(self) -> bool:
        if not self._pid:
            return False
        if self._pidfd is not None:
            return not pidfd.ended(self._pidfd)
        try:
            return self._started in (0, procfs.start_time(self._pid)) and procfs.state(
                self._pid
            ) not in ("Z", "X")
        except ProcessLookupError:
            return False

    async def kill(self, signal: int, *, everyone: bool = False) -> None:
        """Signal the first process, or every process of the container."""
        if everyone:
            if signal == SIGKILL:
                await _in_thread(self.group.kill)
            else:
                self.group.signal(signal)
            return
        if not self._running():
            raise NotFound(f"container {self.bundle.id} is not running")
        try:
            await self.boundary.launcher.signal(self.bundle.id, signal)
        except Denied:
            if signal != SIGKILL or cgroups.detect().version == 1:
                raise
            await _in_thread(self.group.kill)  # cgroup.kill asks no security module
        if signal == SIGKILL and self.group.frozen():
            # Version 1 keeps even SIGKILL from a frozen process until it is thawed.
            await _in_thread(self.group.thaw)

    async def delete(self, *, force: bool = False) -> None:
        """Remove the control group; with `force` kill what is still in it."""
        if self._running():
            if not force:
                raise Conflict(f"container {self.bundle.id} is running: stop it first")
            await _in_thread(self.group.kill)
        await _in_thread(self.dispose, TIMEOUT_S)

    def dispose(self, timeout_s: float = 0.05) -> None:
        """`delete` of a container that does not run; for any thread, not the loop's.

        Conflict if something in its control group lives on after `timeout_s`.
        """
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.close()
        container_held.let_go(self._held)  # writes the upper layer back
        pidfd_, self._pidfd = self._pidfd, None
        if pidfd_ is not None:
            pidfd_.close()
        self.group.delete(timeout_s)

    async def exec(
        self, identity: str, process: Process, stdio: Stdio, fds: Sequence[int] = (),
        extras: Extras = NONE,
    ) -> Launched:  # fmt: skip
        """Run `process` in every namespace and the group of the container, with `fds` as 10, …"""
        validate_process(process)
        if not self._running():
            raise Conflict(f"container {self.bundle.id} is not running")
        if self.group.frozen():
            raise Conflict(
                f"Container {self.bundle.id} is paused, unpause the container before exec"
            )
        spec = self.bundle.spec
        with contextlib.ExitStack() as undo:
            target = self._pidfd or pidfd.open_process(self._pid)
            joins = self.group.join_fds()
            for fd in joins:
                undo.callback(fd.close)
            template = exec_template(
                spec,
                process,
                joins=len(joins),
                terminal=stdio.terminal,
                filter_=self.boundary.templates.filter(spec),
                oom_score_adj=self.boundary.inherited_oom_score(),
                kept=len(fds),
                keep_numbers=extras.keep_numbers,
                listener=extras.listener[0] >= 0,
            )
            given: dict[str, int] = {f"join{i}": int(fd) for i, fd in enumerate(joins)}
            given |= self._streams(stdio)
            given["target"] = int(target)
            given |= container_extras.given(fds, extras.listener)
            values: dict[str, Any] = {
                "candidates": candidates(process),
                "argv": process.args,
                "env": process.env,
            }
            if stdio.terminal:
                values["window"] = window_size(stdio.rows, stdio.columns)
            request = LaunchRequest(
                id=f"{self.bundle.id}/{identity}",
                program=template.compiled.filled(values),
                clone_flags=0,
                fds=[given[key] for key in template.fds],
                steps=template.compiled.steps,
                record=f"{self.bundle.directory}/exec-{identity}.json",
                keep=stdio.keep,
                meta=stdio.meta,
                cgroup_fd=self._clone_fd(undo),
            )
            return await self.boundary.launcher.launch(request)

    # --- optional --------------------------------------------------------------------------

    async def pause(self) -> None:
        """Freeze every process."""
        await _in_thread(self.group.freeze)

    async def resume(self) -> None:
        """Thaw them."""
        await _in_thread(self.group.thaw)

    async def update(self, resources: Resources) -> None:
        """Apply changed limits at once."""
        self.group.apply(resources)

    def stats(self) -> dict[str, Any]:
        """Usage in the shape of Docker's statistics."""
        return self.group.stats()

    def processes(self) -> list[int]:
        """Process ids on the host of everything inside."""
        return self.group.pids()

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        return self.group.oom_kills()


async def _in_thread(work: Callable[..., T], *arguments: Any) -> T:
    from asyncio import to_thread  # costs a runtime more than all the rest

    return await to_thread(work, *arguments)


def _mount_overlay(rootfs: Rootfs) -> OwnedFd:
    """The overlay of `rootfs` as a detached mount; LaunchFailed as if the child had failed."""
    try:
        options = root_plan.overlay_options(rootfs.lowers, rootfs.upper, rootfs.work)
        if rootfs.work is not None:
            overlayfs.forget_volatile(rootfs.work)
            if rootfs.volatile:
                options.append("volatile")
        return kernel_mounts.new_filesystem("overlay", options)
    except OSError as error:
        raise _step_failed(root_plan.OVERLAY_STEP, error) from error


def _mapped_root(bundle: Bundle, userns: OwnedFd) -> OwnedFd:
    linux = bundle.spec.linux
    if bundle.rootfs.directory is not None and not bundle.rootfs.mapped:
        root = kernel_mounts.clone_tree(bundle.rootfs.directory, recursive=True)
        container_idmap.detach_from_peers(root)
        return root
    owner = idmap.to_host(linux.uid_mappings, 0), idmap.to_host(linux.gid_mappings, 0)
    if owner[0] is None or owner[1] is None:
        raise Invalid("linux.uidMappings, gidMappings: id 0 must be mapped")
    try:
        return container_idmap.mapped_root(bundle.rootfs, userns, (owner[0], owner[1]))
    except OSError as error:
        raise _step_failed(f"{root_plan.OVERLAY_STEP} with mapped ids", error) from error


def _prepare_mount(spec: Spec, mount: Mount, userns: OwnedFd) -> OwnedFd | None:
    """A mount that a child in a user namespace cannot make: sysfs of a network namespace that is
    not its own, and binds, to whose source it may have no way.
    """
    options = mounts.parse(mount.options)
    try:
        if mount.type_ == "sysfs":
            network = spec.linux.namespace("network")
            if network is not None and not network.path:
                return None
            path = network.path if network is not None else "/proc/self/ns/net"
            with kernel_namespaces.open_namespace(path) as fd:
                return container_idmap.sysfs_of(int(fd), options.attributes)
        if mounts.is_bind(mount):
            return _clone_source(mount, options, userns)
    except OSError as error:
        raise _step_failed(f"mount {mount.type_} on {mount.destination}", error) from error
    return None


def _clone_source(mount: Mount, options: mounts.Options, userns: OwnedFd) -> OwnedFd:
    recursive = options.recursive_bind
    if options.idmap:
        clone = container_idmap.mapped_tree(mount.source, userns, recursive=recursive)
    else:
        clone = kernel_mounts.clone_tree(mount.source, recursive=recursive)
    with contextlib.ExitStack() as undo:
        undo.callback(clone.close)
        if not options.propagation:
            private = kernel_mounts.MS_PRIVATE
            kernel_mounts.set_attributes(int(clone), propagation=private, recursive=True)
        undo.pop_all()
    return clone


def _step_failed(step: str, error: OSError) -> LaunchFailed:
    errno = error.errno or 0
    return LaunchFailed(f"{step}: {os.strerror(errno)}", step=step, errno=errno)
