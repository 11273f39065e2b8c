"""OCI resources → control group files, device rules → their meaning; pure."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation.cgroups import convert, device_rules, manager, oom
from bulkhead.isolation.cgroups.group import check_path
from bulkhead.isolation.cgroups.v1 import HierarchyV1
from bulkhead.linux import mountinfo
from bulkhead.oci.runtime import (
    CPU,
    BlockIO,
    DeviceCgroup,
    HugepageLimit,
    Memory,
    NetworkResources,
    Pids,
    Resources,
    ThrottleDevice,
    WeightDevice,
)


def written(writes: list[convert.Write]) -> dict[str, str]:
    return {write.file: write.value for write in writes if not write.optional}


def test_shares_to_weight_as_runc() -> None:
    known = {0: 0, 1: 1, 2: 1, 1024: 100, 262144: 10000, 10**6: 10000}
    for shares, weight in known.items():
        assert convert.shares_to_weight(shares) == weight
    weights = [convert.shares_to_weight(shares) for shares in range(2, 262145, 97)]
    assert weights == sorted(weights)
    assert all(1 <= weight <= 10000 for weight in weights)


def test_blkio_weight() -> None:
    assert [convert.blkio_to_io_weight(w) for w in (0, 10, 1000)] == [0, 1, 10000]


def test_version_1() -> None:
    resources = Resources(
        cpu=CPU(shares=512, quota=50000, period=100000, burst=1000, cpus="0-1", mems="0", idle=0),
        memory=Memory(limit=1 << 26, reservation=1 << 25, swappiness=10, disable_oom_killer=True),
        pids=Pids(limit=50),
        block_io=BlockIO(
            weight=300,
            weight_device=[WeightDevice(major=8, minor=0, weight=200)],
            throttle_read_bps_device=[ThrottleDevice(major=8, minor=0, rate=1000)],
            throttle_write_iops_device=[ThrottleDevice(major=8, minor=16, rate=9)],
        ),
        hugepage_limits=[HugepageLimit(page_size="2MB", limit=4 << 20)],
        network=NetworkResources(class_id=0x10001),
    )
    writes = convert.plan_v1(resources)
    assert written(writes) == {
        "cpu.shares": "512",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "cpu.cfs_burst_us": "1000",
        "cpu.idle": "0",
        "cpuset.cpus": "0-1",
        "cpuset.mems": "0",
        "memory.soft_limit_in_bytes": str(1 << 25),
        "memory.oom_control": "1",
        "memory.swappiness": "10",
        "pids.max": "50",
        "blkio.weight": "300",
        "blkio.weight_device": "8:0 200",
        "blkio.throttle.read_bps_device": "8:0 1000",
        "blkio.throttle.write_iops_device": "8:16 9",
        "hugetlb.2MB.limit_in_bytes": str(4 << 20),
        "net_cls.classid": str(0x10001),
    }
    weight = next(write for write in writes if write.file == "blkio.weight")
    assert weight.otherwise == (("blkio.bfq.weight", "300"),)
    files = [write.file for write in writes]
    assert files.index("cpu.cfs_period_us") < files.index("cpu.cfs_quota_us")


def test_version_2() -> None:
    resources = Resources(
        cpu=CPU(shares=1024, quota=50000, period=100000, burst=1000, cpus="0", mems="0"),
        memory=Memory(limit=1 << 26, reservation=1 << 25, swap=3 << 26),
        pids=Pids(limit=-1),
        block_io=BlockIO(
            weight=1000,
            throttle_read_bps_device=[ThrottleDevice(major=8, minor=0, rate=1000)],
            throttle_write_iops_device=[ThrottleDevice(major=8, minor=16, rate=0)],
        ),
        hugepage_limits=[HugepageLimit(page_size="2MB", limit=4 << 20)],
        unified={"memory.high": "1000"},
    )
    writes = convert.plan_v2(resources)
    assert [(w.file, w.value) for w in writes if not w.optional] == [
        ("cpu.weight", "100"),
        ("cpu.max", "50000 100000"),
        ("cpu.max.burst", "1000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("memory.low", str(1 << 25)),
        ("memory.swap.max", str(2 << 26)),
        ("memory.max", str(1 << 26)),
        ("pids.max", "max"),
        ("io.bfq.weight", "1000"),
        ("io.max", "8:0 rbps=1000"),
        ("io.max", "8:16 wiops=max"),
        ("hugetlb.2MB.max", str(4 << 20)),
        ("memory.high", "1000"),
    ]
    weight = next(w for w in writes if w.file == "io.bfq.weight")
    assert weight.otherwise == (("io.weight", "10000"),)


def test_cpu_max_forms() -> None:
    def cpu_max(**cpu: int) -> str:
        return written(convert.plan_v2(Resources(cpu=CPU(**cpu))))["cpu.max"]  # type: ignore[arg-type]

    assert cpu_max(quota=1000) == "1000"
    assert cpu_max(quota=-1, period=1000) == "max 1000"
    assert cpu_max(period=1000) == "max 1000"
    assert "cpu.weight" not in written(convert.plan_v2(Resources(cpu=CPU(shares=9, idle=1))))


def test_swap() -> None:
    assert convert.swap_to_v2(-1, 100) == -1
    assert convert.swap_to_v2(0, 100) is None
    assert convert.swap_to_v2(100, 100) == 0
    assert convert.swap_to_v2(300, 100) == 200
    for swap, memory in ((50, 100), (50, None), (50, -1)):
        with pytest.raises(Invalid):
            convert.swap_to_v2(swap, memory)
    assert convert.memory_limits_v1(Memory(limit=-1)) == (-1, -1)
    assert convert.memory_limits_v1(Memory(limit=5, swap=-1)) == (5, -1)
    with pytest.raises(Invalid, match="Minimum memoryswap"):
        convert.memory_limits_v1(Memory(limit=5, swap=4))


@pytest.mark.parametrize(
    ("version", "resources", "message"),
    [
        (1, Resources(unified={"memory.high": "1"}), "this host runs cgroup v1"),
        (1, Resources(memory=Memory(swappiness=101)), "valid memory swappiness range is 0-100"),
        (2, Resources(unified={"../x.y": "1"}), "is not the name of a cgroup file"),
        (2, Resources(memory=Memory(disable_oom_killer=True)), "cannot be switched off"),
        (2, Resources(network=NetworkResources(class_id=1)), "do not exist in cgroup v2"),
        (2, Resources(cpu=CPU(realtime_runtime=1)), "do not exist in cgroup v2"),
    ],
)
def test_what_a_version_cannot_do(version: int, resources: Resources, message: str) -> None:
    plan = convert.plan_v1 if version == 1 else convert.plan_v2
    with pytest.raises(Invalid, match=message):
        plan(resources)


def test_paths() -> None:
    assert check_path("//a//b/") == "/a/b"
    for bad in ("", "/", "a/b", "/a/../b", "/a/./b", "/a\0b"):
        with pytest.raises(Invalid):
            check_path(bad)


V1_MOUNTS = """\
30 20 0:30 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:33 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 30 0:34 / /sys/fs/cgroup/perf_event rw - cgroup cgroup rw,perf_event
35 30 0:35 / /sys/fs/cgroup/net_cls rw - cgroup cgroup rw,net_cls
36 30 0:36 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
37 20 0:32 / /other/memory rw - cgroup cgroup rw,memory
"""


def test_finding_the_hierarchies() -> None:
    found = manager.find(mountinfo.parse(V1_MOUNTS))
    assert isinstance(found, HierarchyV1)
    assert [mount.target for mount in found.mounts] == [
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/cpu,cpuacct",
    ]
    assert [mount.target for mount in found.extra] == ["/sys/fs/cgroup/net_cls"]
    assert found.missing("memory") == ""
    assert found.missing("pids")
    with pytest.raises(Unsupported, match="mount -t cgroup2"):
        manager.find([])


def rules(*lines: str) -> list[DeviceCgroup]:
    """ "+c 1:3 rwm" as a rule."""
    parsed = []
    for line in lines:
        kind, numbers, *access = line[1:].split()
        major, minor = (None if n == "*" else int(n) for n in numbers.split(":"))
        parsed.append(
            DeviceCgroup(
                allow=line[0] == "+",
                type_=kind,
                major=major,
                minor=minor,
                access=access[0] if access else "",
            )
        )
    return parsed


def test_device_rules_mean_what_the_kernel_makes_of_them() -> None:
    state = device_rules.reduce(
        rules("-a *:* rwm", "+c 1:3 rwm", "+c 5:* r", "+c 5:* w", "+b *:* m", "-c 1:3 w")
    )
    assert not state.allow
    assert state.lines() == ["c 1:3 rm", "c 5:* rw", "b *:* m"]
    assert state.permits("c", 1, 3, "r")
    assert not state.permits("c", 1, 3, "rw")
    assert state.permits("c", 5, 9, "rw")
    assert not state.permits("c", 5, 9, "m")
    assert state.permits("b", 8, 0, "m")
    assert not state.permits("b", 8, 0, "r")
    everything = device_rules.reduce(rules("-a *:* rwm", "+c 1:3 r", "+a *:* rwm", "-b 8:0 w"))
    assert everything.allow
    assert everything.permits("c", 1, 3, "rwm")
    assert not everything.permits("b", 8, 0, "rw")
    assert everything.permits("b", 8, 0, "r")
    both = device_rules.reduce(rules("-a *:* rwm", "+a 7:1 r"))
    assert both.permits("b", 7, 1, "r")
    assert both.permits("c", 7, 1, "r")
    for bad in (DeviceCgroup(allow=True, type_="x"), DeviceCgroup(allow=True, access="rx")):
        with pytest.raises(Invalid):
            device_rules.reduce([bad])


keys = st.tuples(
    st.sampled_from(["b", "c"]), st.sampled_from([-1, 1, 5]), st.sampled_from([-1, 0, 3])
)
states = st.builds(
    device_rules.DeviceState,
    allow=st.booleans(),
    exceptions=st.dictionaries(keys, st.integers(1, 7), max_size=5),
)


@given(states, states)
def test_transitions_lead_there(
    now: device_rules.DeviceState, then: device_rules.DeviceState
) -> None:
    reached = device_rules.DeviceState(now.allow, dict(now.exceptions))
    for file, line in device_rules.transition(now, then):
        allow = file == "devices.allow"
        if line == "a":
            reached = device_rules.DeviceState(allow)
            continue
        kind, numbers, letters = line.split()
        major, minor = (-1 if n == "*" else int(n) for n in numbers.split(":"))
        bits = device_rules.access_bits(letters)
        key = (kind, major, minor)
        if allow != reached.allow:
            reached.exceptions[key] = reached.exceptions.get(key, 0) | bits
        else:
            left = reached.exceptions.get(key, 0) & ~bits
            reached.exceptions.pop(key, None)
            if left:
                reached.exceptions[key] = left
    assert (reached.allow, reached.exceptions) == (then.allow, then.exceptions)


def run_device_program(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """An interpreter of the few eBPF instructions the device program uses."""
    code = [
        (program[i], program[i + 1], int.from_bytes(program[i + 2 : i + 4], "little", signed=True),
         int.from_bytes(program[i + 4 : i + 8], "little"))
        for i in range(0, len(program), 8)
    ]  # fmt: skip
    context = {0: access << 16 | kind, 4: major, 8: minor}
    registers = [0] * 11
    at = 0
    while True:
        operation, both, offset, value = code[at]
        at += 1
        destination, source = both & 15, both >> 4
        if operation == 0x61:
            registers[destination] = context[offset]
        elif operation == 0xBC:
            registers[destination] = registers[source]
        elif operation == 0xB4:
            registers[destination] = value
        elif operation == 0x54:
            registers[destination] &= value
        elif operation == 0x74:
            registers[destination] >>= value
        elif operation == 0x16:
            at += offset if registers[destination] == value else 0
        elif operation == 0x56:
            at += offset if registers[destination] != value else 0
        else:
            assert operation == 0x95
            return registers[0]


@given(states)
def test_device_program_decides_as_the_rules(state: device_rules.DeviceState) -> None:
    program = device_rules.program(state)
    for kind, access, major, minor in itertools.product("bc", range(1, 8), (1, 5, 9), (0, 3)):
        letters = "".join(c for c, bit in (("m", 1), ("r", 2), ("w", 4)) if access & bit)
        found = run_device_program(program, "_bc".index(kind), access, major, minor)
        assert bool(found) == state.permits(kind, major, minor, letters)


def test_device_list() -> None:
    assert device_rules.parse_list("a *:* rwm") == device_rules.DeviceState()
    state = device_rules.parse_list("c 1:3 rw\nb *:* m\n")
    assert state == device_rules.DeviceState(False, {("c", 1, 3): 6, ("b", -1, -1): 1})


LOG = [
    "other: nothing",
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=abc,mems_allowed=0,"
    "oom_memcg=/bulkhead/abc,task_memcg=/bulkhead/abc,task=eater, v=1,pid=42,uid=0",
    "Memory cgroup out of memory: Killed process 42 (eater, v=1) total-vm:70000kB,"
    " anon-rss:65536kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:0kB oom_score_adj:0",
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=x,mems_allowed=0,"
    "oom_memcg=/bulkhead/abcd,task_memcg=/bulkhead/abcd,task=other,pid=43,uid=0",
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=x,mems_allowed=0,global_oom,"
    "task_memcg=/bulkhead/whole/inner,task=victim,pid=44,uid=0",
]


def test_kills_for_want_of_memory_are_explained() -> None:
    report = oom.search(LOG, "/bulkhead/abc")
    assert report == oom.Report(42, "eater, v=1", "/bulkhead/abc", "/bulkhead/abc", 64 << 20)
    assert oom.explain(report, 64 << 20, "/bulkhead/abc") == (
        "out of memory: the kernel killed eater, v=1 (pid 42, holding 64 MiB):"
        " the memory limit is 64 MiB (--memory)"
    )
    whole = oom.search(LOG, "/bulkhead/whole")
    assert whole is not None
    assert oom.explain(whole, None, "/bulkhead/whole").endswith(
        "the whole machine had no memory left"
    )
    assert oom.search(LOG, "/bulkhead/none") is None
    assert "a process: the memory limit is 1.5 GiB" in oom.explain(None, 3 << 29, "/x")
