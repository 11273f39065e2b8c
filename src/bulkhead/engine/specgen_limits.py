"""The part of the runtime configuration that limits: cgroup resources, devices, rlimits."""

import os
import stat

from bulkhead.engine import body
from bulkhead.errors import Invalid
from bulkhead.oci import runtime as oci

UNLIMITED = 2**64 - 1
_RWM = "rwm"


def _rule(
    allow: bool, kind: str, major: int | None, minor: int | None, access: str = _RWM
) -> oci.DeviceCgroup:
    return oci.DeviceCgroup(allow=allow, type_=kind, major=major, minor=minor, access=access)


DEFAULT_RULES = (
    _rule(False, "a", None, None),
    _rule(True, "c", None, None, "m"),
    _rule(True, "b", None, None, "m"),
    _rule(True, "c", 1, 3),
    _rule(True, "c", 1, 5),
    _rule(True, "c", 1, 7),
    _rule(True, "c", 1, 8),
    _rule(True, "c", 1, 9),
    _rule(True, "c", 5, 0),
    _rule(True, "c", 5, 1),
    _rule(True, "c", 5, 2),
    _rule(True, "c", 136, None),
)
"""Docker's: nothing but null, zero, full, random, urandom, the terminals; any node may be made."""


def _device_at(path: str, target: str) -> oci.Device:
    try:
        status = os.stat(path)
    except OSError as error:
        raise Invalid(
            f'error gathering device information while adding custom device "{path}": '
            f"{(error.strerror or str(error)).lower()}"
        ) from error
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise Invalid(
            "error gathering device information while adding custom device "
            f'"{path}": not a device node'
        )
    return oci.Device(
        path=target,
        type_="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        file_mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
    )


def devices(
    host: body.HostConfig, *, guest: bool = False
) -> tuple[list[oci.Device], list[oci.DeviceCgroup]]:
    """Nodes to make beside the default ones, and every rule; `guest`: of a kernel of its own."""
    if host.privileged and guest:
        return list(_GUEST_DEVICES), [_rule(True, "a", None, None)]
    if host.privileged:
        return _host_devices(), [_rule(True, "a", None, None)]
    nodes: list[oci.Device] = []
    rules = list(DEFAULT_RULES)
    for wanted in host.devices or ():
        target = wanted.path_in_container or wanted.path_on_host
        found = []
        if os.path.isdir(wanted.path_on_host):
            for parent, _, files in os.walk(wanted.path_on_host):
                for name in files:
                    path = f"{parent}/{name}"
                    if stat.S_IFMT(os.lstat(path).st_mode) in {stat.S_IFCHR, stat.S_IFBLK}:
                        found.append(
                            _device_at(path, target + path.removeprefix(wanted.path_on_host))
                        )
        else:
            found.append(_device_at(wanted.path_on_host, target))
        for node in found:
            nodes.append(node)
            access = wanted.cgroup_permissions or _RWM
            rules.append(_rule(True, node.type_, node.major, node.minor, access))
    for text in host.device_cgroup_rules or ():
        kind, numbers, access = text.split()
        major, minor = (None if n == "*" else int(n) for n in numbers.split(":"))
        rules.append(_rule(True, kind, major, minor, access))
    return nodes, rules


_GUEST_DEVICES = (
    oci.Device("/dev/fuse", "c", 10, 229, file_mode=0o666),
    oci.Device("/dev/net/tun", "c", 10, 200, file_mode=0o666),
    oci.Device("/dev/kmsg", "c", 1, 11, file_mode=0o644),
)
"""What a privileged workload has of a guest's devices; it may make nodes of the others."""


def _host_devices() -> list[oci.Device]:
    """Every device node of the host's /dev, for privileged workloads."""
    nodes = []
    skipped = {"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/.lxc"}
    for parent, directories, files in os.walk("/dev"):
        directories[:] = [d for d in directories if f"{parent}/{d}" not in skipped]
        for name in files:
            path = f"{parent}/{name}"
            if path in {"/dev/console", "/dev/ptmx"}:
                continue
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                nodes.append(_device_at(path, path))
    return nodes


def _block(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise Invalid(f"cannot limit the device {path}: {error.strerror}") from error
    if not stat.S_ISBLK(status.st_mode):
        raise Invalid(f"cannot limit the device {path}: it is not a block device")
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def _throttles(limits: list[body.Throttle] | None) -> list[oci.ThrottleDevice]:
    found = []
    for limit in limits or ():
        major, minor = _block(limit.path)
        found.append(oci.ThrottleDevice(major=major, minor=minor, rate=limit.rate))
    return found


def _block_io(r: body.Resources) -> oci.BlockIO | None:
    weights = []
    for entry in r.blkio_weight_device or ():
        major, minor = _block(entry.path)
        weights.append(oci.WeightDevice(major=major, minor=minor, weight=entry.weight))
    io = oci.BlockIO(
        weight=r.blkio_weight or None,
        weight_device=weights,
        throttle_read_bps_device=_throttles(r.blkio_device_read_bps),
        throttle_write_bps_device=_throttles(r.blkio_device_write_bps),
        throttle_read_iops_device=_throttles(r.blkio_device_read_iops),
        throttle_write_iops_device=_throttles(r.blkio_device_write_iops),
    )
    return None if io == oci.BlockIO() else io


def _cpu(r: body.Resources) -> oci.CPU | None:
    quota, period = r.cpu_quota, r.cpu_period
    if r.nano_cpus:
        period = 100_000
        quota = r.nano_cpus * period // 1_000_000_000
    cpu = oci.CPU(
        shares=r.cpu_shares or None,
        quota=quota or None,
        period=period or None,
        realtime_runtime=r.cpu_realtime_runtime or None,
        realtime_period=r.cpu_realtime_period or None,
        cpus=r.cpuset_cpus,
        mems=r.cpuset_mems,
    )
    return None if cpu == oci.CPU() else cpu


def _memory(r: body.Resources) -> oci.Memory | None:
    memory = oci.Memory(
        limit=r.memory or None,
        reservation=r.memory_reservation or None,
        swap=r.memory_swap or None,
        swappiness=r.memory_swappiness,
        disable_oom_killer=r.oom_kill_disable or None,
    )
    return None if memory == oci.Memory() else memory


def resources(r: body.Resources, rules: list[oci.DeviceCgroup]) -> oci.Resources:
    """Every limit; members that were not asked for stay unset."""
    return oci.Resources(
        devices=rules,
        memory=_memory(r),
        cpu=_cpu(r),
        pids=oci.Pids(limit=r.pids_limit) if r.pids_limit else None,
        block_io=_block_io(r),
    )


def rlimits(ulimits: list[body.Ulimit] | None) -> list[oci.Rlimit]:
    """The limits of getrlimit(2)."""
    return [
        oci.Rlimit(
            type_=f"RLIMIT_{one.name.upper()}",
            soft=UNLIMITED if one.soft == -1 else one.soft,
            hard=UNLIMITED if one.hard == -1 else one.hard,
        )
        for one in ulimits or ()
    ]
