"""Control groups for real, on whichever version this kernel runs (the guests run these too)."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.errors import BulkheadError, Conflict, Invalid, NotFound, Unsupported
from bulkhead.isolation.cgroups import device_rules, manager
from bulkhead.isolation.cgroups.group import Group
from bulkhead.isolation.cgroups.v2 import HierarchyV2
from bulkhead.linux import mountinfo
from bulkhead.oci.runtime import (
    CPU,
    BlockIO,
    DeviceCgroup,
    HugepageLimit,
    Memory,
    Pids,
    Resources,
    ThrottleDevice,
)
from tests.helpers.waiting import until

MIB = 1 << 20


def usable() -> str:
    """Why control groups cannot be made here; "" if they can: found out by making one."""
    path = f"/bulkhead-probe-{uuid.uuid4().hex[:8]}"
    try:
        hierarchy = manager.detect()
        hierarchy.create(f"{path}/probe").delete()
        hierarchy.remove_parent(path)
    except (BulkheadError, OSError) as error:
        return str(error)
    return ""


REASON = usable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no control groups can be made: {REASON}")


def leftovers(parent: str) -> list[str]:
    hierarchy = manager.detect()
    if isinstance(hierarchy, HierarchyV2):
        places = [f"{hierarchy.mount}{parent}"]
    else:
        places = [f"{mount.target}{parent}" for mount in (*hierarchy.mounts, *hierarchy.extra)]
    return [place for place in places if os.path.exists(place)]


@pytest.fixture
def parent() -> Iterator[str]:
    """A parent group of the test's own, which must be empty at its end."""
    path = f"/bulkhead-test-{uuid.uuid4().hex[:8]}"
    yield path
    until(lambda: manager.detect().remove_parent(path), f"{path} is empty")
    assert leftovers(path) == []


@contextlib.contextmanager
def group(parent: str, resources: Resources | None = None) -> Iterator[Group]:
    made = manager.detect().create(f"{parent}/{uuid.uuid4().hex[:8]}", resources)
    try:
        yield made
    finally:
        made.kill()
        made.delete()
        assert not made.exists()


@contextlib.contextmanager
def inside(made: Group, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that joined the group before it became `command`; killed at the end."""
    fds = made.join_fds()
    moves = "".join(f"echo 0 >/proc/self/fd/{fd.fileno()} || exit 99;" for fd in fds)
    process = subprocess.Popen(
        ["sh", "-c", f'{moves} echo ready >&2; exec "$@"', "sh", *command],
        pass_fds=[fd.fileno() for fd in fds],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for fd in fds:
        fd.close()
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, (out + err).decode(errors="replace")


def has(controller: str) -> bool:
    hierarchy = manager.detect()
    return controller in hierarchy.controllers and not hierarchy.missing(controller)


def needs(controller: str) -> None:
    if not has(controller):
        reason = manager.detect().missing(controller)
        pytest.skip(f"this kernel's {controller} controller is not usable: {reason}")


def test_processes_are_in_it_and_it_goes_when_they_have_gone(parent: str) -> None:
    with group(parent) as made:
        assert made.pids() == []
        with inside(made, "cat") as process:
            assert made.pids() == [process.pid]
            text = Path(f"/proc/{process.pid}/cgroup").read_text()
            assert made.path in text
            assert not made.try_delete()
            with pytest.raises(Conflict, match=str(process.pid)):
                made.delete(timeout_s=0.05)
            assert manager.detect().open(made.path).pids() == [process.pid]
        until(made.try_delete, "the group can be removed")
        assert not made.exists()
        assert made.pids() == []


def test_what_is_in_use_is_not_replaced_and_leftovers_are(parent: str) -> None:
    hierarchy = manager.detect()
    with group(parent) as made:
        with inside(made, "cat"), pytest.raises(Conflict, match="in use"):
            hierarchy.create(made.path)
        until(lambda: not made.pids(), "the process is gone")
        until(made.try_delete, "the group can be removed")
        for folder in made.folders():
            os.makedirs(f"{folder}/left/over")
        again = hierarchy.create(made.path)
        assert not any(os.path.exists(f"{folder}/left") for folder in again.folders())


def test_nothing_is_left_when_a_limit_is_refused(parent: str) -> None:
    needs("pids")
    resources = Resources(pids=Pids(limit=1 << 60))
    path = f"{parent}/refused"
    with pytest.raises(Invalid, match=r"pids\.max"):
        manager.detect().create(path, resources)
    assert leftovers(path) == []


def test_limits_stand_in_the_kernels_files(parent: str) -> None:
    needs("pids")
    needs("memory")
    resources = Resources(
        pids=Pids(limit=50),
        memory=Memory(limit=64 * MIB, swap=64 * MIB),
        cpu=CPU(shares=512, quota=50000, period=100000),
    )
    with group(parent, resources) as made:
        found = made.files()
        assert found["pids.max"] == "50"
        assert made.memory_limit() == 64 * MIB
        if manager.detect().version == 1:
            assert found["cpu.shares"] == "512"
            assert found["cpu.cfs_quota_us"] == "50000"
            assert found["memory.limit_in_bytes"] == str(64 * MIB)
        else:
            assert found["cpu.max"] == "50000 100000"
            assert found["memory.max"] == str(64 * MIB)
            assert found["cpu.weight"] == "59"
        stats = made.stats()
        assert stats["memory_stats"]["limit"] == 64 * MIB
        assert stats["pids_stats"] == {"current": 0, "limit": 50}
        made.apply(Resources(pids=Pids(limit=-1), memory=Memory(limit=-1)))
        assert made.files()["pids.max"] == "max"
        assert made.memory_limit() is None
        assert made.stats()["memory_stats"]["limit"] > 64 * MIB


def test_memory_limits_change_in_any_direction(parent: str) -> None:
    needs("memory")
    sizes = [(64, 64), (32, 32), (256, 512), (16, 16), (128, -1), (64, 64)]
    with group(parent) as made:
        for memory, swap in sizes:
            total = swap * MIB if swap > 0 else -1
            made.apply(Resources(memory=Memory(limit=memory * MIB, swap=total)))
            assert made.memory_limit() == memory * MIB


def test_number_of_processes_is_limited(parent: str) -> None:
    needs("pids")
    script = """
import os, sys
made = 0
try:
    while made < 100:
        pid = os.fork()
        if pid == 0:
            os.read(0, 1)
            os._exit(0)
        made += 1
except BlockingIOError:
    pass
print(made)
"""
    with (
        group(parent, Resources(pids=Pids(limit=10))) as made,
        inside(made, sys.executable, "-c", script) as process,
    ):
        code, text = finish(process)
        assert (code, text.strip()) == (0, "9")


EATER = "x = b'x' * (256 << 20); print(len(x))"


def test_a_kill_for_want_of_memory_is_counted_and_explained(parent: str) -> None:
    needs("memory")
    limits = Memory(limit=48 * MIB, swap=48 * MIB)
    with group(parent, Resources(memory=limits)) as made:
        assert made.oom_kills() == 0
        assert made.explain_oom() == ""
        with inside(made, sys.executable, "-c", EATER) as process:
            code, _ = finish(process)
        assert code == -signal.SIGKILL
        assert made.oom_kills() == 1
        told = made.explain_oom()
        assert "the memory limit is 48 MiB" in told
        report = made.oom()
        if report is not None:  # the kernel's log can be read here
            assert report.pid == process.pid
            assert report.limited.endswith(made.path)
            assert f"pid {process.pid}" in told


def test_processor_time_is_limited_and_counted(parent: str) -> None:
    needs("cpu")
    limits = Resources(cpu=CPU(quota=2000, period=20000))
    with (
        group(parent, limits) as made,
        inside(made, "sh", "-c", "while :; do :; done"),
    ):

        def throttled() -> bool:
            cpu = made.stats()["cpu_stats"]
            data = cpu["throttling_data"]
            return bool(data["throttled_periods"] > 5 and data["throttled_time"] > 0)

        until(throttled, "the loop is throttled")
        cpu = made.stats()["cpu_stats"]
        assert cpu["cpu_usage"]["total_usage"] > 0
        assert cpu["system_cpu_usage"] > cpu["cpu_usage"]["total_usage"]

        def held() -> bool:
            # A tenth of one processor: each period 2 ms, plus a slice of 5 ms on each processor.
            # What is overdrawn (a late tick, a stolen processor) the kernel takes back later.
            cpu = made.stats()["cpu_stats"]
            periods = cpu["throttling_data"]["periods"]
            allowed = (periods + 2) * 2_000_000 + 10_000_000 * cpu["online_cpus"]
            return bool(cpu["cpu_usage"]["total_usage"] <= allowed)

        until(held, "no more processor time than allowed")


def test_processors_can_be_chosen(parent: str) -> None:
    needs("cpuset")
    first = str(min(os.sched_getaffinity(0)))
    with (
        group(parent, Resources(cpu=CPU(cpus=first, mems="0"))) as made,
        inside(made, sys.executable, "-c", "import os; print(os.sched_getaffinity(0))") as process,
    ):
        assert finish(process)[1].strip() == f"{{{first}}}"
    with pytest.raises(Invalid, match="cpuset"), group(parent, Resources(cpu=CPU(cpus="8000"))):
        pass


def test_freezing_stops_and_thawing_goes_on(parent: str) -> None:
    with group(parent) as made, inside(made, "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            assert not made.frozen()
            made.freeze()
            assert made.frozen()
            process.stdin.write(b"x\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], 0.1)
            assert not ready, "a frozen process answered"
            made.thaw()
            assert process.stdout.readline() == b"x\n"


def test_killing_reaches_every_process_also_frozen_and_forking_ones(parent: str) -> None:
    forking = "while :; do sh -c 'sleep 100 & exit' & :; done 2>/dev/null"
    limits = Resources(pids=Pids(limit=60)) if has("pids") else None
    with group(parent, limits) as made:
        with inside(made, "sh", "-c", forking):
            until(lambda: len(made.pids()) > 20, "many processes run")
            made.kill()
            assert made.pids() == []
        with inside(made, "cat") as process:
            made.freeze()
            made.kill()
            assert process.wait(timeout=60) == -signal.SIGKILL
            assert made.pids() == []
            assert not made.pids()
        made.thaw()
        made.kill()


def test_groups_made_inside_are_killed_and_removed_too(parent: str) -> None:
    with group(parent) as made:
        inner = [f"{folder}/inner" for folder in made.folders()]
        for folder in inner:
            os.makedirs(f"{folder}/most")
        with inside(made, "cat") as process:
            Path(f"{inner[0]}/most/cgroup.procs").write_text(str(process.pid))
            assert made.pids() == [process.pid]
            made.kill()
            assert process.wait(timeout=60) == -signal.SIGKILL
        made.delete()
        assert not made.exists()


def rule(allow: bool, kind: str, major: int | None, minor: int | None, access: str) -> DeviceCgroup:
    return DeviceCgroup(allow=allow, type_=kind, major=major, minor=minor, access=access)


NOTHING = rule(False, "a", None, None, "rwm")
NULL = rule(True, "c", 1, 3, "rw")
ZERO = rule(True, "c", 1, 5, "r")


def test_devices_are_denied_and_allowed_also_while_running(parent: str) -> None:
    hierarchy = manager.detect()
    if hierarchy.version == 1:
        needs("devices")
    script = """
import sys
for line in sys.stdin:
    name, mode = line.split()
    try:
        open(name, mode, buffering=0).close()
        print("yes", flush=True)
    except PermissionError:
        print("no", flush=True)
"""
    with group(parent) as made, inside(made, sys.executable, "-c", script) as process:

        def ask(name: str, mode: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{name} {mode}\n".encode())
            process.stdin.flush()
            return process.stdout.readline().decode().strip()

        assert ask("/dev/zero", "rb+") == "yes"
        made.apply(Resources(devices=[NOTHING, NULL]))
        assert ask("/dev/null", "rb+") == "yes"
        assert ask("/dev/zero", "rb") == "no"
        made.apply(Resources(devices=[NOTHING, NULL, ZERO]))
        assert ask("/dev/zero", "rb") == "yes"
        assert ask("/dev/zero", "rb+") == "no"
        made.apply(Resources(devices=[NOTHING, ZERO]))
        assert ask("/dev/null", "rb") == "no"
        everything = rule(True, "a", None, None, "rwm")
        made.apply(Resources(devices=[everything]))
        assert ask("/dev/null", "rb+") == "yes"
        assert ask("/dev/zero", "rb+") == "yes"
        if hierarchy.version == 1:
            made.apply(Resources(devices=[NOTHING, NULL]))
            listed = device_rules.parse_list(made.files()["devices.list"])
            assert listed.exceptions == {("c", 1, 3): 6}


def whole_disk() -> str | None:
    for name in sorted(os.listdir("/sys/block")):
        if not name.startswith(("loop", "ram", "zram")):
            return Path(f"/sys/block/{name}/dev").read_text().strip()
    return None


def test_block_devices_are_throttled(parent: str) -> None:
    controller = "blkio" if manager.detect().version == 1 else "io"
    needs(controller)
    disk = whole_disk()
    if disk is None:
        pytest.skip("there is no block device to throttle")
    major, minor = map(int, disk.split(":"))
    throttle = ThrottleDevice(major=major, minor=minor, rate=MIB)
    limits = Resources(block_io=BlockIO(throttle_write_bps_device=[throttle]))
    with group(parent, limits) as made:
        found = made.files()
        if controller == "blkio":
            assert found["blkio.throttle.write_bps_device"] == f"{disk} {MIB}"
        else:
            assert f"{disk} " in found["io.max"]
            assert f"wbps={MIB}" in found["io.max"]
    absent = BlockIO(throttle_read_bps_device=[ThrottleDevice(major=4000, minor=1, rate=1)])
    with (
        pytest.raises(Invalid, match="--device-read-bps"),
        group(parent, Resources(block_io=absent)),
    ):
        pass


def test_a_limit_whose_controller_is_missing_is_refused_with_the_remedy(parent: str) -> None:
    limits = Resources(hugepage_limits=[HugepageLimit(page_size="2MB", limit=0)])
    if has("hugetlb") and os.path.isdir("/sys/kernel/mm/hugepages/hugepages-2048kB"):
        with group(parent, limits) as made:
            assert made.exists()
        return
    with pytest.raises(Unsupported, match="hugetlb"), group(parent, limits):
        pass
    assert leftovers(f"{parent}/x") == []


def test_two_engines_may_come_and_go_under_one_parent(parent: str) -> None:
    failures: list[BaseException] = []

    def come_and_go(name: str) -> None:
        hierarchy = manager.find(mountinfo.read())
        try:
            for turn in range(15):
                hierarchy.create(f"{parent}/{name}{turn}").delete()
                hierarchy.remove_parent(parent)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_statistics_have_dockers_shape(parent: str) -> None:
    with group(parent) as made, inside(made, "cat"):
        stats = made.stats()
        assert set(stats) == {"cpu_stats", "memory_stats", "pids_stats", "blkio_stats"}
        assert {"cpu_usage", "system_cpu_usage", "online_cpus", "throttling_data"} <= set(
            stats["cpu_stats"]
        )
        if has("memory"):
            assert {"usage", "limit", "stats"} <= set(stats["memory_stats"])
            until(lambda: made.stats()["memory_stats"]["usage"] > 0, "memory is charged")
        if has("pids"):
            assert stats["pids_stats"]["current"] == 1
        assert "io_service_bytes_recursive" in stats["blkio_stats"]


def test_a_group_that_is_gone_says_so(parent: str) -> None:
    hierarchy = manager.detect()
    gone = hierarchy.open(f"{parent}/gone")
    assert not gone.exists()
    assert gone.pids() == []
    gone.kill()
    gone.delete()
    assert gone.oom_kills() == 0
    assert not gone.frozen()
    with pytest.raises(NotFound):
        gone.join_fds()
    if has("pids"):
        with pytest.raises(NotFound):
            gone.apply(Resources(pids=Pids(limit=5)))


def test_without_permission_it_is_denied(parent: str) -> None:
    script = f"""
import os
from bulkhead.errors import Denied
from bulkhead.isolation.cgroups import manager
hierarchy = manager.detect()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    hierarchy.create({parent + "/x"!r})
except Denied as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert "not permitted" in done.stdout, done.stderr
