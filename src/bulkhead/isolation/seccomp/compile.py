"""OCI's `linux.seccomp` as a classic BPF program, for each architecture a balanced tree.

Meaning of the rules, as runc and libseccomp have it:

- a rule whose action is the default action is left out;
- a rule without conditions beats every rule with conditions on that call; among rules without
  conditions, and among those with, the first that matches wins;
- the conditions of a rule must all hold, unless two of them are on one argument: then each of
  them is a rule of its own;
- names that an architecture does not have are left out there;
- a call newer than the newest the rules name is answered ENOSYS, unless the default action lets
  calls through: C libraries then fall back to older calls;
- calls of architectures that are not listed kill the process. x32 calls are always ENOSYS: no
  distribution uses that interface and its second numbering has hidden holes before.

The kernel's own bitmap (seccomp_cache_prepare, 5.11) skips the program for calls that it always
allows: the program therefore decides by number before it loads any argument.
"""

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid, Unsupported
from bulkhead.linux import seccomp as kernel
from bulkhead.linux import syscall
from bulkhead.oci.runtime import Seccomp, Syscall

ARCHITECTURES = {
    "SCMP_ARCH_X86_64": "x86_64",
    "SCMP_ARCH_X86": "x86",
    "SCMP_ARCH_AARCH64": "aarch64",
    "SCMP_ARCH_ARM": "arm",
}
RUNS_HERE = {"x86_64": ("x86_64", "x86"), "aarch64": ("aarch64", "arm")}
"""Machine → architectures whose calls its kernel can receive; others are left out."""

_OTHERS = frozenset(
    f"SCMP_ARCH_{name}"
    for name in (
        "X32", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64",
        "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH",
        "SHEB",
    )
)  # fmt: skip

ACTIONS = {
    "SCMP_ACT_KILL": kernel.RET_KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": kernel.RET_KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": kernel.RET_KILL_PROCESS,
    "SCMP_ACT_TRAP": kernel.RET_TRAP,
    "SCMP_ACT_ERRNO": kernel.RET_ERRNO,
    "SCMP_ACT_TRACE": kernel.RET_TRACE,
    "SCMP_ACT_ALLOW": kernel.RET_ALLOW,
    "SCMP_ACT_LOG": kernel.RET_LOG,
    "SCMP_ACT_NOTIFY": kernel.RET_USER_NOTIF,
}
_WITH_DATA = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_PERMISSIVE = (kernel.RET_ALLOW, kernel.RET_LOG, kernel.RET_TRACE)

_ENOSYS = kernel.RET_ERRNO | errno.ENOSYS
_ARM_PRIVATE = 0x0F0000
"""__ARM_NR_BASE: numbers from here on are not in the sequence that grows."""

# linux/net.h and linux/ipc.h: 32-bit x86 reaches these calls through socketcall(2) and ipc(2) too.
_MULTIPLEXED = {
    name: (call, number)
    for call, names in (
        (
            "socketcall",
            "socket bind connect listen accept getsockname getpeername socketpair send recv sendto"
            " recvfrom shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg",
        ),
        ("ipc", "semop semget semctl semtimedop"),
    )
    for number, name in enumerate(names.split(), 1)
} | {
    name: ("ipc", number)
    for name, number in {
        "msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
        "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
    }.items()
}  # fmt: skip

Condition = tuple[int, str, int, int]
"""Argument, operator, value, second value."""
Conditions = tuple[Condition, ...]
Chain = tuple[tuple[Conditions, int], ...]
Decision = int | Chain
"""An action word, or (conditions, action word) pairs to be tried before the default action."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled filter: the instructions and the flags to install them with."""

    program: bytes
    flags: int

    @property
    def digest(self) -> str:
        """sha256 of program and flags, in hexadecimal."""
        return hashlib.sha256(self.flags.to_bytes(4, "little") + self.program).hexdigest()

    @property
    def instructions(self) -> int:
        """How many."""
        return len(self.program) // 8


def compile_filter(seccomp: Seccomp, *, machine: str | None = None) -> Filter:
    """The filter that `seccomp` is on `machine` (this one by default).

    Invalid for what has no meaning or does not fit the kernel's 4096 instructions; Unsupported
    for a machine without a system call table.
    """
    if machine is None:
        machine = syscall.machine()
    if machine not in RUNS_HERE:
        raise Unsupported(f"seccomp: no system call table for {machine}; use seccomp=unconfined")
    default = action_word(seccomp.default_action, seccomp.default_errno_ret)
    assembler = _Assembler()
    bad = assembler.ret(kernel.RET_KILL_PROCESS)
    trees = [
        (kernel.ARCHITECTURES[name], _tree(assembler, decide(seccomp, name, default), default))
        for name in reversed(_listed(seccomp, machine))
    ]
    target = bad
    for token, tree in trees:
        target = assembler.branch(kernel.JMP_JEQ_K, token, tree, target)
    assembler.load(kernel.OFFSET_ARCHITECTURE)
    return Filter(assembler.finish(), _flags(seccomp))


def action_word(action: str, errno_ret: int | None) -> int:
    """SECCOMP_RET_… with its data; Invalid if `errno_ret` does not go with the action."""
    word = ACTIONS[action]
    if action in _WITH_DATA:
        value = errno.EPERM if errno_ret is None else errno_ret
        # seccomp(2) cuts ERRNO off at MAX_ERRNO.
        if value > (4095 if action == "SCMP_ACT_ERRNO" else 0xFFFF):
            raise Invalid(f"seccomp: errnoRet {value} is too large for {action}")
        return word | value
    if errno_ret:
        raise Invalid(f"seccomp: errnoRet {errno_ret} does not go with {action}")
    return word


def unknown_names(seccomp: Seccomp) -> list[str]:
    """Names that no architecture has: misspelt, or newer than our tables. They have no effect."""
    known = kernel.known_names()
    return sorted({name for rule in seccomp.syscalls for name in rule.names if name not in known})


def decide(seccomp: Seccomp, architecture: str, default: int) -> list[tuple[int, Decision]]:
    """What to do by system call number: (first number, decision), ascending from 0, to the next."""
    numbers = kernel.numbers(architecture)
    always: dict[int, int] = {}
    sometimes: dict[int, list[tuple[Conditions, int]]] = {}
    newest = -1
    for rule in seccomp.syscalls:
        word = action_word(rule.action, rule.errno_ret)
        alternatives = _alternatives(rule)
        for name in rule.names:
            number = numbers.get(name)
            if number is not None and number < _ARM_PRIVATE:
                newest = max(newest, number)
            if word == default:
                continue
            if number is not None:
                if rule.args:
                    sometimes.setdefault(number, []).extend((a, word) for a in alternatives)
                else:
                    always.setdefault(number, word)
            if architecture == "x86" and not rule.args and name in _MULTIPLEXED:
                call, value = _MULTIPLEXED[name]
                condition = ((0, "SCMP_CMP_EQ", value, 0),)
                newest = max(newest, numbers[call])
                sometimes.setdefault(numbers[call], []).append((condition, word))
    decisions: dict[int, Decision] = {n: tuple(chain) for n, chain in sometimes.items()}
    decisions |= always
    # Beyond `newest` nothing was known to whoever wrote the rules.
    strict = default & kernel.RET_ACTION_FULL not in _PERMISSIVE
    beyond = _ENOSYS if strict and newest >= 0 else default
    ceiling = kernel.X32_BIT if architecture == "x86_64" else None
    return _ranges(decisions, default, newest, beyond, ceiling)


def _ranges(
    decisions: dict[int, Decision], default: int, newest: int, beyond: int, ceiling: int | None
) -> list[tuple[int, Decision]]:
    private = any(number >= _ARM_PRIVATE for number in decisions)
    starts: dict[int, Decision] = {0: default, newest + 1: beyond}
    if private:
        starts[_ARM_PRIVATE] = default
    if ceiling is not None:
        starts[ceiling] = _ENOSYS
    for number in sorted(decisions):
        if number + 1 not in starts:
            starts[number + 1] = default
    starts |= decisions
    ranges: list[tuple[int, Decision]] = []
    for start in sorted(starts):
        if not ranges or ranges[-1][1] != starts[start]:
            ranges.append((start, starts[start]))
    return ranges


def _alternatives(rule: Syscall) -> list[Conditions]:
    for argument in rule.args:
        if argument.index > 5:
            raise Invalid(f"seccomp: {rule.names[0]}: argument index {argument.index} is above 5")
    conditions = [(a.index, a.op, a.value, a.value_two) for a in rule.args]
    if len({a.index for a in rule.args}) < len(rule.args):
        return [(condition,) for condition in conditions]
    return [tuple(conditions)]


def _listed(seccomp: Seccomp, machine: str) -> list[str]:
    """The architectures of the filter, this machine's own first."""
    listed = [machine]
    for name in seccomp.architectures:
        if name in _OTHERS:
            continue
        if name not in ARCHITECTURES:
            raise Invalid(f"seccomp: unknown architecture {name!r}")
        ours = ARCHITECTURES[name]
        if ours in RUNS_HERE[machine] and ours not in listed:
            listed.append(ours)
    return listed


def _flags(seccomp: Seccomp) -> int:
    """The flags to install with; without any, SPEC_ALLOW as runc has it (speed, kernel 4.17)."""
    names = seccomp.flags or ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    total = 0
    for name in names:
        if name not in kernel.FLAGS:
            raise Invalid(f"seccomp: unknown flag {name!r}")
        total |= kernel.FLAGS[name]
    return total


def _tree(assembler: "_Assembler", ranges: Sequence[tuple[int, Decision]], default: int) -> int:
    """Emit the decision on the call's number; returns where it starts (loading the number)."""

    def emit(low: int, high: int) -> int:
        if high - low == 1:
            decision = ranges[low][1]
            if isinstance(decision, int):
                return assembler.ret(decision)
            return assembler.chain(decision, default)
        middle = (low + high) // 2
        right = emit(middle, high)
        left = emit(low, middle)
        return assembler.branch(kernel.JMP_JGE_K, ranges[middle][0], right, left)

    top = emit(0, len(ranges))
    if top != assembler.here():
        top = assembler.jump(top)
    return assembler.load(kernel.OFFSET_NUMBER)


class _Assembler:
    """Classic BPF, written from its end: jumps go forward only, so each target is known.

    A position is an index from the end. A load runs into what was emitted just before it, so
    nothing may come between a branch and its load.
    """

    def __init__(self) -> None:
        self._code: list[kernel.Instruction] = []
        self._rets: dict[int, int] = {}

    def here(self) -> int:
        """Where the last emitted instruction is."""
        return len(self._code) - 1

    def _emit(self, code: int, k: int, jt: int = 0, jf: int = 0) -> int:
        self._code.append((code, jt, jf, k))
        return len(self._code) - 1

    def ret(self, action: int) -> int:
        """Where the filter ends with `action`; one in reach is used again."""
        known = self._rets.get(action)
        if known is None or len(self._code) - known > 200:
            known = self._rets[action] = self._emit(kernel.RET_K, action)
        return known

    def jump(self, target: int) -> int:
        """Go to `target`, however far."""
        return self._emit(kernel.JMP_JA, len(self._code) - 1 - target)

    def branch(self, code: int, k: int, true: int, false: int) -> int:
        """Compare; offsets are 8 bits, what is farther goes through a jump."""
        if true == false:
            return true if true == self.here() else self.jump(true)
        if len(self._code) - true > 250:
            true = self.jump(true)
        if len(self._code) - false > 250:
            false = self.jump(false)
        at = len(self._code) - 1
        return self._emit(code, k, at - true, at - false)

    def load(self, offset: int) -> int:
        """Load the word at `offset` of struct seccomp_data, then run on."""
        return self._emit(kernel.LD_W_ABS, offset)

    def chain(self, chain: Chain, default: int) -> int:
        """Try rules in order, then the default action."""
        otherwise = self.ret(default)
        for conditions, action in reversed(chain):
            target = self.ret(action)
            for condition in reversed(conditions):
                target = self._compare(condition, target, otherwise)
            otherwise = target
        return otherwise

    def _compare(self, condition: Condition, true: int, false: int) -> int:
        """One 64-bit comparison in two halves; see the layout of struct seccomp_data."""
        index, operator, value, second = condition
        low = kernel.OFFSET_ARGUMENTS + 8 * index  # both our machines are little-endian
        if operator == "SCMP_CMP_MASKED_EQ":
            return self._masked(low, value, second, true, false)
        if operator in ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE"):
            true, false = false, true
        high_value, low_value = value >> 32, value & 0xFFFFFFFF
        if operator in ("SCMP_CMP_EQ", "SCMP_CMP_NE"):
            self.branch(kernel.JMP_JEQ_K, low_value, true, false)
            at = self.load(low)
            self.branch(kernel.JMP_JEQ_K, high_value, at, false)
            return self.load(low + 4)
        code = kernel.JMP_JGE_K if operator in ("SCMP_CMP_GE", "SCMP_CMP_LT") else kernel.JMP_JGT_K
        self.branch(code, low_value, true, false)
        at = self.load(low)
        at = self.branch(kernel.JMP_JEQ_K, high_value, at, false)
        self.branch(kernel.JMP_JGT_K, high_value, true, at)
        return self.load(low + 4)

    def _masked(self, low: int, mask: int, value: int, true: int, false: int) -> int:
        self.branch(kernel.JMP_JEQ_K, value & 0xFFFFFFFF, true, false)
        self._emit(kernel.ALU_AND_K, mask & 0xFFFFFFFF)
        at = self.load(low)
        if mask >> 32 == value >> 32 == 0:
            return at
        self.branch(kernel.JMP_JEQ_K, value >> 32, at, false)
        self._emit(kernel.ALU_AND_K, mask >> 32)
        return self.load(low + 4)

    def finish(self) -> bytes:
        """The program; Invalid beyond the kernel's limit."""
        if len(self._code) > kernel.MAX_INSTRUCTIONS:
            raise Invalid(
                f"seccomp: the filter has {len(self._code)} instructions, the kernel takes"
                f" {kernel.MAX_INSTRUCTIONS}; use fewer rules with conditions on arguments"
            )
        return kernel.pack(self._code[::-1])
