"""Capability sets: names, Docker's rules, the structures of capset(2)."""

import struct

import pytest

from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation import capabilities
from bulkhead.linux import capabilities as kernel

EVERYTHING = frozenset(kernel.NAMES)


def chosen(add: tuple[str, ...] = (), drop: tuple[str, ...] = (), **more: bool) -> set[str]:
    return set(capabilities.select(add, drop, available=EVERYTHING, **more))


def test_default_set_is_dockers() -> None:
    assert chosen() == set(capabilities.DEFAULT)
    assert len(capabilities.DEFAULT) == 14


def test_names_with_and_without_prefix_in_any_case() -> None:
    for name in ("NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"):
        assert capabilities.normalize(name) == "CAP_NET_ADMIN"
        assert chosen((name,)) == {*capabilities.DEFAULT, "CAP_NET_ADMIN"}
        assert chosen(drop=("mknod",)) == set(capabilities.DEFAULT) - {"CAP_MKNOD"}


def test_all() -> None:
    assert chosen(("ALL",)) == EVERYTHING
    assert chosen(("all",), ("SYS_ADMIN",)) == EVERYTHING - {"CAP_SYS_ADMIN"}
    assert chosen(drop=("ALL",)) == set()
    assert chosen(("CHOWN",), ("ALL",)) == {"CAP_CHOWN"}
    assert chosen((), ("ALL",), privileged=True) == EVERYTHING


def test_adding_wins_over_dropping() -> None:
    assert "CAP_CHOWN" in chosen(("CHOWN",), ("CHOWN",))


def test_unknown_name_in_dockers_words() -> None:
    with pytest.raises(Invalid, match=r'invalid CapAdd: unknown capability: "CAP_FLY"'):
        capabilities.select(("fly",), available=EVERYTHING)
    with pytest.raises(Invalid, match="invalid CapDrop"):
        capabilities.select((), ("fly",), available=EVERYTHING)


def test_bounded_by_what_the_engine_holds() -> None:
    few = frozenset({"CAP_CHOWN", "CAP_KILL"})
    assert capabilities.select(available=few) == ("CAP_CHOWN", "CAP_KILL")
    assert set(capabilities.select(("ALL",), available=few)) == few
    assert set(capabilities.select(privileged=True, available=few)) == few
    with pytest.raises(Unsupported, match=r"CAP_SYS_TIME.*does not hold"):
        capabilities.select(("SYS_TIME",), available=few)


def test_plan_is_what_capset_takes() -> None:
    names = ("CAP_CHOWN", "CAP_BPF")
    plan = capabilities.plan(effective=names, permitted=names, bounding=names, available=EVERYTHING)
    assert plan.header == struct.pack("=Ii", 0x20080522, 0)
    assert plan.data == struct.pack("=6I", 1, 1, 0, 1 << 7, 1 << 7, 0)
    assert set(plan.drop) == set(range(kernel.last() + 1)) - {0, 39}
    assert plan.raise_ambient == ()
    assert plan.describe()["bounding"] == ["CAP_CHOWN", "CAP_BPF"]


def test_plan_leaves_out_what_is_not_held_and_refuses_contradictions() -> None:
    few = frozenset({"CAP_CHOWN"})
    plan = capabilities.plan(
        effective=["CAP_KILL", "CAP_CHOWN"],
        permitted=["CAP_KILL", "CAP_CHOWN"],
        bounding=["CAP_KILL"],
        available=few,
    )
    assert plan.effective == plan.permitted == 1
    assert plan.bounding == 0
    with pytest.raises(Invalid, match="CAP_KILL is in the effective set"):
        capabilities.plan(effective=["CAP_KILL"], permitted=[], bounding=[], available=EVERYTHING)
    with pytest.raises(Invalid, match="ambient set"):
        capabilities.plan(
            effective=[],
            permitted=["CAP_KILL"],
            bounding=[],
            ambient=["CAP_KILL"],
            available=EVERYTHING,
        )
    with pytest.raises(Invalid, match="unknown capability 'KILL'"):
        capabilities.plan(effective=["KILL"], permitted=[], bounding=[], available=few)


def test_masks_and_names_are_inverse() -> None:
    assert kernel.names(kernel.mask(kernel.NAMES)) == kernel.NAMES
    assert kernel.names(1 << 45) == ("CAP_45",)


def test_own_sets_can_be_read() -> None:
    own = kernel.of_process()
    assert own.effective & ~own.permitted == 0
    assert capabilities.held() <= EVERYTHING
