"""QEMU's command line of a whole machine."""

import json

import pytest

from bulkhead.boundaries.vmm import q35, qemu
from bulkhead.errors import BulkheadError


def machine(**more: object) -> q35.Machine:
    drives = [q35.Drive("/disks/0", "qcow2", "/disks/1"), q35.Drive("/disks/2", "raw", "", True)]
    given = {"drives": drives, "memory_bytes": 128 << 20, "vcpus": 1, "control_fd": 10, **more}
    return q35.Machine(**given)  # type: ignore[arg-type]


def nodes(words: list[str]) -> list[dict[str, object]]:
    return [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev"]


def test_formats_and_bases_are_named() -> None:
    first, second = nodes(q35.argv(machine()))
    assert first["driver"] == "qcow2"
    backing = first["backing"]
    assert isinstance(backing, dict)
    assert backing["backing"] is None
    assert backing["read-only"] is True
    assert second["driver"] == "raw"
    assert second["read-only"] is True


def test_limits_are_before_each_disk() -> None:
    words = q35.argv(machine(iops=100))
    assert {one["driver"] for one in nodes(words)} == {"throttle"}
    assert any("drive=limited0" in word for word in words)
    assert any('"iops-total":100' in word for word in words)


def test_firmware_screen_and_cards() -> None:
    words = q35.argv(
        machine(code="/boot/code", nvram="/disks/3", screen=True, cards=[qemu.Card(11, "02::1")])
    )
    assert any("pflash0=code" in word for word in words)
    assert f"unix:{q35.SCREEN}" in words
    assert "tap,id=net0,fd=11" in words
    assert "none" not in words


def test_it_starts_nothing_and_opens_no_configuration() -> None:
    words = q35.argv(machine())
    assert {"-nodefaults", "-no-user-config", qemu.SANDBOX} <= set(words)


@pytest.mark.parametrize(
    "more",
    [
        {"memory_bytes": 1 << 20},
        {"vcpus": 0},
        {"drives": [q35.Drive("/disks/0", "raw")] * 13},
        {"drives": [q35.Drive("/disks/0", "raw")] * 7, "sata": True},
    ],
    ids=["memory", "processors", "disks", "ports"],
)
def test_what_no_machine_can_be(more: dict[str, object]) -> None:
    with pytest.raises(BulkheadError):
        q35.argv(machine(**more))


def test_a_guest_on_a_pc() -> None:
    guest = q35.Guest(
        "/boot/kernel", "/boot/initramfs", 9, [("/disks/0", False), ("/disks/1", True)],
        [qemu.Card(11, "02::1")], 256 << 20, 2, "tcg", 1000,
    )  # fmt: skip
    words = q35.guest_argv(guest)
    assert [one["read-only"] for one in nodes(words)] == [True, False]
    assert f"virtserialport,chardev=channel,name={qemu.PORT}" in words
    assert "mitigations" not in q35.command_line(guest)
