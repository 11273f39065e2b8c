"""OCI resources as writes to control group files; pure.

A `Write` names a controller, a file and a value, and what to write instead where kernels differ in
the file. The order of the writes matters and is kept.
"""

import math
from dataclasses import dataclass

from bulkhead.errors import Invalid
from bulkhead.oci.runtime import CPU, BlockIO, HugepageLimit, Memory, NetworkResources, Resources

UNLIMITED = -1


@dataclass(frozen=True, slots=True)
class Write:
    """One value for one file of a control group."""

    controller: str
    file: str
    value: str
    what: str = ""
    """What it is to the user, e.g. "--cpus"."""
    otherwise: tuple[tuple[str, str], ...] = ()
    """(file, value) to try, in order, where the file does not exist."""
    optional: bool = False
    """Where none of the files exists, leave it."""


def shares_to_weight(shares: int) -> int:
    """cpu.shares (2..262144) as cpu.weight (1..10000).

    runc's formula since 1.3.2 (opencontainers/cgroups 0.0.5): a quadratic in log2 that maps the
    minimum, the default (1024 to 100) and the maximum onto each other.
    """
    if shares == 0:
        return 0
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    logarithm = math.log2(shares)
    exponent = (logarithm * logarithm + 125 * logarithm) / 612.0 - 7.0 / 34.0
    return math.ceil(10**exponent)


def blkio_to_io_weight(weight: int) -> int:
    """blkio.weight (10..1000) as io.weight (1..10000), linear as in runc."""
    return 0 if weight == 0 else 1 + (weight - 10) * 9999 // 990


def swap_to_v2(swap: int, memory: int | None) -> int | None:
    """OCI's memory plus swap as swap alone; -1 for no limit, None for "leave it".

    Invalid for a swap limit without a memory limit, or below it.
    """
    if swap == UNLIMITED:
        return UNLIMITED
    if swap == 0:
        return None
    if not memory or memory < 0:
        raise Invalid("a limit of memory plus swap (--memory-swap) needs a memory limit (--memory)")
    if swap < memory:
        raise Invalid(
            "Minimum memoryswap limit should be larger than memory limit, see usage:"
            f" {swap} is below {memory} bytes"
        )
    return swap - memory


def _limit(value: int) -> str:
    return "max" if value < 0 else str(value)


def plan_v1(resources: Resources) -> list[Write]:
    """The writes for cgroup v1, without devices and memory limits (whose order depends)."""
    writes: list[Write] = []
    if resources.cpu is not None:
        writes += _cpu_v1(resources.cpu)
    if resources.memory is not None:
        writes += _memory_v1(resources.memory)
    if resources.pids is not None:
        writes.append(_pids(resources.pids.limit))
    if resources.block_io is not None:
        writes += _block_io_v1(resources.block_io)
    writes += _hugepages(resources.hugepage_limits, "limit_in_bytes")
    if resources.network is not None:
        writes += _network(resources.network)
    for device, limit in resources.rdma.items():
        value = _rdma(device, limit.hca_handles, limit.hca_objects)
        writes.append(Write("rdma", "rdma.max", value))
    if resources.unified:
        raise Invalid(
            f"cgroup files of version 2 ({', '.join(sorted(resources.unified))}) cannot be set:"
            " this host runs cgroup v1"
        )
    return writes


def plan_v2(resources: Resources) -> list[Write]:
    """The writes for cgroup v2, without devices."""
    writes: list[Write] = []
    if resources.cpu is not None:
        writes += _cpu_v2(resources.cpu)
    if resources.memory is not None:
        writes += _memory_v2(resources.memory)
    if resources.pids is not None:
        writes.append(_pids(resources.pids.limit))
    if resources.block_io is not None:
        writes += _block_io_v2(resources.block_io)
    writes += _hugepages(resources.hugepage_limits, "max")
    for device, limit in resources.rdma.items():
        value = _rdma(device, limit.hca_handles, limit.hca_objects)
        writes.append(Write("rdma", "rdma.max", value))
    if resources.network is not None and (
        resources.network.class_id is not None or resources.network.priorities
    ):
        raise Invalid(
            "network classes (net_cls, net_prio) do not exist in cgroup v2;"
            " use nftables or traffic control by cgroup path"
        )
    for file, value in resources.unified.items():
        if "/" in file or "." not in file:
            raise Invalid(f"{file!r} is not the name of a cgroup file")
        writes.append(Write(file.partition(".")[0], file, value))
    return writes


def _cpu_v1(cpu: CPU) -> list[Write]:
    writes: list[Write] = []

    def put(controller: str, file: str, value: int | str | None, what: str = "") -> None:
        if value is not None and value != "":
            writes.append(Write(controller, file, str(value), what))

    put("cpu", "cpu.shares", cpu.shares or None, "--cpu-shares")
    # A burst must fit the quota: the smaller of the two goes first whichever way they change.
    if cpu.quota is not None and cpu.quota <= 0 and cpu.burst is None:
        put("cpu", "cpu.cfs_quota_us", -1, "--cpu-quota")
        put("cpu", "cpu.cfs_period_us", cpu.period or None, "--cpu-period")
    else:
        put("cpu", "cpu.cfs_period_us", cpu.period or None, "--cpu-period")
        put("cpu", "cpu.cfs_quota_us", _quota_v1(cpu.quota), "--cpu-quota")
    put("cpu", "cpu.cfs_burst_us", cpu.burst)
    put("cpu", "cpu.rt_period_us", cpu.realtime_period or None, "--cpu-rt-period")
    put("cpu", "cpu.rt_runtime_us", cpu.realtime_runtime or None, "--cpu-rt-runtime")
    put("cpu", "cpu.idle", cpu.idle)
    put("cpuset", "cpuset.cpus", cpu.cpus, "--cpuset-cpus")
    put("cpuset", "cpuset.mems", cpu.mems, "--cpuset-mems")
    return writes


def _quota_v1(quota: int | None) -> int | None:
    if quota is None:
        return None
    return quota if quota > 0 else -1


def _cpu_v2(cpu: CPU) -> list[Write]:
    writes: list[Write] = []
    if cpu.idle is not None:
        writes.append(Write("cpu", "cpu.idle", str(cpu.idle)))
    # The kernel refuses a weight while cpu.idle is 1.
    if cpu.shares and not cpu.idle:
        weight = str(shares_to_weight(cpu.shares))
        writes.append(Write("cpu", "cpu.weight", weight, "--cpu-shares"))
    if cpu.quota is not None or cpu.period:
        quota = "max" if cpu.quota is None or cpu.quota <= 0 else str(cpu.quota)
        # A quota alone keeps the period that is set.
        value = f"{quota} {cpu.period}" if cpu.period else quota
        writes.append(Write("cpu", "cpu.max", value, "--cpus"))
    if cpu.burst is not None:
        writes.append(Write("cpu", "cpu.max.burst", str(cpu.burst)))
    if cpu.realtime_period or cpu.realtime_runtime:
        raise Invalid(
            "realtime limits (--cpu-rt-period, --cpu-rt-runtime) do not exist in cgroup v2"
        )
    if cpu.cpus:
        writes.append(Write("cpuset", "cpuset.cpus", cpu.cpus, "--cpuset-cpus"))
    if cpu.mems:
        writes.append(Write("cpuset", "cpuset.mems", cpu.mems, "--cpuset-mems"))
    return writes


def memory_limits_v1(memory: Memory) -> tuple[int | None, int | None]:
    """(memory, memory plus swap) in bytes, -1 for none, None for "leave it"."""
    limit = memory.limit or None
    swap = memory.swap or None
    # As runc: without a limit there is nothing for swap to be added to.
    if limit == UNLIMITED and swap is None:
        swap = UNLIMITED
    if limit is not None and swap is not None and 0 <= swap < limit:
        raise Invalid(
            "Minimum memoryswap limit should be larger than memory limit, see usage:"
            f" {swap} is below {limit} bytes"
        )
    return limit, swap


def _memory_v1(memory: Memory) -> list[Write]:
    writes: list[Write] = []

    def put(file: str, value: int | None, what: str) -> None:
        if value is not None:
            writes.append(Write("memory", file, str(value), what))

    put("memory.soft_limit_in_bytes", memory.reservation or None, "--memory-reservation")
    put("memory.kmem.tcp.limit_in_bytes", memory.kernel_tcp or None, "kernelTCP")
    if memory.disable_oom_killer is not None:
        put("memory.oom_control", int(memory.disable_oom_killer), "--oom-kill-disable")
    if memory.swappiness is not None:
        if memory.swappiness > 100:
            raise Invalid(
                f"invalid value: {memory.swappiness}, valid memory swappiness range is 0-100"
            )
        put("memory.swappiness", memory.swappiness, "--memory-swappiness")
    return writes


def _memory_v2(memory: Memory) -> list[Write]:
    writes: list[Write] = []
    limit, swap = memory.limit or None, memory.swap or None
    if limit == UNLIMITED and swap is None:
        swap = UNLIMITED
    if memory.reservation:
        reservation = _limit(memory.reservation)
        writes.append(Write("memory", "memory.low", reservation, "--memory-reservation"))
    if swap is not None:
        value = swap_to_v2(swap, limit)
        if value is not None:
            writes.append(Write("memory", "memory.swap.max", _limit(value), "--memory-swap"))
    if limit is not None:
        writes.append(Write("memory", "memory.max", _limit(limit), "--memory"))
    # Without a file to write to: swappiness, kernel memory and the killer's switch are v1's alone.
    if memory.disable_oom_killer:
        raise Invalid("the OOM killer cannot be switched off (--oom-kill-disable) in cgroup v2")
    return writes


def _pids(limit: int) -> Write:
    return Write("pids", "pids.max", str(limit) if limit > 0 else "max", "--pids-limit")


def _block_io_v1(block_io: BlockIO) -> list[Write]:
    writes: list[Write] = []

    def put(files: tuple[str, ...], value: str, what: str) -> None:
        others = tuple((file, value) for file in files[1:])
        writes.append(Write("blkio", files[0], value, what, others))

    if block_io.weight:
        put(("blkio.weight", "blkio.bfq.weight"), str(block_io.weight), "--blkio-weight")
    if block_io.leaf_weight:
        put(("blkio.leaf_weight",), str(block_io.leaf_weight), "blkio leaf weight")
    for device in block_io.weight_device:
        where = f"{device.major}:{device.minor}"
        if device.weight:
            put(
                ("blkio.weight_device", "blkio.bfq.weight_device"),
                f"{where} {device.weight}",
                "--blkio-weight-device",
            )
        if device.leaf_weight:
            put(("blkio.leaf_weight_device",), f"{where} {device.leaf_weight}", "leaf weight")
    for file, devices, what in (
        ("read_bps", block_io.throttle_read_bps_device, "--device-read-bps"),
        ("write_bps", block_io.throttle_write_bps_device, "--device-write-bps"),
        ("read_iops", block_io.throttle_read_iops_device, "--device-read-iops"),
        ("write_iops", block_io.throttle_write_iops_device, "--device-write-iops"),
    ):
        for throttle in devices:
            value = f"{throttle.major}:{throttle.minor} {throttle.rate}"
            put((f"blkio.throttle.{file}_device",), value, what)
    return writes


def _block_io_v2(block_io: BlockIO) -> list[Write]:
    writes: list[Write] = []
    # io.bfq.weight is the scheduler's and io.weight iocost's: whichever exists.
    if block_io.weight:
        other = ("io.weight", str(blkio_to_io_weight(block_io.weight)))
        value = str(block_io.weight)
        writes.append(Write("io", "io.bfq.weight", value, "--blkio-weight", (other,)))
    for device in block_io.weight_device:
        if device.weight:
            where = f"{device.major}:{device.minor}"
            other = ("io.weight", f"{where} {blkio_to_io_weight(device.weight)}")
            value = f"{where} {device.weight}"
            writes.append(Write("io", "io.bfq.weight", value, "--blkio-weight-device", (other,)))
    for key, devices, what in (
        ("rbps", block_io.throttle_read_bps_device, "--device-read-bps"),
        ("wbps", block_io.throttle_write_bps_device, "--device-write-bps"),
        ("riops", block_io.throttle_read_iops_device, "--device-read-iops"),
        ("wiops", block_io.throttle_write_iops_device, "--device-write-iops"),
    ):
        for throttle in devices:
            rate = throttle.rate or "max"
            value = f"{throttle.major}:{throttle.minor} {key}={rate}"
            writes.append(Write("io", "io.max", value, what))
    return writes


def _hugepages(limits: list[HugepageLimit], suffix: str) -> list[Write]:
    writes: list[Write] = []
    for limit in limits:
        value = str(limit.limit)
        prefix = f"hugetlb.{limit.page_size}"
        writes.append(Write("hugetlb", f"{prefix}.{suffix}", value, "hugepage limit"))
        # Reservations have files of their own since 5.7.
        writes.append(Write("hugetlb", f"{prefix}.rsvd.{suffix}", value, optional=True))
    return writes


def _network(network: NetworkResources) -> list[Write]:
    writes: list[Write] = []
    if network.class_id is not None:
        value = str(network.class_id)
        writes.append(Write("net_cls", "net_cls.classid", value, "network class"))
    for entry in network.priorities:
        value = f"{entry.name} {entry.priority}"
        writes.append(Write("net_prio", "net_prio.ifpriomap", value, "network priority"))
    return writes


def _rdma(device: str, handles: int | None, objects: int | None) -> str:
    parts = [device]
    if handles is not None:
        parts.append(f"hca_handle={handles}")
    if objects is not None:
        parts.append(f"hca_object={objects}")
    return " ".join(parts)
