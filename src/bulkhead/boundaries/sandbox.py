"""The sandbox boundary: user-mode-linux, a Linux kernel that is an ordinary process of the host.

No hardware is needed. The kernel runs in a jail (jail.py) without any capability; the workload's
system calls end in it. One processor; memory is what --memory says, else 512 MiB, taken from the
host as the guest touches it.
"""

import dataclasses
import functools
import os

from bulkhead.boundaries import sandbox_syscalls
from bulkhead.boundaries.guest import disks, initramfs, kernels, plan
from bulkhead.boundaries.guest.instance import (
    MONITOR,
    OPTIONAL,
    GuestBoundary,
    Prepared,
    native_program,
)
from bulkhead.boundaries.jail import Jail, JailRoot, uid_of
from bulkhead.boundary.seam import Bundle, Missing, Report
from bulkhead.errors import BulkheadError, Invalid, Unsupported

PROGRAM = "/usr/bin/linux.uml"
INITRAMFS = "/boot/initramfs"
MODULES = ("erofs", "overlay", "fuse")
CHANNEL_FD = 9
FIRST_TAP_FD = 11
LAYERS = 15
"""Disks of user-mode-linux, less the writable one."""
DEFAULT_MEMORY = 512 << 20
MINIMUM_MEMORY = 32 << 20
OVERHEAD = 64 << 20
_TASKS = 24
WINDOW = 2048
"""Bytes under way to the guest. Its serial line, once it has been full (4 KiB), stays dead."""


class SandboxBoundary(GuestBoundary):
    """Runs workloads on user-mode-linux."""

    name = "sandbox"

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
        if len(layers) > LAYERS:
            raise Unsupported(
                f"the image has {len(layers)} layers; a sandbox takes at most {LAYERS}"
            )
        uid = uid_of(bundle.id)
        disks.make_disk(self.home, disk, bundle.rootfs.disk_size, uid=uid)
        ramdisk = initramfs.build(
            self.home, native_program("bulkhead-guest"), kernel.module_files(MODULES)
        )
        root = self.roots.make(
            "sandbox",
            {PROGRAM: kernel.path, MONITOR: native_program("bulkhead-monitor")},
            {INITRAMFS: ramdisk.path, "/proc/cpuinfo": _processor()},
        )
        files = [(path, False) for path in layers] + [(disk, True)]
        shape = self.shape(bundle, terminal=terminal)
        made = dataclasses.replace(shape, root=root, disks=files, args=_arguments(bundle, shape))
        machine = plan.Machine(
            modules=ramdisk.modules,
            layers=tuple(_device(number) for number in range(len(layers))),
            upper=_device(len(layers)),
            interfaces=tuple(f"vec{number}" for number in range(len(bundle.nics))),
        )
        return Prepared(made, machine, ("--window", str(WINDOW)))


def _device(number: int) -> str:
    return f"/dev/ubd{chr(ord('a') + number)}"


def _arguments(bundle: Bundle, shape: Jail) -> list[str]:
    """The command line of the kernel, which is also its program's."""
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
        "quiet", "pty.legacy_count=0", "initcall_blacklist=raid6_select_algo", "lpj=4000000",
        "random.trust_cpu=on",
    ]  # fmt: skip
    layers = len(bundle.rootfs.layer_files)
    found += [f"ubd{number}r=/disks/{number}" for number in range(layers)]
    found.append(f"ubd{layers}=/disks/{layers}")
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
