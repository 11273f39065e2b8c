"""The engine: one object that owns everything a daemon of one root needs, and its parts."""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from bulkhead.boundary import registry
from bulkhead.boundary.seam import Boundary, Rootfs
from bulkhead.depot import links
from bulkhead.engine import body, linking, names, recovery, snapshots, users
from bulkhead.engine.building import Building
from bulkhead.engine.confinement import confined
from bulkhead.engine.control import Control
from bulkhead.engine.events import Events
from bulkhead.engine.execs import Execs
from bulkhead.engine.health import Health
from bulkhead.engine.inside import Inside
from bulkhead.engine.janitor import Janitor
from bulkhead.engine.leases import Leases
from bulkhead.engine.lifecycle import Lifecycle
from bulkhead.engine.processes import Processes
from bulkhead.engine.records import Record, Workload, Workloads
from bulkhead.engine.removal import Removal
from bulkhead.engine.reservations import Reservations
from bulkhead.engine.spares import Spares
from bulkhead.errors import BulkheadError, NotFound
from bulkhead.home import Home
from bulkhead.images.service import ImageService
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.linux import mounts
from bulkhead.network.manager import NetworkManager
from bulkhead.network.model import AttachRequest, EndpointRequest
from bulkhead.state.database import Database
from bulkhead.store import merged
from bulkhead.store.content import ContentStore
from bulkhead.store.mounts import LayerMounts
from bulkhead.volumes.manager import VolumeManager

log = logging.getLogger("bulkhead.engine")
_T = TypeVar("_T")

BOOT_ID = "/proc/sys/kernel/random/boot_id"
THREADS = 4
WRITE_S = 0.02
"""How long the note that something runs may wait for another one to be written with."""
SYNC_S = 0.2
"""How long after the end of a run its record may take to be on the disk."""
DEFAULT_ROOT = "/var/lib/bulkhead"


class Engine:
    """What handlers work with; `open` starts it, `close` ends it."""

    def __init__(self, home: Home, database: Database) -> None:
        self.home = home
        self.database = database
        self.loop = asyncio.get_running_loop()
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="engine")
        self.janitor = Janitor(self.loop)
        self.started_ns = time.time_ns()
        self.stopping = asyncio.Event()
        self.pid = os.getpid()
        with open(BOOT_ID, encoding="ascii") as file:
            self.boot_id = file.read().strip()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._boundaries: dict[str, Boundary] = {}
        self._accounts: dict[tuple[str, ...], users.Accounts] = {}
        self.closing = False
        self._tending: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._syncing: asyncio.TimerHandle | None = None

        self.store = ContentStore(home.in_root("store"))
        self.images = ImageService(home, self.store)
        self.layers = LayerMounts(self.store, home.run)
        self.volumes = VolumeManager(home.root, database)
        self.networks = NetworkManager(home, database.documents("network"))
        self.events = Events()
        self.workloads = Workloads(database)
        self.images.catalog.held = self._held_images
        self.processes = Processes(self)
        self.lifecycle = Lifecycle(self)
        self.removal = Removal(self)
        self.control = Control(self)
        self.execs = Execs(self)
        self.health = Health(self)
        self.leases = Leases(self)
        self.inside = Inside(self)
        self.spares = Spares(self)
        self.builds = Building(self)
        self.reservations = Reservations(self)

    # --- beginning and end

    async def open(self) -> None:
        """Start the parts and repair what an earlier engine left."""
        self.workloads.load()
        await self.processes.open()
        await recovery.run(self)
        await self.blocking(lambda: snapshots.clear(self.home))
        await self.builds.open()

    async def close(self) -> None:
        """Stop the parts; workloads run on."""
        self.closing = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self.workloads.flush()
        await self.spares.close()
        await self.processes.close()
        self.leases.close()
        self.inside.close()
        self.networks.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.janitor.close()

    def spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Run `work` on the loop; its failure is logged if nobody waits for it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, BulkheadError):
            log.error("unexpected failure in the background", exc_info=error)

    @staticmethod
    async def shielded(task: "asyncio.Task[_T]") -> _T:
        """The result of `task`, which goes on if the caller is cancelled."""
        return await asyncio.shield(task)

    async def blocking(self, function: Callable[[], _T]) -> _T:
        """Run `function` in a thread: for files, hashing, registries."""
        return await self.loop.run_in_executor(self.pool, function)

    def write_soon(self) -> None:
        """Have the records written in WRITE_S whose writing was put off."""
        if self._writing is None and not self.closing:
            self._writing = self.loop.call_later(WRITE_S, self._write)

    def _write(self) -> None:
        self._writing = None
        if not self.closing:  # closing writes them too
            self.workloads.flush()

    def sync_soon(self) -> None:
        """Have what was written so far on the disk in SYNC_S, without holding anybody up."""
        if self._syncing is None and not self.closing:
            self._syncing = self.loop.call_later(SYNC_S, self._sync)

    def _sync(self) -> None:
        self._syncing = None
        if not self.closing:  # closing the database flushes it too
            self.workloads.flush()
            self.janitor.submit(self.database.sync)

    # --- what launches need

    def take_id(self) -> str:
        """An id for a new workload."""
        return self.spares.take() or names.new_id()

    def boundary(self, name: str) -> Boundary:
        """The boundary called `name`, made once."""
        found = self._boundaries.get(name)
        if found is None:
            services = registry.Services(home=self.home, launcher=self.processes)
            found = self._boundaries[name] = registry.boundary(name, services)
        return found

    async def lowers(self, diff_ids: Sequence[str]) -> tuple[str, ...]:
        """The directories of an image's layers, topmost first, mounted."""
        return self.layers.lowers(diff_ids)

    def accounts(self, rootfs: Rootfs) -> users.Accounts:
        """passwd and group of a root: remembered by its layers unless the upper has its own."""
        assert rootfs.upper is not None
        if os.path.lexists(f"{rootfs.upper}/etc"):
            return users.read((rootfs.upper, *rootfs.lowers))
        known = self._accounts.get(rootfs.lowers)
        if known is None:
            if len(self._accounts) > 256:
                self._accounts.clear()
            known = self._accounts[rootfs.lowers] = users.read(rootfs.lowers)
        return known

    @property
    def cgroup_parent(self) -> str:
        """The group above all workloads of this root; each root has its own."""
        if self.home.root == DEFAULT_ROOT:
            return "/bulkhead"
        return f"/bulkhead-{hashlib.sha256(self.home.root.encode()).hexdigest()[:8]}"

    def cgroup_path(self, record: Record) -> str:
        """The workload's control group."""
        parent = record.host.cgroup_parent
        if not parent:
            return f"{self.cgroup_parent}/{record.id}"
        return f"/{parent.strip('/')}/{record.id}"

    def explain_oom(self, record: Record) -> str:
        """One line on the last kill for want of memory in its group."""
        try:
            return cgroups.detect().open(self.cgroup_path(record)).explain_oom()
        except (BulkheadError, OSError) as error:
            return f"out of memory (no more is known: {error})"

    def attach_request(self, workload: Workload) -> AttachRequest:
        """What the network is asked for."""
        record = workload.record
        host, config = record.host, record.config
        endpoints = {
            name: EndpointRequest(
                ipv4=one.ipam_config.ipv4_address if one.ipam_config else "",
                ipv6=one.ipam_config.ipv6_address if one.ipam_config else "",
                link_local=tuple((one.ipam_config.link_local_ips or ()) if one.ipam_config else ()),
                mac=one.mac_address,
                aliases=tuple(one.aliases or ()),
                links=tuple(one.links or ()),
                options=one.driver_opts or {},
                priority=one.gw_priority,
            )
            for name, one in record.networks.items()
        }
        request = AttachRequest(
            workload_id=record.id,
            name=record.name,
            mode=host.network_mode,
            endpoints=endpoints,
            ports=self.attach_ports(host),
            exposed=tuple(config.exposed_ports or ()),
            publish_all=host.publish_all_ports,
            hostname=config.hostname,
            domainname=config.domainname,
            dns=tuple(host.dns or ()),
            dns_search=tuple(host.dns_search or ()),
            dns_options=tuple(host.dns_options or ()),
            # Of one that runs the file is written already.
            extra_hosts=(
                *(host.extra_hosts or ()),
                *(() if workload.running else linking.hosts(self, record)),
            ),
            mac=config.mac_address or "",
            guest=record.boundary in registry.GUESTS,
            confined=confined(record),
        )
        return workload.attaching(request) if workload.attaching is not None else request

    @staticmethod
    def attach_ports(host: body.HostConfig) -> dict[str, tuple[dict[str, str], ...]]:
        """Published ports as the network takes them."""
        return {
            port: tuple(
                {"HostIp": one.host_ip, "HostPort": one.host_port} for one in bindings or ()
            )
            for port, bindings in (host.port_bindings or {}).items()
        }

    def network_exists(self, reference: str) -> bool:
        """Whether a network is called so."""
        try:
            self.networks.inspect(reference)
        except NotFound:
            return False
        return True

    def tend_networks(self, delay_s: float = 0.002) -> None:
        """Let the network do what can wait, soon, when nobody waits.

        To be called after each `release` and whenever else it may have something to do.
        """
        due = self.loop.time() + delay_s
        if self._tending is not None:
            if self._tending.when() <= due:
                return
            self._tending.cancel()
            self._tending = None
        if not self.closing:
            self._tending = self.loop.call_at(due, self._tend_networks)

    def _tend_networks(self) -> None:
        self._tending = None
        if self.closing:
            return
        try:
            again_s = self.networks.refill()
        except (BulkheadError, OSError) as error:
            log.warning("the network's reserve cannot be filled: %s", error)
            return
        if self.processes.helpers_differ():
            self.spawn(self.processes.sync_helpers())
        if again_s is not None:
            self.tend_networks(again_s)

    # --- volumes

    def volume_users(self, name: str) -> list[str]:
        """Ids of the workloads that refer to volume `name`."""
        return [
            workload.id
            for workload in self.workloads
            if any(p.type_ == "volume" and p.name == name for p in workload.record.mounts)
        ]

    def discard_volume(self, name: str, *, unless_used: bool = False) -> None:
        """Remove a volume and, in the background, its files."""
        if unless_used and self.volume_users(name):
            return
        with contextlib.suppress(NotFound):
            left = self.volumes.remove(name, ())
            if left is not None:
                self.spawn(self.blocking(lambda: self.volumes.remove_tree(left)))

    # --- shared memory of IPC namespaces that others may join

    def shm_path(self, identity: str) -> str:
        """Where the /dev/shm of a workload with --ipc shareable is mounted for us."""
        return f"{self.home.workload_run(identity)}/shm"

    def make_shm(self, record: Record) -> str:
        """Mount it."""
        path = self.shm_path(record.id)
        os.makedirs(path, mode=0o700, exist_ok=True)
        if not os.path.ismount(path):
            options: list[str | tuple[str, str | int]] = [
                ("mode", "1777"),
                ("size", str(record.host.shm_size)),
            ]
            attributes = mounts.ATTR_NOSUID | mounts.ATTR_NODEV | mounts.ATTR_NOEXEC
            with mounts.new_filesystem("tmpfs", options, attributes) as mounted:
                mounts.attach(int(mounted), path)
        return path

    def drop_shm(self, record: Record) -> None:
        """Unmount it, if there is one."""
        if record.host.ipc_mode == "shareable" and os.path.ismount(self.shm_path(record.id)):
            mounts.unmount(self.shm_path(record.id), mounts.MNT_DETACH)

    # --- images

    def image_users(self) -> dict[str, list[str]]:
        """The workloads of each image, by their short ids."""
        users: dict[str, list[str]] = {}
        for workload in self.workloads:
            users.setdefault(workload.record.image_id, []).append(workload.id[:12])
        return users

    def _held_images(self) -> set[str]:
        """Configurations and layers of the workloads there are, whatever became of their names."""
        records = [workload.record for workload in self.workloads]
        held = {d for record in records for d in (record.image_id, *record.diff_ids)}
        served = links.held(self.home.in_root("registry"), self.store.provenance)
        return (held - {""}) | self.builds.held() | served | snapshots.held(self.home)

    def running_names(self) -> list[str]:
        """Short ids of the workloads that run."""
        return [workload.id[:12] for workload in self.workloads if workload.running]

    async def release_layers(self) -> None:
        """Unmount the layers that neither an image nor a workload refers to."""
        # From here on no start finds ready what lies on layers that are about to go.
        self.spares.forget_layers()
        used = {d for workload in self.workloads for d in workload.record.diff_ids}
        await self.blocking(lambda: self.layers.release_unused(used, self.store.layers))
        directory = self.home.in_root("merged")
        await self.blocking(lambda: merged.release(directory, set(self.store.layers())))

    # --- ends

    @property
    def identity(self) -> str:
        """A stable name of this installation."""
        return hashlib.sha256(self.home.root.encode()).hexdigest()[:32]

    @staticmethod
    def boundary_names() -> tuple[str, ...]:
        """The boundaries there are."""
        return registry.names()

    async def settled(self) -> None:
        """Wait until what follows the ends of workloads is done."""
        for workload in self.workloads:
            if not workload.running:
                await workload.cleaned.wait()
        waiting = [task for task in self._tasks if task is not asyncio.current_task()]
        if waiting:
            await asyncio.wait(waiting, timeout=30.0)

    async def end_helpers(self) -> None:
        """End keeper, resolver and holder, and take away what only a running engine needs."""
        self.closing = True
        await self.spares.close()
        await self.processes.holder.shutdown(force=True)
        self.networks.close()
        self.builds.close()
        self.layers.close()
        with contextlib.suppress(BulkheadError, OSError):
            cgroups.detect().remove_parent(self.cgroup_parent)
