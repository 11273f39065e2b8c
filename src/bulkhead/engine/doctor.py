"""`system.doctor`: what this host offers, found out by trying, and how to mend what it lacks."""

import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING

from bulkhead.errors import BulkheadError
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.keeper.holder import program_path
from bulkhead.linux import mounts, overlayfs, syscall

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

Finding = dict[str, str]
_WANTED_FILES = 65536
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "blkio", "devices", "freezer")


def finding(check: str, status: str, detail: str, remedy: str = "") -> Finding:
    """One line: status is "ok", "warn" or "missing"."""
    return {"check": check, "status": status, "detail": detail, "remedy": remedy}


def _kernel() -> Finding:
    release = os.uname().release
    major, minor = (int(part) for part in release.split(".")[:2])
    if (major, minor) < (5, 14):
        return finding(
            "kernel", "missing", release, "use Linux 5.14 or newer: older ones lack the mount API"
        )
    if (major, minor) < (6, 15):
        return finding(
            "kernel", "ok",
            f"{release} (before 6.15 an exit code is lost if the holder is killed)",
        )  # fmt: skip
    return finding("kernel", "ok", release)


def _cgroups() -> Finding:
    try:
        hierarchy = cgroups.detect()
    except (BulkheadError, OSError) as error:
        return finding("cgroups", "missing", str(error), "mount the cgroup file systems")
    lacking = [name for name in _CONTROLLERS if _lacks(hierarchy, name)]
    detail = f"version {hierarchy.version}: {' '.join(sorted(hierarchy.controllers))}"
    if lacking:
        return finding(
            "cgroups", "warn", f"{detail}; without {' '.join(lacking)}",
            "limits of these controllers are refused; enable them in the kernel's command line",
        )  # fmt: skip
    return finding("cgroups", "ok", detail)


def _lacks(hierarchy: cgroups.Hierarchy, name: str) -> bool:
    if hierarchy.version == 2 and name in {"devices", "freezer"}:
        return False  # BPF and cgroup.freeze
    other = {"blkio": "io", "io": "blkio"}.get(name, name)
    return name not in hierarchy.controllers and other not in hierarchy.controllers


def _overlay() -> Finding:
    try:
        appends = overlayfs.appends_layers()
    except OSError as error:
        return finding("overlay", "missing", str(error), "modprobe overlay")
    return finding("overlay", "ok", "layers one by one" if appends else "layers as one string")


def _erofs() -> Finding:
    try:
        with open("/proc/filesystems", encoding="ascii") as file:
            known = "erofs" in file.read().split()
    except OSError as error:
        return finding("erofs", "warn", str(error))
    if known:
        return finding("erofs", "ok", "layers are mounted as files")
    return finding(
        "erofs", "warn", "not known to the kernel: layers are unpacked", "modprobe erofs"
    )


def _seccomp() -> Finding:
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="ascii") as file:
            return finding("seccomp", "ok", file.read().strip())
    except OSError:
        return finding("seccomp", "missing", "not in this kernel", "use one with CONFIG_SECCOMP")


def _userns() -> Finding:
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
            limit = int(file.read())
    except (OSError, ValueError):
        return finding("user namespaces", "warn", "not in this kernel")
    if limit == 0:
        return finding(
            "user namespaces", "warn", "forbidden", "sysctl user.max_user_namespaces=15000"
        )
    return finding("user namespaces", "ok", f"up to {limit}")


def _files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _WANTED_FILES:
        return finding(
            "open files", "warn", f"limit {soft}",
            f"raise it to {_WANTED_FILES} (LimitNOFILE=) to run hundreds of workloads",
        )  # fmt: skip
    return finding("open files", "ok", f"limit {soft}")


def _programs() -> Finding:
    try:
        names = ("bulkhead-holder", "bulkhead-init")
        return finding("programs", "ok", " ".join(program_path(name) for name in names))
    except BulkheadError as error:
        return finding("programs", "missing", str(error), "make -C native")


def _mount_api() -> Finding:
    try:
        mounts.new_filesystem("tmpfs").close()
    except OSError as error:
        return finding("mounts", "missing", str(error), "run as root, outside of other containers")
    return finding("mounts", "ok", "by descriptor")


def _pidfd() -> Finding:
    try:
        os.close(syscall.call("pidfd_open", os.getpid(), 0))
    except OSError as error:
        return finding("pidfd", "missing", str(error), "use Linux 5.3 or newer")
    return finding("pidfd", "ok", "available")


def _backing(root: str) -> Finding:
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    text = f"{free >> 20} MiB free in {root}"
    if free < 1 << 30:
        return finding("disk", "warn", text, "prune images, or move the root (--root)")
    return finding("disk", "ok", text)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _kernel, _programs, _cgroups, _mount_api, _overlay, _erofs, _seccomp, _userns, _pidfd, _files,
)  # fmt: skip


async def run(engine: "Engine") -> list[Finding]:
    """Every check; the network's own come last."""
    found = [check() for check in CHECKS]
    found.append(_backing(engine.home.root))
    for name in engine.boundary_names():
        report = engine.boundary(name).probe()
        for one in report.missing:
            found.append(finding(f"boundary {name}", "missing", one.what, one.remedy))
        if report.usable:
            facts = ", ".join(f"{key} {value}" for key, value in report.facts.items())
            found.append(finding(f"boundary {name}", "ok", facts))
    found += [
        finding(one.check, one.status, one.detail, one.remedy) for one in engine.networks.doctor()
    ]
    return found
