"""What is reserved is never sold twice, and is there when a neighbour is noisy."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bulkhead.engine import shares
from bulkhead.errors import Conflict, Unsupported
from bulkhead.isolation.cgroups import manager as cgroups
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig, Rpc
from tests.helpers.residue import residue
from tests.helpers.waiting import until
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")

CPU = 10**9
GIB = 1 << 30
LOOPS = "while :; do :; done & while :; do :; done"
COUNT = len(os.sched_getaffinity(0))
SELLABLE = shares.cpu_sellable(COUNT)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


@pytest.fixture
def rig(installation: Rig) -> Iterator[Rig]:
    yield installation
    for found in installation.call("workload.list", all=True):
        installation.call("workload.remove", id=found["Id"], force=True)


def create(rig: Rig, name: str = "", script: str = "sleep 1000", **host: Any) -> str:
    body = {"Image": IMAGE, "Cmd": ["sh", "-c", script], "HostConfig": host}
    identity: str = rig.call("workload.create", name=name, body=body)["Id"]
    return identity


def free(rig: Rig, what: str = "Cpus") -> int:
    number: int = rig.call("system.reservations")[what]["Free"]
    return number


_FILES = {
    "cpus": ("cpuset.cpus.effective", "cpuset.cpus"),
    "weight": ("cpu.shares", "cpu.weight"),
    "memory": ("memory.min", "memory.soft_limit_in_bytes"),
}


def setting(rig: Rig, name: str, what: str) -> str:
    """What the kernel says of a workload's processors, weight or memory."""
    found = rig.call("workload.explain", id=name)["ControlGroups"]["Files"]
    return str(next(found[file] for file in _FILES[what] if file in found))


def test_refusals_say_what_is_free_and_who_holds_the_rest(rig: Rig) -> None:
    create(rig, "first", ReserveCpus=SELLABLE - CPU // 2, ReserveMemory=64 << 20)
    with pytest.raises(Conflict, match=r"cannot reserve 0\.75 CPUs: 0\.5 are free .* by first"):
        create(rig, "second", ReserveCpus=CPU * 3 // 4)
    with pytest.raises(Conflict, match=r"of memory: .* are free .* by first"):
        create(rig, "second", ReserveMemory=1 << 60)
    create(rig, "second", ReserveCpus=CPU // 2)
    assert free(rig) == 0
    shown = rig.call("workload.inspect", id="second")["HostConfig"]
    assert shown["ReserveCpus"] == CPU // 2 and "ReserveMemory" not in shown


def test_a_refused_creation_leaves_nothing(rig: Rig) -> None:
    before = rig.call("system.reservations")
    with pytest.raises(Conflict):
        create(rig, "one", ReserveCpus=SELLABLE + CPU)
    assert rig.call("system.reservations") == before
    assert rig.call("workload.list", all=True) == []
    create(rig, "one")


def test_creations_at_the_same_time_share_what_there_is(rig: Rig) -> None:
    part = SELLABLE // 5
    outcomes: list[bool] = []

    def attempt() -> None:
        body = {"Image": IMAGE, "Cmd": ["true"], "HostConfig": {"ReserveCpus": part}}
        with Rpc(rig.socket) as rpc:
            try:
                rpc.call("workload.create", body=body)
            except Conflict:
                outcomes.append(False)
            else:
                outcomes.append(True)

    threads = [threading.Thread(target=attempt) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes.count(True), outcomes.count(False)) == (5, 7)
    assert 0 <= free(rig) < part


def test_it_is_held_over_stops_and_restarts_and_given_back_by_a_removal(rig: Rig) -> None:
    create(rig, "held", ReserveCpus=SELLABLE)
    rig.call("workload.start", id="held")
    for verb, more in (("restart", {"timeout_s": 0}), ("kill", {})):
        rig.call(f"workload.{verb}", id="held", **more)
        with pytest.raises(Conflict):
            create(rig, ReserveCpus=CPU // 10)
    rig.call("workload.remove", id="held", force=True)
    create(rig, "other", ReserveCpus=SELLABLE)


def test_a_killed_engine_remembers(rig: Rig) -> None:
    create(rig, "asleep", ReserveMemory=GIB)
    create(rig, "awake", ReserveCpus=SELLABLE - CPU // 4)
    rig.call("workload.start", id="awake")
    before, weight = rig.call("system.reservations"), setting(rig, "awake", "weight")
    rig.kill()
    rig.start()
    assert rig.call("system.reservations") == before
    assert setting(rig, "awake", "weight") == weight
    with pytest.raises(Conflict):
        create(rig, ReserveCpus=CPU // 2)


def test_an_update_is_admitted_like_a_creation(rig: Rig) -> None:
    create(rig, "one", ReserveCpus=SELLABLE // 2)
    rigs.start(rig, "two", "sleep 1000")
    before = setting(rig, "two", "weight")
    with pytest.raises(Conflict):
        rig.call("workload.update", id="two", body={"ReserveCpus": SELLABLE // 2 + CPU // 10})
    assert setting(rig, "two", "weight") == before
    rig.call("workload.update", id="two", body={"ReserveCpus": SELLABLE // 2})
    assert int(setting(rig, "two", "weight")) > int(before)
    assert free(rig) < CPU // 100


@pytest.mark.skipif(COUNT < 2, reason="needs two processors")
def test_whole_processors_are_ones_own(rig: Rig) -> None:
    rigs.start(rig, "before", "sleep 1000")
    everything = setting(rig, "before", "cpus")
    create(rig, "owner", ReserveCpus=CPU)
    assert setting(rig, "before", "cpus") == everything  # while it does not run
    rig.call("workload.start", id="owner")
    rigs.start(rig, "after", "sleep 1000")
    own = setting(rig, "owner", "cpus")
    assert own == rig.call("system.reservations")["Cpus"]["Pinned"]
    assert own.isdecimal()
    for other in ("before", "after"):
        assert setting(rig, other, "cpus") == rig.call("system.reservations")["Cpus"]["Shared"]
    with pytest.raises(Conflict, match="these processors are reserved by others"):
        create(rig, CpusetCpus=own)
    rig.call("workload.remove", id="owner", force=True)
    until(lambda: setting(rig, "before", "cpus") == everything, "the others have it back")


def test_the_disk_is_shared_by_a_scheduler_that_can(rig: Rig) -> None:
    io = rig.call("system.reservations")["Io"]
    if not io["Remedy"]:
        create(rig, "first", ReserveIo=60)
        with pytest.raises(Conflict, match="30% are free"):
            create(rig, ReserveIo=40)
        return
    with pytest.raises(Unsupported, match="does not share by weight"):
        create(rig, ReserveIo=30)


def _usage(rig: Rig, name: str) -> int:
    items, _ = rig.rpc.stream("workload.stats", {"id": name, "stream": False, "one_shot": True})
    number: int = items[-1]["cpu_stats"]["cpu_usage"]["total_usage"]
    return number


def _part(rig: Rig, name: str, others: list[str], seconds: float) -> float:
    """Its part of the processor time that all of them take in `seconds` of such time."""
    before = {one: _usage(rig, one) for one in (name, *others)}

    def used() -> dict[str, int]:
        return {one: _usage(rig, one) - before[one] for one in before}

    until(lambda: sum(used().values()) > seconds * 1e9, "they have run")
    found = used()
    return found[name] / sum(found.values())


def test_a_noisy_neighbour_leaves_what_is_reserved(rig: Rig) -> None:
    """Three quarters reserved, eight busy loops beside two: at least 0.9 of what was promised."""
    wanted = COUNT * 3 / 4
    noise = [f"noisy{number}" for number in range(4)]
    for name in noise:
        rigs.start(rig, name, LOOPS)
    loops = " & ".join(["while :; do :; done"] * COUNT)
    create(rig, "quiet", loops, ReserveCpus=int(wanted * CPU))
    rig.call("workload.start", id="quiet")
    assert _part(rig, "quiet", noise, 4.0) >= 0.9 * wanted / COUNT


def test_memory_that_is_reserved_is_reclaimed_last(rig: Rig) -> None:
    """What the kernel was told, by version: a minimum (v2), or limits others exceed first (v1)."""
    rigs.start(rig, "other", "sleep 1000")
    create(rig, "one", ReserveMemory=64 << 20)
    rig.call("workload.start", id="one")
    second = cgroups.detect().version == 2
    assert int(setting(rig, "one", "memory")) == 64 << 20
    assert int(setting(rig, "other", "memory")) < 64 << 20
    rig.call("workload.remove", id="one", force=True)
    unlimited = 1 << 60
    until(
        lambda: second or int(setting(rig, "other", "memory")) > unlimited,
        "the other's is as it was",
    )
