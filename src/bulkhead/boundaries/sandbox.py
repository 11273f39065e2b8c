"""The sandbox boundary: user-mode-linux, a Linux kernel that is an ordinary process of the host.

No hardware is needed. The kernel runs in a jail (jail.py) without any capability; the workload's
system calls end in it. One processor; memory is what --memory says, else 512 MiB, taken from the
host as the guest touches it.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.boundaries import sandbox_plugs, sandbox_syscalls
from bulkhead.boundaries.guest import disks, hotplug, initramfs, kernels, plan, trim
from bulkhead.boundaries.guest.cards import Cards
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    OPTIONAL,
    GuestBoundary,
    Prepared,
    native_program,
)
from bulkhead.boundaries.jail import Jail, JailRoot, has_files, uid_of
from bulkhead.boundary.registry import GVISOR, Services
from bulkhead.boundary.seam import Bundle, Instance, Missing, Report
from bulkhead.errors import BulkheadError, Invalid, Unsupported
from bulkhead.linux import tap
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.boundaries.gvisor import GvisorBoundary

PROGRAM = "/usr/bin/linux.uml"
INITRAMFS = "/boot/initramfs"
IPV6 = "ipv6"
"""A module of user-mode-linux, loaded where it is needed."""
MODULES = ("erofs", "overlay", "fuse")
_FUSE = "/fuse."
"""Loaded where it is needed: each page of a module is a system call of the kernel."""
CHANNEL_FD = 9
FIRST_TAP_FD = 11
DISKS = 16
"""Of user-mode-linux: layers, the writable one, volumes, the ring."""
DEFAULT_MEMORY = 512 << 20
MINIMUM_MEMORY = 32 << 20
OVERHEAD = 64 << 20
_TASKS = 24
_NOT_BEGUN = "raid6_select_algo,init_jfs_fs,init_zswap"
"""Parts of the kernel that take time or memory at every boot and that no workload has: the choice
between algorithms for RAID 6, JFS with its tables, compressed swap without a swap."""
RING = "/tmp/ring"
"""What goes to the guest goes through this file, its last disk: the serial line is slow to read,
and once it has been full (4 KiB) it stays dead."""


class SandboxBoundary(GuestBoundary):
    """Runs workloads on user-mode-linux."""

    name = "sandbox"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._services = services
        self._gvisor: GvisorBoundary | None = None

    @property
    def gvisor(self) -> "GvisorBoundary":
        """The same with another kernel, made when first asked for."""
        if self._gvisor is None:
            from bulkhead.boundaries.gvisor import GvisorBoundary

            self._gvisor = GvisorBoundary(self._services)
        return self._gvisor

    async def create(self, bundle: Bundle) -> Instance:  # type: ignore[override]
        """Make the control group of a workload; nothing runs yet."""
        if bundle.kernel == GVISOR:
            return await self.gvisor.create(bundle)
        return await super().create(bundle)

    async def load(self, bundle: Bundle, pid: int) -> Instance:  # type: ignore[override]
        """A workload of an earlier engine."""
        if bundle.kernel == GVISOR:
            return await self.gvisor.load(bundle, pid)
        return await super().load(bundle, pid)

    def probe(self) -> Report:
        """Whether the parts are there; that they work is seen at the first start."""
        missing: list[Missing] = []
        facts = {"processors": "1"}
        kernel = kernels.uml()
        if kernel is None:
            missing.append(Missing("user-mode-linux", "apt-get install user-mode-linux"))
        else:
            facts["kernel"] = f"{kernel.release} ({kernel.path})"
            try:
                kernel.module_files(MODULES)
            except BulkheadError as error:
                missing.append(Missing(str(error), "apt-get install user-mode-linux"))
        if os.uname().machine != "x86_64":
            missing.append(Missing("an x86-64 host", "user-mode-linux exists for x86 only"))
        return Report(self.name, not missing, tuple(missing), OPTIONAL, facts)

    def shape(self, bundle: Bundle, *, terminal: bool) -> Jail:
        """Sizes and filter of the jail."""
        resources = bundle.spec.linux.resources
        memory = resources.memory if resources is not None else None
        limit = memory.limit if memory is not None and memory.limit else 0
        size = limit if limit > 0 else DEFAULT_MEMORY
        if size < MINIMUM_MEMORY:
            raise Invalid(
                f"a sandbox has a kernel of its own: --memory must be at least "
                f"{MINIMUM_MEMORY >> 20}m"
            )
        cpu = resources.cpu if resources is not None else None
        if cpu is not None and cpu.quota and cpu.quota > (cpu.period or 100_000):
            raise Unsupported("a sandbox has one processor: --cpus above 1 is not possible")
        return Jail(
            root=JailRoot("", ""),
            args=(),
            seccomp=sandbox_syscalls.profile(),
            disks=(),
            guest_bytes=size,
            overhead_bytes=OVERHEAD,
            tasks=_TASKS,
            terminal=terminal,
        )

    def prepare(self, bundle: Bundle, *, terminal: bool) -> Prepared:
        """Everything the kernel boots from."""
        kernel = kernels.find(self.home, bundle.kernel or kernels.UML)
        if kernel.kind != "uml":
            raise Unsupported(
                f"the sandbox boundary runs user-mode-linux, and {kernel.name} is a kernel for "
                "machines: --boundary microvm"
            )
        layers, disk = bundle.rootfs.layer_files, bundle.rootfs.disk
        if not layers or disk is None:
            raise Unsupported("a sandbox needs an image of layers, not an unpacked root")
        volumes = plan.volume_disks(bundle, lambda n: _device(len(layers) + 1 + n))
        if len(layers) + len(volumes.files) + 2 > DISKS:
            raise Unsupported(
                f"{len(layers)} layers and {len(volumes.files)} volumes that are disks: "
                f"a sandbox has room for {DISKS - 2}"
            )
        uid = uid_of(bundle.id)
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid)
        six = any(":" in address for nic in bundle.nics for address in nic.addresses)
        wanted = (*MODULES, IPV6) if six else MODULES
        ramdisk = initramfs.build(
            self.home, native_program("bulkhead-guest"), kernel.module_files(wanted)
        )
        root = self.roots.make(
            "sandbox",
            {
                PROGRAM: trim.kernel(self.home, kernel.path),
                MONITOR: native_program("bulkhead-monitor"),
            },
            {INITRAMFS: ramdisk.path, "/proc/cpuinfo": _processor()},
        )
        files = [(path, False) for path in layers] + [(disk, True), *volumes.files]
        shape = self.shape(bundle, terminal=terminal)
        args = _arguments(bundle, shape, [writable for _, writable in files])
        made = dataclasses.replace(shape, root=root, disks=files, args=args)
        machine = plan.Machine(
            modules=tuple(one for one in ramdisk.modules if _FUSE not in one or _files(bundle)),
            layers=tuple(_device(number) for number in range(len(layers))),
            upper=_device(len(layers)),
            interfaces=tuple(f"vec{number}" for number in range(len(bundle.nics))),
            sources=volumes.sources,
        )
        spares = _spare_taps(bundle)
        return Prepared(made, machine, ("--ring", RING), spares, range(len(files) + 1))

    def plugs(self, pid: int, cards: int) -> hotplug.Plugs:
        """By way of the kernel's management console."""
        return sandbox_plugs.Plugs(pid)

    def cards(self, pid: int, cards: int) -> Cards:
        """By its spare taps."""
        return sandbox_plugs.Cards(pid, cards, FIRST_TAP_FD + cards)

    def share_modules(self, bundle: Bundle) -> Sequence[str]:
        """FUSE, which is loaded where it is needed."""
        found = kernels.find(self.home, bundle.kernel or kernels.UML).module_files(("fuse",))
        return [f"/modules/{os.path.basename(path).removesuffix('.xz')}" for path in found]


def _spare_taps(bundle: Bundle) -> tuple[OwnedFd, ...]:
    """What cards for further networks can be made of while it runs (sandbox_plugs.py)."""
    network = bundle.spec.linux.namespace("network")
    if not bundle.nics or network is None or not network.path:
        return ()
    return tuple(tap.open_spares(network.path, sandbox_plugs.SPARES))


def _files(bundle: Bundle) -> bool:
    """Whether the guest is to know FUSE: for files of the host, or because it may mount any."""
    process = bundle.spec.process
    granted = process.capabilities if process is not None else None
    mounts = granted is not None and "CAP_SYS_ADMIN" in granted.effective
    return mounts or has_files(bundle)


def _device(number: int) -> str:
    return f"/dev/ubd{chr(ord('a') + number)}"


def _arguments(bundle: Bundle, shape: Jail, disks_: Sequence[bool]) -> list[str]:
    """The command line of the kernel, which is also its program's; `disks_`: which are writable."""
    found = [
        PROGRAM,
        f"mem={shape.guest_bytes >> 20}M",
        f"initrd={INITRAMFS}",
        "uml_dir=/tmp/",
        "umid=guest",
        # The first serial line is the channel; the console goes to the monitor.
        "con=null", "con0=null,fd:1", "ssl=null", f"ssl0=fd:{CHANNEL_FD}",
        "BULKHEAD_GUEST_CHANNEL=/dev/ttyS0",
        # What takes time at boot and is of no use here.
        "quiet", "pty.legacy_count=0", f"initcall_blacklist={_NOT_BEGUN}", "lpj=4000000",
        "random.trust_cpu=on",
    ]  # fmt: skip
    for number, writable in enumerate(disks_):
        found.append(f"ubd{number}{'' if writable else 'r'}=/disks/{number}")
    found += [f"ubd{len(disks_)}r={RING}", f"BULKHEAD_GUEST_RING={_device(len(disks_))}"]
    for number, nic in enumerate(bundle.nics):
        tap = FIRST_TAP_FD + number
        # vec=0: packets one by one. Many at once (recvmmsg) is for sockets; a tap is none.
        found.append(f"vec{number}:transport=fd,fd={tap},vec=0,mac={nic.mac},mtu={nic.mtu}")
    return found


@functools.cache
def _processor() -> bytes:
    """What the kernel asks /proc/cpuinfo for: lines that are the same at every start."""
    wanted = (b"processor", b"vendor_id", b"model name", b"cache_alignment", b"flags")
    with open("/proc/cpuinfo", "rb") as file:
        lines = file.read().partition(b"\n\n")[0].splitlines()
    return b"".join(line + b"\n" for line in lines if line.startswith(wanted)) + b"\n"
