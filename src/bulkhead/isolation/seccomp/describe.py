"""A seccomp filter's instructions in words: for each architecture, what happens to which call.

Works on any classic BPF filter, ours or another's (`linux.seccomp.installed` reads them from a
running process): the program is run for each number, known or in between, with the arguments
unknown; where it looks at arguments both ways are followed and the conditions collected.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from bulkhead.errors import Invalid
from bulkhead.linux import seccomp as kernel

PATHS = 256
"""Ways through the program for one call; a filter with more is not described in full."""

_ACTIONS = {
    kernel.RET_KILL_PROCESS: "kill process",
    kernel.RET_KILL_THREAD: "kill thread",
    kernel.RET_TRAP: "trap",
    kernel.RET_USER_NOTIF: "notify",
    kernel.RET_LOG: "log and allow",
    kernel.RET_ALLOW: "allow",
}


@dataclass(frozen=True, slots=True)
class _Word:
    """An unknown 32-bit half of an argument, masked."""

    name: str
    mask: int = 0xFFFFFFFF

    def __str__(self) -> str:
        return self.name if self.mask == 0xFFFFFFFF else f"({self.name} & {self.mask:#x})"


Ranges = tuple[tuple[int, int], ...]
"""Disjoint, ascending, both ends included."""

_ANY: Ranges = ((0, 0xFFFFFFFF),)


@dataclass(slots=True)
class _State:
    at: int
    accumulator: "int | _Word" = 0
    facts: dict[_Word, Ranges] = field(default_factory=dict)
    """What the way taken so far says of each word."""


Outcome = tuple[tuple[dict[_Word, Ranges], int], ...]
"""Every way through the program: what holds on it, and the return value."""


def action(word: int) -> str:
    """A filter's return value in words, e.g. "errno EPERM"."""
    kind, data = word & kernel.RET_ACTION_FULL, word & kernel.RET_DATA
    if kind == kernel.RET_ERRNO:
        return f"errno {errno.errorcode.get(data, data)}"
    if kind == kernel.RET_TRACE:
        return f"trace {data}"
    return _ACTIONS.get(kind, f"unknown action {word:#x}")


def describe(program: bytes) -> dict[str, dict[str, list[str]]]:
    """{architecture: {"allow": [names], "errno EPERM": […], "by arguments": ["name: …"]}}.

    Numbers of no known call are named as ranges ("470-511"). Invalid for bytes that are not a
    seccomp filter.
    """
    try:
        instructions = kernel.unpack(program)
    except ValueError as error:
        raise Invalid(f"seccomp: {error}") from None
    result: dict[str, dict[str, list[str]]] = {}
    for architecture, token in kernel.ARCHITECTURES.items():
        foreign = _outcome(instructions, token, 0)
        if foreign == _outcome(instructions, 0xFFFFFFFF, 0) and _all_equal(instructions, token):
            continue  # not named by the filter
        result[architecture] = _architecture(instructions, architecture, token)
    result["others"] = {text: ["every call"] for text in [_text(instructions, 0xFFFFFFFF, 0)]}
    return result


_LETTING = (kernel.RET_ALLOW, kernel.RET_LOG, kernel.RET_USER_NOTIF, kernel.RET_TRACE)


def passes(program: bytes, architecture: str) -> set[str]:
    """The calls of `architecture` that the filter lets through, for some arguments at least.

    What a supervisor or tracer decides about counts as let through. Invalid as for `describe`.
    """
    try:
        instructions = kernel.unpack(program)
    except ValueError as error:
        raise Invalid(f"seccomp: {error}") from None
    token = kernel.ARCHITECTURES[architecture]
    return {
        name
        for name, number in kernel.numbers(architecture).items()
        if any(
            word & kernel.RET_ACTION_FULL in _LETTING
            for _, word in _outcome(instructions, token, number)
        )
    }


def _all_equal(instructions: list[kernel.Instruction], token: int) -> bool:
    """Whether the program treats `token` as it treats an architecture that does not exist."""
    marks = _boundaries(instructions)
    return all(
        _outcome(instructions, token, n) == _outcome(instructions, 0xFFFFFFFF, n) for n in marks
    )


def _boundaries(instructions: list[kernel.Instruction]) -> list[int]:
    """Numbers at which the program's answer may change: those it compares with, and next ones."""
    marks = {0}
    for code, _, _, k in instructions:
        if code & 7 == 5 and code != kernel.JMP_JA:
            marks |= {k, k + 1}
    return sorted(mark for mark in marks if mark <= 0xFFFFFFFF)


def _architecture(
    instructions: list[kernel.Instruction], architecture: str, token: int
) -> dict[str, list[str]]:
    by_number = {number: name for name, number in kernel.numbers(architecture).items()}
    groups: dict[str, list[str]] = {}
    marks = sorted({*_boundaries(instructions), *by_number, *(n + 1 for n in by_number)})
    gap: tuple[int, int, str] | None = None
    for position, number in enumerate(marks):
        end = marks[position + 1] - 1 if position + 1 < len(marks) else 0xFFFFFFFF
        text = _text(instructions, token, number)
        name = by_number.get(number)
        if name is None:
            if gap is not None and gap[2] == text and gap[1] + 1 == number:
                gap = (gap[0], end, text)
                continue
            _close(groups, gap)
            gap = (number, end, text)
            continue
        _close(groups, gap)
        gap = None
        if "\n" in text or " if " in text:
            groups.setdefault("by arguments", []).append(f"{name}: {text}")
        else:
            groups.setdefault(text, []).append(name)
    _close(groups, gap)
    return groups


def _close(groups: dict[str, list[str]], gap: tuple[int, int, str] | None) -> None:
    if gap is not None:
        start, end, text = gap
        groups.setdefault(text, []).append(
            f"{start:#x}-{end:#x}"
            if end > 0xFFFF
            else f"{start}-{end}"
            if end > start
            else f"{start}"
        )


def _span(start: int, end: int) -> str:
    def show(value: int) -> str:
        return f"{value:#x}" if value > 0xFFFF else f"{value}"

    return show(start) if start == end else f"{show(start)}-{show(end)}"


def _text(instructions: list[kernel.Instruction], token: int, number: int) -> str:
    outcome = _outcome(instructions, token, number)
    words = [word for _, word in outcome]
    if len(set(words)) == 1:
        return action(words[0])
    # What is told by conditions is what is let through, if anything is.
    rest = [word for word in words if word != kernel.RET_ALLOW]
    otherwise = max(set(rest), key=lambda word: (rest.count(word), word))
    told = [f"{action(w)} if {_condition(f)}" for f, w in outcome if w != otherwise]
    return "; ".join([*told, f"otherwise {action(otherwise)}"])


def _condition(facts: dict[_Word, Ranges]) -> str:
    """The facts of one way; an argument whose upper half must be 0 is a small number."""
    parts = []
    for word, ranges in facts.items():
        if ranges == _ANY:
            continue
        if word.name.endswith(".high") and ranges == ((0, 0),):
            low = _Word(word.name.removesuffix(".high"))
            if any(other.name == low.name and r != _ANY for other, r in facts.items()):
                continue
            parts.append(f"{low} < 0x100000000")
            continue
        parts.append(_relation(str(word), ranges))
    return " and ".join(parts) or "anything else"


def _relation(subject: str, ranges: Ranges) -> str:
    def show(value: int) -> str:
        return f"{value:#x}" if value > 0xFFF else f"{value}"

    low, high = ranges[0][0], ranges[-1][1]
    if len(ranges) == 1:
        if low == high:
            return f"{subject} == {show(low)}"
        if low == 0:
            return f"{subject} <= {show(high)}"
        if high == 0xFFFFFFFF:
            return f"{subject} >= {show(low)}"
    if len(ranges) == 2 and (low, high) == _ANY[0] and ranges[0][1] + 2 == ranges[1][0]:
        return f"{subject} != {show(ranges[0][1] + 1)}"
    spans = (show(a) if a == b else f"{show(a)}-{show(b)}" for a, b in ranges)
    return f"{subject} in {', '.join(spans)}"


def _outcome(instructions: list[kernel.Instruction], token: int, number: int) -> Outcome:
    """Every way through the program for that call."""
    return tuple(_paths(instructions, token, number))


def _paths(
    instructions: list[kernel.Instruction], token: int, number: int
) -> Iterator[tuple[dict[_Word, Ranges], int]]:
    pending = [_State(0)]
    paths = 0
    while pending:
        state = pending.pop()
        while True:
            if state.at >= len(instructions):
                raise Invalid("seccomp: the filter runs beyond its end")
            code, jt, jf, k = instructions[state.at]
            state.at += 1
            if code == kernel.RET_K:
                paths += 1
                if paths > PATHS:
                    raise Invalid("seccomp: the filter is too intricate to describe")
                yield state.facts, k
                break
            if code == kernel.LD_W_ABS:
                state.accumulator = _load(k, token, number)
            elif code == kernel.LD_IMM:
                state.accumulator = k
            elif code == kernel.ALU_AND_K:
                a = state.accumulator
                state.accumulator = _Word(a.name, a.mask & k) if isinstance(a, _Word) else a & k
            elif code == kernel.JMP_JA:
                state.at += k
            elif code in _JUMPS:
                other = _branch(state, code, k, (jt, jf))
                if other is not None:
                    pending.append(other)
            else:
                raise Invalid(f"seccomp: instruction {code:#x} is not one of a plain filter")


_JUMPS = (kernel.JMP_JEQ_K, kernel.JMP_JGT_K, kernel.JMP_JGE_K, kernel.JMP_JSET_K)


def _branch(state: _State, code: int, k: int, jumps: tuple[int, int]) -> _State | None:
    """Take the branch; where both ways are open, also return the state of the other one."""
    value = state.accumulator
    if code == kernel.JMP_JSET_K:
        value = _Word(value.name, value.mask & k) if isinstance(value, _Word) else value & k
    limits = {
        kernel.JMP_JEQ_K: (k, k),
        kernel.JMP_JGT_K: (k + 1, 0xFFFFFFFF),
        kernel.JMP_JGE_K: (k, 0xFFFFFFFF),
        kernel.JMP_JSET_K: (1, 0xFFFFFFFF),
    }[code]
    if isinstance(value, int):
        state.at += jumps[0] if limits[0] <= value <= limits[1] else jumps[1]
        return None
    known = state.facts.get(value, _ANY)
    yes, no = _split(known, *limits)
    if not yes or not no:
        state.at += jumps[0] if yes else jumps[1]
        return None
    other = _State(state.at + jumps[1], state.accumulator, {**state.facts, value: no})
    state.at += jumps[0]
    state.facts = {**state.facts, value: yes}
    return other


def _split(ranges: Ranges, low: int, high: int) -> tuple[Ranges, Ranges]:
    """What of `ranges` lies within low..high, and what outside."""
    inside: list[tuple[int, int]] = []
    outside: list[tuple[int, int]] = []
    for a, b in ranges:
        if max(a, low) <= min(b, high):
            inside.append((max(a, low), min(b, high)))
            if a < low:
                outside.append((a, low - 1))
            if b > high:
                outside.append((high + 1, b))
        else:
            outside.append((a, b))
    return tuple(inside), tuple(outside)


def _load(offset: int, token: int, number: int) -> "int | _Word":
    if offset == kernel.OFFSET_NUMBER:
        return number
    if offset == kernel.OFFSET_ARCHITECTURE:
        return token
    if offset in (8, 12):
        return _Word("instruction pointer" + (".high" if offset == 12 else ""))
    if offset < kernel.OFFSET_ARGUMENTS or offset >= 64 or offset % 4:
        raise Invalid(f"seccomp: load at offset {offset}")
    index, half = divmod(offset - kernel.OFFSET_ARGUMENTS, 8)
    return _Word(f"arg{index}" + (".high" if half else ""))
