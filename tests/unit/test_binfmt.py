"""Registrations of other machines' programs."""

import re

import pytest

from bulkhead.isolation import binfmt
from bulkhead.linux.program import Program

ARM64_MAGIC = "7f454c460201010000000000000000000200b700"
ARM64_MASK = "ffffffffffffff00fffffffffffffffffeffffff"


def _fields(architecture: str) -> list[str]:
    return binfmt.registration(binfmt.MACHINES[architecture], "/usr/bin/qemu").split(":")


def _hex(escaped: str) -> str:
    assert re.fullmatch(r"(\\x[0-9a-f]{2})+", escaped)
    return escaped.replace("\\x", "")


def test_it_is_what_debian_registers() -> None:
    _, name, kind, offset, magic, mask, interpreter, flags = _fields("arm64")
    assert (name, kind, offset) == ("qemu-aarch64", "M", "")
    assert (_hex(magic), _hex(mask)) == (ARM64_MAGIC, ARM64_MASK)
    assert (interpreter, flags) == ("/usr/bin/qemu", "OCPF")


def test_big_endian_machines() -> None:
    magic, mask = _fields("s390x")[4:6]
    assert _hex(magic).endswith("00020016")
    assert _hex(mask).endswith("fffeffff")


@pytest.mark.parametrize("architecture", sorted(binfmt.MACHINES))
def test_the_kernel_takes_no_more_than_1920_bytes(architecture: str) -> None:
    fields = _fields(architecture)
    assert len(fields) == 8
    assert len(fields[4]) == len(fields[5]) == 80
    assert len(":".join(fields)) < 1920


def test_options_are_told_from_registrations() -> None:
    assert binfmt.split(["nodev", "register=:a:M::x:y:/i:F", "noexec"]) == (
        ["nodev", "noexec"],
        [":a:M::x:y:/i:F"],
    )


def test_a_plan_names_the_interpreter() -> None:
    program = Program()
    mounted = program.call("open", "open_tree", -100, "/", 0)
    binfmt.plan_register(program, mounted, [":qemu-aarch64:M::x:y:/i:F"])
    assert any("qemu-aarch64" in step for step in program.compile().steps)
