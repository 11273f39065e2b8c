"""The arithmetic of reservations, and the mistakes in a request."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.engine import body, reservations, shares
from bulkhead.errors import Invalid

PARTS = st.lists(st.floats(0.01, 0.6), min_size=1, max_size=3)


@given(
    PARTS,
    st.lists(st.integers(2, 262144), max_size=200),
    st.sampled_from([2, 3, 8, 64]),
    st.sampled_from([shares.CPU_V1, shares.CPU_V2]),
)
def test_weights_keep_every_reservation(
    parts: list[float], others: list[int], whole: int, scale: shares.Scale
) -> None:
    scaled = [part * whole * (1 - shares.HEADROOM) / 2 for part in parts]
    reserved = {f"r{at}": part for at, part in enumerate(scaled)}
    plain = {f"o{at}": min(weight, scale.most) for at, weight in enumerate(others)}
    if sum(scaled) > whole * (1 - shares.HEADROOM):
        return
    found = shares.weights(reserved, plain, whole, scale)
    assert found.keys() == reserved.keys() | plain.keys()
    assert all(scale.least <= weight <= scale.most for weight in found.values())
    total = sum(found.values())
    floor = scale.least * len(plain) > scale.most / 10
    for name, part in reserved.items():
        # Weights are whole numbers, and none is below the least: where that shows, it may cost.
        if not floor:
            assert found[name] / total * whole >= part * 0.98 - 0.02


def test_others_keep_their_weights_while_there_are_greater_ones() -> None:
    found = shares.weights({"r": 1.5}, {"a": 1024, "b": 2048}, 2, shares.CPU_V1)
    assert (found["a"], found["b"]) == (1024, 2048)
    assert found["r"] / sum(found.values()) >= 0.75


def test_others_are_all_made_lighter_when_there_are_none() -> None:
    others = {f"o{number}": 10000 for number in range(300)}
    found = shares.weights({"r": 1.9}, others, 2, shares.CPU_V2)
    assert found["r"] == 10000 and len(set(found.values())) == 2
    assert found["o0"] < 10000


def test_without_reservations_nothing_changes() -> None:
    assert shares.weights({}, {"a": 7}, 2, shares.CPU_V1) == {"a": 7}


def test_more_than_there_is_cannot_be_weighed() -> None:
    with pytest.raises(ValueError, match="more is reserved"):
        shares.weights({"r": 2.0}, {}, 2, shares.CPU_V1)


def test_processors_of_ones_own_leave_one_to_the_others() -> None:
    assert shares.own_processors(1, range(2), []) == [1]
    assert shares.own_processors(2, range(2), []) == []
    assert shares.own_processors(1, range(2), [1]) == []
    assert shares.own_processors(2, range(8), [7]) == [5, 6]


def test_lists_of_processors() -> None:
    assert shares.as_list({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert shares.as_list(()) == ""


def test_some_of_everything_stays_with_the_host() -> None:
    assert shares.cpu_sellable(2) == 1_900_000_000
    assert shares.memory_sellable(8 << 30) == (8 << 30) - (8 << 30) // 20
    assert shares.memory_sellable(512 << 20) == 256 << 20
    assert shares.memory_sellable(128 << 20) == 0


GIB = 1 << 30


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"reserve_cpus": -1}, "negative"),
        ({"reserve_cpus": 1}, "0.01"),
        ({"reserve_io": 91}, "1 to 90"),
        ({"reserve_cpus": 10**9, "cpuset_cpus": "0"}, "--cpuset-cpus"),
        ({"reserve_cpus": 10**9, "cpu_shares": 5}, "--cpu-shares"),
        ({"reserve_cpus": 10**9, "nano_cpus": 10**8}, "--cpus"),
        ({"reserve_cpus": 10**9, "cpu_quota": 50_000}, "--cpus"),
        ({"reserve_memory": 2 * GIB, "memory": GIB}, "--memory"),
        ({"reserve_io": 10, "blkio_weight": 10}, "--blkio-weight"),
        ({"reserve_memory": GIB, "cgroup_parent": "/x"}, "--cgroup-parent"),
    ],
)
def test_a_reservation_that_contradicts_the_rest_is_refused(
    members: dict[str, int | str], words: str
) -> None:
    with pytest.raises(Invalid, match=words):
        reservations.check(body.HostConfig(**members))  # type: ignore[arg-type]


def test_a_reservation_that_fits_is_fine() -> None:
    reservations.check(body.HostConfig(reserve_cpus=10**9, nano_cpus=2 * 10**9))
    reservations.check(body.HostConfig())


def test_the_words_of_amounts() -> None:
    assert reservations.cpus_text(1_500_000_000) == "1.5"
    assert reservations.cpus_text(10 * 10**9) == "10"
    assert reservations.bytes_text(3 << 29) == "1.5 GiB"
    assert reservations.bytes_text(256 << 20) == "256 MiB"


def test_the_disk_is_that_of_the_store(tmp_path: Path) -> None:
    scheduler, remedy = reservations.disk_scheduler(str(tmp_path))
    assert scheduler
    assert (scheduler == "bfq") == (not remedy)


def test_weights_of_disks_stay_within_the_schedulers() -> None:
    found = shares.weights({"r": 60.0}, {"a": 100, "b": 100}, shares.IO_WHOLE, shares.IO)
    assert found["r"] / sum(found.values()) >= 0.6
    assert max(found.values()) <= 1000
