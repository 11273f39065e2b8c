"""The device controller's rules: their meaning, v1's files, v2's program; pure.

The meaning is that of the kernel's v1 controller (security/device_cgroup.c): a default and a set of
exceptions by (type, major, minor). A rule for everything ("a" without numbers) sets the default
and clears the exceptions; another adds to, or takes from, the exceptions' access.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from bulkhead.errors import Invalid
from bulkhead.linux import bpf
from bulkhead.oci.runtime import DeviceCgroup

ANY = -1
Key = tuple[str, int, int]
"""Type "b" or "c", major and minor or ANY."""

_ACCESS = {"m": 1, "r": 2, "w": 4}
"""BPF_DEVCG_ACC_* of linux/bpf.h, and DEVCG_ACC_*."""
_ALL = 7
_TYPES = {"b": 1, "c": 2}
"""BPF_DEVCG_DEV_*."""


@dataclass(slots=True)
class DeviceState:
    """What is allowed: everything but the exceptions, or nothing but them."""

    allow: bool = True
    exceptions: dict[Key, int] = field(default_factory=dict)
    """Access bits by key."""

    def permits(self, kind: str, major: int, minor: int, access: str) -> bool:
        """The kernel's verdict on one access (for tests and explanations)."""
        wanted = access_bits(access)
        for (k, a, b), bits in self.exceptions.items():
            if k != kind or a not in (ANY, major) or b not in (ANY, minor):
                continue
            if self.allow and wanted & bits:
                return False
            if not self.allow and wanted & ~bits == 0:
                return True
        return self.allow

    def lines(self) -> list[str]:
        """The exceptions as v1's files have them."""
        return [render(key, bits) for key, bits in self.exceptions.items()]


def access_bits(access: str) -> int:
    """The bits of "rwm"; Invalid for other letters."""
    total = 0
    for letter in access or "rwm":
        if letter not in _ACCESS:
            raise Invalid(f"device access {access!r}: letters are r, w and m")
        total |= _ACCESS[letter]
    return total


def render(key: Key, bits: int) -> str:
    """ "c 1:3 rwm"."""
    kind, major, minor = key
    letters = "".join(letter for letter in "rwm" if bits & _ACCESS[letter])
    numbers = ":".join("*" if number == ANY else str(number) for number in (major, minor))
    return f"{kind} {numbers} {letters}"


def parse_list(text: str) -> DeviceState:
    """v1's devices.list: one line "a *:* rwm" where everything is allowed."""
    state = DeviceState(allow=False)
    for line in text.splitlines():
        kind, numbers, letters = line.split()
        if kind == "a":
            return DeviceState(allow=True)
        major, minor = (ANY if n == "*" else int(n) for n in numbers.split(":"))
        state.exceptions[(kind, major, minor)] = access_bits(letters)
    return state


def reduce(rules: Iterable[DeviceCgroup]) -> DeviceState:
    """The state that the rules, applied in order, lead to."""
    state = DeviceState()
    for rule in rules:
        kind = rule.type_ or "a"
        major = ANY if rule.major is None or rule.major < 0 else rule.major
        minor = ANY if rule.minor is None or rule.minor < 0 else rule.minor
        if kind == "a" and major == ANY and minor == ANY and access_bits(rule.access) == _ALL:
            state = DeviceState(allow=rule.allow)
            continue
        if kind not in ("a", "b", "c"):
            raise Invalid(f"device rule: type {kind!r} is none of a, b, c")
        for one in ("b", "c") if kind == "a" else (kind,):
            _except(state, (one, major, minor), access_bits(rule.access), rule.allow)
    return state


def _except(state: DeviceState, key: Key, bits: int, allow: bool) -> None:
    if allow != state.allow:
        state.exceptions[key] = state.exceptions.get(key, 0) | bits
        return
    left = state.exceptions.get(key, 0) & ~bits
    if left:
        state.exceptions[key] = left
    else:
        state.exceptions.pop(key, None)


def transition(now: DeviceState, then: DeviceState) -> list[tuple[str, str]]:
    """Writes (file, line) that lead v1's controller from one state to the other.

    What both allow stays allowed all the while, so that a running workload notices nothing.
    """
    give, take = (
        ("devices.deny", "devices.allow")
        if then.allow
        else (
            "devices.allow",
            "devices.deny",
        )
    )
    if now.allow != then.allow or then.allow:
        # devices.list does not show the exceptions of "everything but": start over.
        first = ("devices.allow" if then.allow else "devices.deny", "a")
        return [first, *((give, line) for line in then.lines())]
    writes = [
        (give, render(key, bits))
        for key, bits in then.exceptions.items()
        if bits & ~now.exceptions.get(key, 0)
    ]
    for key, bits in now.exceptions.items():
        stale = bits & ~then.exceptions.get(key, 0)
        if stale:
            writes.append((take, render(key, stale)))
    return writes


RuleKey = tuple[bool, str, int | None, int | None, str]


def fresh_writes(rules: Iterable[DeviceCgroup]) -> tuple[tuple[str, bytes], ...]:
    """Writes (file, line) that lead a v1 group that was just made to what `rules` mean."""
    return _fresh_writes(tuple((r.allow, r.type_, r.major, r.minor, r.access) for r in rules))


@lru_cache(maxsize=64)
def _fresh_writes(keys: tuple[RuleKey, ...]) -> tuple[tuple[str, bytes], ...]:
    state = reduce(DeviceCgroup(a, type_=t, major=m, minor=n, access=x) for a, t, m, n, x in keys)
    if state.allow and not state.exceptions:
        return ()  # whatever its parent allows
    writes = transition(DeviceState(), state)
    return tuple((file, line.encode()) for file, line in writes)


def program(state: DeviceState) -> bytes:
    """The BPF_PROG_TYPE_CGROUP_DEVICE program that decides as `state` does; linux/bpf.h.

    The context is struct bpf_cgroup_dev_ctx: access in the upper and type in the lower half of
    the first word, then major and minor. The result is 1 for "allowed".
    """
    code = [
        bpf.load32(2, 1, 0),
        bpf.move_register32(3, 2),
        bpf.and32(3, 0xFFFF),
        bpf.shift_right32(2, 16),
        bpf.load32(4, 1, 4),
        bpf.load32(5, 1, 8),
    ]
    for (kind, major, minor), bits in state.exceptions.items():
        tests: list[list[bpf.Instruction]] = [[bpf.jump_not_equal32(3, _TYPES[kind], 0)]]
        if bits != _ALL:
            mask = bits if state.allow else ~bits & _ALL
            jump = bpf.jump_equal32 if state.allow else bpf.jump_not_equal32
            tests.append([bpf.move_register32(6, 2), bpf.and32(6, mask), jump(6, 0, 0)])
        if major != ANY:
            tests.append([bpf.jump_not_equal32(4, major, 0)])
        if minor != ANY:
            tests.append([bpf.jump_not_equal32(5, minor, 0)])
        block = [instruction for test in tests for instruction in test]
        block += [bpf.move32(0, int(not state.allow)), bpf.exit_()]
        code += [
            instruction.aimed(len(block) - position - 1) if instruction.jumps else instruction
            for position, instruction in enumerate(block)
        ]
    code += [bpf.move32(0, int(state.allow)), bpf.exit_()]
    return bpf.assemble(code)


def describe(state: DeviceState) -> Mapping[str, object]:
    """For people: the default and the exceptions."""
    return {"default": "allow" if state.allow else "deny", "except": state.lines()}
