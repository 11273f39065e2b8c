"""The default profile against Docker's: every call, capability set, condition and architecture."""

import json
import operator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bulkhead.isolation.seccomp import profile
from bulkhead.isolation.seccomp.compile import RUNS_HERE, compile_filter, unknown_names
from bulkhead.linux import seccomp as kernel
from tests.helpers import bpf

THEIRS = Path(__file__).resolve().parents[3] / "shared/spec/seccomp/moby-default.json"

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
OPERATORS = {
    "SCMP_CMP_NE": operator.ne,
    "SCMP_CMP_LT": operator.lt,
    "SCMP_CMP_LE": operator.le,
    "SCMP_CMP_EQ": operator.eq,
    "SCMP_CMP_GE": operator.ge,
    "SCMP_CMP_GT": operator.gt,
}


@cache
def theirs() -> dict[str, Any]:
    if not THEIRS.exists():
        pytest.skip(f"{THEIRS} is not there to compare with")
    loaded: dict[str, Any] = json.loads(THEIRS.read_text())
    return loaded


def capability_sets() -> list[frozenset[str]]:
    """None, each that the profile asks about, Docker's default ones, and all of them."""
    asked = {
        cap
        for rule in theirs()["syscalls"]
        for side in ("includes", "excludes")
        for cap in rule.get(side, {}).get("caps", ())
    }
    default = {"CAP_CHOWN", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_MKNOD"}
    sets = [frozenset(), frozenset(default), frozenset(asked)]
    return sets + [frozenset({cap}) for cap in sorted(asked)]


def applies(rule: dict[str, Any], caps: frozenset[str], native: str) -> bool:
    includes, excludes = rule.get("includes", {}), rule.get("excludes", {})
    assert set(includes) | set(excludes) <= {"caps", "arches", "minKernel"}
    assert includes.get("minKernel", "4.8") == "4.8"  # every kernel we run on is newer
    if includes.get("arches") and native not in includes["arches"]:
        return False
    if not caps.issuperset(includes.get("caps", ())):
        return False
    return native not in excludes.get("arches", ()) and caps.isdisjoint(excludes.get("caps", ()))


def holds(condition: dict[str, Any], arguments: tuple[int, ...]) -> bool:
    value = arguments[condition["index"]]
    if condition["op"] == "SCMP_CMP_MASKED_EQ":
        return bool(value & condition["value"] == condition.get("valueTwo", 0))
    return bool(OPERATORS[condition["op"]](value, condition["value"]))


def verdict(rules: list[dict[str, Any]], arguments: tuple[int, ...]) -> int:
    for rule in sorted(rules, key=lambda rule: bool(rule.get("args"))):
        if all(holds(condition, arguments) for condition in rule.get("args", ())):
            if rule["action"] == "SCMP_ACT_ALLOW":
                return ALLOW
            assert rule["action"] == "SCMP_ACT_ERRNO"
            return 0x00050000 | int(rule["errnoRet"])
    return EPERM


def samples(rules: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Arguments on both sides of every condition, also with the upper half set."""
    values = {0, 1, 2**64 - 1}
    for rule in rules:
        for condition in rule.get("args", ()):
            v = condition["value"]
            bits = {1 << n for n in range(64) if v >> n & 1}
            values |= {v - 1, v, v + 1, v | 1 << 32, v | 1 << 63, v << 32 & (2**64 - 1), *bits}
    values = {value for value in values if 0 <= value < 2**64}
    if not any(rule.get("args") for rule in rules):
        values = {0, 2**64 - 1}
    return [tuple([7] * i + [v] + [7] * (5 - i)) for v in sorted(values) for i in (0, 1)]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_equal_in_effect_to_dockers(machine: str) -> None:
    """Exceptions: x32 calls, which Docker filters and we refuse; see the next tests."""
    for caps in capability_sets():
        resolved = profile.resolve(
            profile.default(), capabilities=caps, machine=machine, kernel=(6, 1)
        )
        program = compile_filter(resolved, machine=machine).program
        rules = [r for r in theirs()["syscalls"] if applies(r, caps, GO_NAMES[machine])]
        by_name: dict[str, list[dict[str, Any]]] = {}
        for rule in rules:
            for name in rule["names"]:
                by_name.setdefault(name, []).append(rule)
        for architecture in RUNS_HERE[machine]:
            token, numbers = kernel.ARCHITECTURES[architecture], kernel.numbers(architecture)
            # runc answers ENOSYS to calls newer than the newest one that the profile names.
            newest = max(n for name, n in numbers.items() if name in by_name and n < 0xF0000)
            names = {number: name for name, number in numbers.items()}
            for number in {*numbers.values(), *range(600), 0xEFFFF, 0xF0000, 0xF0006}:
                applying = by_name.get(names.get(number, ""), [])
                for arguments in samples(applying):
                    expected = verdict(applying, arguments)
                    if newest < number < 0xF0000 or (architecture != "arm" and number > newest):
                        expected = ENOSYS
                    found = bpf.run(program, number, token, arguments)
                    assert found == expected, (
                        f"{architecture} {names.get(number, number)} {arguments} {sorted(caps)}:"
                        f" {found:#x} instead of {expected:#x}"
                    )


def test_x32_and_unlisted_architectures_are_refused() -> None:
    for caps in (frozenset[str](), frozenset({"CAP_SYS_ADMIN"})):
        resolved = profile.resolve(profile.default(), capabilities=caps, machine="x86_64")
        program = compile_filter(resolved, machine="x86_64").program
        x86_64 = kernel.ARCHITECTURES["x86_64"]
        for number in (0, 1, 39, 101, 512, 520, 0x3FFFFFFF):
            assert bpf.run(program, number | kernel.X32_BIT, x86_64) == ENOSYS
        for other in (kernel.ARCHITECTURES["aarch64"], kernel.ARCHITECTURES["arm"], 0, 0xFFFFFFFF):
            assert bpf.run(program, 39, other) == kernel.RET_KILL_PROCESS


def test_every_rule_says_why_and_every_name_exists() -> None:
    for rule in profile.default().syscalls or ():
        assert rule.comment.endswith("."), rule
    for machine in RUNS_HERE:
        for caps in (frozenset[str](), frozenset({"CAP_SYS_ADMIN", "CAP_SYS_TIME"})):
            resolved = profile.resolve(profile.default(), capabilities=caps, machine=machine)
            assert unknown_names(resolved) == []


def test_small_enough_to_install_quickly() -> None:
    resolved = profile.resolve(profile.default(), capabilities=frozenset(), machine="x86_64")
    assert compile_filter(resolved, machine="x86_64").instructions < 300
