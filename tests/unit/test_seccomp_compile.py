"""The compiler: meaning of the rules, limits, the cache, and the way back to words."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation.seccomp import profile
from bulkhead.isolation.seccomp.cache import FilterCache
from bulkhead.isolation.seccomp.compile import compile_filter, unknown_names
from bulkhead.isolation.seccomp.describe import action, describe
from bulkhead.linux import seccomp as kernel
from bulkhead.oci.runtime import Seccomp, Syscall, SyscallArg
from tests.helpers import bpf

X86_64, X86 = kernel.ARCHITECTURES["x86_64"], kernel.ARCHITECTURES["x86"]
ALLOW = kernel.RET_ALLOW
NAMES = ["read", "write", "open", "personality", "clone", "socket", "getppid", "futex", "statx"]
LIMIT = 2**64 - 1


def compiled(*rules: Syscall, default: str = "SCMP_ACT_ERRNO", **more: Any) -> bytes:
    seccomp = Seccomp(default_action=default, syscalls=list(rules), **more)  # type: ignore[arg-type]
    return compile_filter(seccomp, machine="x86_64").program


def number(name: str) -> int:
    return kernel.numbers("x86_64")[name]


interesting = st.one_of(
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, LIMIT]),
    st.integers(0, LIMIT),
    st.integers(0, 40),
)
conditions = st.builds(
    SyscallArg,
    index=st.integers(0, 5),
    value=interesting,
    value_two=interesting,
    op=st.sampled_from(
        [f"SCMP_CMP_{op}" for op in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")]
    ),
)
rules = st.builds(
    Syscall,
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    action=st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"]),
    args=st.lists(conditions, max_size=3),
)


def meaning(seccomp: Seccomp, name: str, arguments: tuple[int, ...]) -> int:
    """What the rules say, evaluated directly (numbers up to the newest named)."""
    words = {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_ERRNO": 0x50001, "SCMP_ACT_KILL_PROCESS": 1 << 31}
    default = words[seccomp.default_action]
    named = [r for r in seccomp.syscalls if name in r.names and words[r.action] != default]
    for rule in named:
        if not rule.args:
            return words[rule.action]
    for rule in named:
        results = [_holds(c, arguments) for c in rule.args]
        same = len({c.index for c in rule.args}) < len(rule.args)
        if any(results) if same else all(results):
            return words[rule.action]
    return default


def _holds(c: SyscallArg, arguments: tuple[int, ...]) -> bool:
    value = arguments[c.index]
    return {
        "SCMP_CMP_NE": value != c.value,
        "SCMP_CMP_LT": value < c.value,
        "SCMP_CMP_LE": value <= c.value,
        "SCMP_CMP_EQ": value == c.value,
        "SCMP_CMP_GE": value >= c.value,
        "SCMP_CMP_GT": value > c.value,
        "SCMP_CMP_MASKED_EQ": value & c.value == c.value_two,
    }[c.op]


@given(
    st.lists(rules, max_size=8),
    st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]),
    st.lists(st.tuples(*[interesting] * 6), min_size=1, max_size=6),
)
def test_any_rules_mean_the_same_compiled(
    generated: list[Syscall], default: Any, tried: list[tuple[int, ...]]
) -> None:
    # A rule that names the newest call keeps the ENOSYS rule out of the way.
    top = Syscall(names=["listmount"], action="SCMP_ACT_KILL_PROCESS")
    seccomp = Seccomp(default_action=default, syscalls=[*generated, top])
    program = compile_filter(seccomp, machine="x86_64").program
    for arguments in tried:
        near = [
            tuple(c.value if i == c.index else a for i, a in enumerate(arguments))
            for rule in generated
            for c in rule.args
        ]
        for name in NAMES:
            for candidate in (arguments, *near):
                found = bpf.run(program, number(name), X86_64, candidate)
                assert found == meaning(seccomp, name, candidate), (name, candidate)


def test_rules_on_one_argument_are_alternatives_and_on_several_a_conjunction() -> None:
    def arg(index: int, value: int) -> SyscallArg:
        return SyscallArg(index=index, value=value, op="SCMP_CMP_EQ")

    one = compiled(Syscall(names=["clone"], action="SCMP_ACT_ALLOW", args=[arg(0, 1), arg(0, 2)]))
    two = compiled(Syscall(names=["clone"], action="SCMP_ACT_ALLOW", args=[arg(0, 1), arg(1, 2)]))
    assert bpf.run(one, number("clone"), X86_64, (1, 0)) == ALLOW
    assert bpf.run(one, number("clone"), X86_64, (2, 0)) == ALLOW
    assert bpf.run(two, number("clone"), X86_64, (1, 0)) != ALLOW
    assert bpf.run(two, number("clone"), X86_64, (1, 2)) == ALLOW


def test_calls_newer_than_the_rules_are_enosys_unless_permissive() -> None:
    rule = Syscall(names=["openat2"], action="SCMP_ACT_ALLOW")
    program = compiled(rule)
    assert bpf.run(program, number("openat2"), X86_64) == ALLOW
    assert bpf.run(program, number("close_range"), X86_64) == kernel.RET_ERRNO | errno.EPERM
    assert bpf.run(program, number("openat2") + 1, X86_64) == kernel.RET_ERRNO | errno.ENOSYS
    assert bpf.run(program, 100_000, X86_64) == kernel.RET_ERRNO | errno.ENOSYS
    killing = compiled(rule, default="SCMP_ACT_KILL_PROCESS")
    assert bpf.run(killing, 100_000, X86_64) == kernel.RET_ERRNO | errno.ENOSYS
    deny = Syscall(names=["openat2"], action="SCMP_ACT_ERRNO")
    assert bpf.run(compiled(deny, default="SCMP_ACT_ALLOW"), 100_000, X86_64) == ALLOW


def test_errno_values() -> None:
    rule = Syscall(names=["read"], action="SCMP_ACT_ERRNO", errno_ret=errno.EIO)
    program = compiled(rule, default_errno_ret=errno.EACCES)
    assert bpf.run(program, 0, X86_64) == kernel.RET_ERRNO | errno.EIO
    program = compiled(
        Syscall(names=["getppid"], action="SCMP_ACT_ALLOW"), default_errno_ret=errno.EACCES
    )
    assert bpf.run(program, 0, X86_64) == kernel.RET_ERRNO | errno.EACCES
    with pytest.raises(Invalid, match="errnoRet 5 does not go with SCMP_ACT_KILL"):
        compiled(Syscall(names=["read"], action="SCMP_ACT_KILL", errno_ret=5))
    with pytest.raises(Invalid, match="too large"):
        compiled(Syscall(names=["read"], action="SCMP_ACT_ERRNO", errno_ret=70000))


def test_architectures() -> None:
    rule = Syscall(names=["getppid"], action="SCMP_ACT_ALLOW")
    only = compiled(rule)
    both = compiled(rule, architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    here, there = number("getppid"), kernel.numbers("x86")["getppid"]
    assert bpf.run(only, here, X86_64) == bpf.run(both, here, X86_64) == ALLOW
    assert bpf.run(both, there, X86) == ALLOW
    assert bpf.run(only, there, X86) == kernel.RET_KILL_PROCESS
    with pytest.raises(Invalid, match="unknown architecture 'PDP11'"):
        compiled(rule, architectures=["PDP11"])
    with pytest.raises(Unsupported, match="riscv64"):
        compile_filter(Seccomp(default_action="SCMP_ACT_ALLOW"), machine="riscv64")


def test_32_bit_socketcall_cannot_go_round_a_rule() -> None:
    deny = Syscall(names=["connect"], action="SCMP_ACT_ERRNO")
    program = compiled(deny, default="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_X86"])
    socketcall = kernel.numbers("x86")["socketcall"]
    assert bpf.run(program, socketcall, X86, (3,)) == kernel.RET_ERRNO | errno.EPERM
    assert bpf.run(program, socketcall, X86, (1,)) == ALLOW


def test_many_conditions_far_apart_and_the_kernels_limit() -> None:
    def rule(name: str, count: int) -> Syscall:
        values = [n << 32 | number(name) for n in range(count)]
        argument = [SyscallArg(index=1, value=value, op="SCMP_CMP_EQ") for value in values]
        return Syscall(names=[name], action="SCMP_ACT_ALLOW", args=argument)

    names = sorted(kernel.numbers("x86_64"), key=number)[:300]
    program = compiled(*(rule(name, 3) for name in names))
    assert len(program) // 8 > 2000
    for name in names:
        assert bpf.run(program, number(name), X86_64, (9, 2 << 32 | number(name))) == ALLOW
        assert bpf.run(program, number(name), X86_64, (9, 3 << 32 | number(name))) == 0x50001
    with pytest.raises(Invalid, match="the kernel takes 4096"):
        compiled(*(rule(name, 6) for name in names))


def test_unknown_names_have_no_effect_and_are_told() -> None:
    rule = Syscall(names=["read", "raed", "vm86"], action="SCMP_ACT_ALLOW")
    assert bpf.run(compiled(rule), 0, X86_64) == ALLOW
    assert unknown_names(Seccomp(default_action="SCMP_ACT_ERRNO", syscalls=[rule])) == ["raed"]


def test_flags() -> None:
    def flags(*names: str) -> int:
        seccomp = Seccomp(default_action="SCMP_ACT_ALLOW", flags=list(names))
        return compile_filter(seccomp, machine="x86_64").flags

    assert flags() == 4
    assert flags("SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC") == 3
    with pytest.raises(Invalid, match="unknown flag"):
        flags("LOUD")


def test_docker_format() -> None:
    text = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}},
            {"names": ["write"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_BPF"]}},
            {"names": ["open"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
            {"names": ["close"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.4"}},
            {"name": "getppid", "action": "SCMP_ACT_ALLOW", "args": None, "comment": "old form"},
        ],
    }
    loaded = profile.choose(json.dumps(text))
    assert loaded is not None

    def names(caps: set[str], kernel_version: tuple[int, int]) -> set[str]:
        resolved = profile.resolve(
            loaded, capabilities=frozenset(caps), machine="x86_64", kernel=kernel_version
        )
        assert resolved.architectures == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
        return {name for rule in resolved.syscalls for name in rule.names}

    assert names({"CAP_BPF"}, (5, 3)) == {"read", "getppid"}
    assert names(set(), (5, 4)) == {"write", "close", "getppid"}
    assert names(set(), (10, 0)) == {"write", "close", "getppid"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("what", "neither"),
        ('{"syscalls": []}', "missing required field defaultAction"),
        ('{"defaultAction": "SCMP_ACT_DANCE"}', "SCMP_ACT_DANCE"),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}',
            "has no 'names'",
        ),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW",'
            ' "name": "a", "names": ["b"]}]}',
            "both 'name' and 'names'",
        ),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],'
            ' "archMap": [{"architecture": "SCMP_ARCH_X86"}]}',
            "use either",
        ),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW",'
            ' "name": "a", "includes": {"minKernel": "new"}}]}',
            "minKernel 'new'",
        ),
    ],
)
def test_bad_profiles_are_refused_with_one_line(text: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        profile.choose(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words() -> None:
    assert profile.choose("unconfined") is None
    assert profile.choose("builtin") is profile.default()


def test_cache_on_disk_is_used_and_damage_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "filters"
    seccomp = profile.default_for(frozenset())
    first = FilterCache(str(folder)).get(seccomp)
    assert first == compile_filter(seccomp)
    (path,) = folder.iterdir()
    good = path.read_bytes()
    for bad in (b"", good[:20], good[:-8], good[:-1], good[:40] + b"\x06" + good[41:], b"x" * 99):
        path.write_bytes(bad)
        assert FilterCache(str(folder)).get(seccomp) == first
        assert path.read_bytes() == good
    assert os.listdir(folder) == [path.name]
    cache = FilterCache(str(folder))
    assert cache.get(seccomp) is cache.get(seccomp)
    assert FilterCache(None).get(seccomp) == first


def test_cache_that_cannot_be_written_still_compiles(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    seccomp = profile.default_for(frozenset())
    assert FilterCache(str(tmp_path / "file" / "x")).get(seccomp) == compile_filter(seccomp)


def test_describe() -> None:
    program = compiled(
        Syscall(names=["read", "write"], action="SCMP_ACT_ALLOW"),
        Syscall(
            names=["personality"],
            action="SCMP_ACT_ALLOW",
            args=[SyscallArg(index=0, value=8, op="SCMP_CMP_EQ")],
        ),
        Syscall(
            names=["clone"],
            action="SCMP_ACT_ALLOW",
            args=[SyscallArg(index=0, value=0x7E020000, op="SCMP_CMP_MASKED_EQ")],
        ),
    )
    told = describe(program)
    assert set(told) == {"x86_64", "others"}
    assert told["x86_64"]["allow"] == ["read", "write"]
    assert sorted(told["x86_64"]["by arguments"]) == [
        "clone: allow if (arg0 & 0x7e020000) == 0; otherwise errno EPERM",
        "personality: allow if arg0 == 8; otherwise errno EPERM",
    ]
    assert "getppid" in told["x86_64"]["errno EPERM"]
    assert "136-" not in str(told)
    assert told["others"] == {"kill process": ["every call"]}


def test_describe_refuses_what_is_no_filter() -> None:
    for bad in (b"123", kernel.pack([(0x20, 0, 0, 0)]), kernel.pack([(0x60, 0, 0, 0)])):
        with pytest.raises(Invalid):
            describe(bad)


def test_words_of_actions() -> None:
    assert action(kernel.RET_ERRNO | errno.ENOSYS) == "errno ENOSYS"
    assert action(kernel.RET_TRACE | 7) == "trace 7"
    assert action(kernel.RET_KILL_PROCESS) == "kill process"
