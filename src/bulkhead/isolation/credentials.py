"""Who a process is: session, ids, capabilities, limits, filters, in the only order that works.

`plan_before` runs while the child is still all-powerful, `plan_drop` gives the power up. A system
call filter needs CAP_SYS_ADMIN unless no_new_privs is set: without it the filter is installed
before the capabilities go, with it as the very last step. See capabilities(7), seccomp(2).
"""

import struct
from collections.abc import Sequence

from bulkhead.errors import Invalid, Unsupported
from bulkhead.linux import prctl
from bulkhead.linux.program import Blob, Patched, Program, Slot
from bulkhead.oci.runtime import IOPriority, MemoryPolicy, Personality, Rlimit, Scheduler, User

KEYCTL_JOIN_SESSION_KEYRING = 1
SECCOMP_SET_MODE_FILTER = 1
_UMASK = 0o022
_ENOSYS = 38

RLIMITS: dict[str, int] = {
    name: number
    for number, name in enumerate(
        (
            "RLIMIT_CPU",
            "RLIMIT_FSIZE",
            "RLIMIT_DATA",
            "RLIMIT_STACK",
            "RLIMIT_CORE",
            "RLIMIT_RSS",
            "RLIMIT_NPROC",
            "RLIMIT_NOFILE",
            "RLIMIT_MEMLOCK",
            "RLIMIT_AS",
            "RLIMIT_LOCKS",
            "RLIMIT_SIGPENDING",
            "RLIMIT_MSGQUEUE",
            "RLIMIT_NICE",
            "RLIMIT_RTPRIO",
            "RLIMIT_RTTIME",
        )
    )
}
"""getrlimit(2), asm-generic numbers."""

_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_SCHEDULER_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
_MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
_MEMORY_FLAGS = {
    "MPOL_F_NUMA_BALANCING": 1 << 13,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_STATIC_NODES": 1 << 15,
}
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_PERSONALITIES = {"LINUX": 0, "LINUX32": 8}


def plan_session(program: Program, *, keyring: bool = True) -> None:
    """A session of its own, and a session keyring that holds nothing of the launcher's."""
    program.call("new session", "setsid")
    if keyring:
        step = "new session keyring"
        program.call(step, "keyctl", KEYCTL_JOIN_SESSION_KEYRING, None, ok=(_ENOSYS,))


def plan_rlimits(program: Program, limits: Sequence[Rlimit]) -> None:
    """Resource limits; late, for they bind the child too (open files)."""
    for limit in limits:
        number = RLIMITS.get(limit.type_)
        if number is None:
            raise Invalid(f"process.rlimits: unknown limit {limit.type_}")
        data = struct.pack("=QQ", limit.soft, limit.hard)
        program.call(f"set {limit.type_}", "prlimit64", 0, number, data, None)


def plan_scheduler(program: Program, scheduler: Scheduler) -> None:
    """sched_setattr(2)."""
    flags = 0
    for flag in scheduler.flags:
        if flag not in _SCHEDULER_FLAGS:
            raise Invalid(f"process.scheduler: unknown flag {flag}")
        flags |= _SCHEDULER_FLAGS[flag]
    data = struct.pack(
        "=IIQiIQQQ",
        48,
        _POLICIES[scheduler.policy],
        flags,
        scheduler.nice,
        scheduler.priority,
        scheduler.runtime,
        scheduler.deadline,
        scheduler.period,
    )
    program.call(f"set scheduling to {scheduler.policy}", "sched_setattr", 0, data, 0)


def cpu_mask(cpus: str, where: str = "process.execCPUAffinity", what: str = "processors") -> bytes:
    """The mask of a list like "0-3,7" for sched_setaffinity(2), in whole 8-byte words; Invalid."""
    mask = 0
    for part in cpus.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first, first)
        if not all(n.isascii() and n.isdigit() and len(n) < 5 for n in numbers):
            raise Invalid(f"{where}: {cpus!r} is not a list of {what}")
        low, high = map(int, numbers)
        if low > high:
            raise Invalid(f"{where}: {cpus!r} is not a list of {what}")
        mask |= (1 << high + 1) - (1 << low)
    return mask.to_bytes((mask.bit_length() + 63) // 64 * 8, "little")


def plan_affinity(program: Program, cpus: str) -> None:
    """Run on the processors of the list `cpus` only, if it is not empty; sched_setaffinity(2)."""
    if cpus:
        mask = cpu_mask(cpus)
        program.call(f"run on processors {cpus}", "sched_setaffinity", 0, len(mask), mask)


def plan_memory_policy(program: Program, policy: MemoryPolicy) -> None:
    """set_mempolicy(2); it goes through the exec."""
    if policy.mode not in _MEMORY_MODES:
        raise Invalid(f"linux.memoryPolicy: unknown mode {policy.mode!r}")
    mode = _MEMORY_MODES[policy.mode]
    for flag in policy.flags:
        if flag not in _MEMORY_FLAGS:
            raise Invalid(f"linux.memoryPolicy: unknown flag {flag!r}")
        mode |= _MEMORY_FLAGS[flag]
    mask = cpu_mask(policy.nodes, "linux.memoryPolicy.nodes", "nodes") if policy.nodes else None
    # The kernel takes one bit less than it is told.
    bits = len(mask) * 8 + 1 if mask else 0
    step = f"set the memory policy to {policy.mode}"
    program.call(step, "set_mempolicy", mode, mask, bits)


def plan_io_priority(program: Program, priority: IOPriority) -> None:
    """ioprio_set(2) for this process."""
    value = _IO_CLASSES[priority.class_] << 13 | priority.priority & 0x1FFF
    program.call("set the I/O priority", "ioprio_set", 1, 0, value)


def plan_personality(program: Program, personality: Personality) -> None:
    """personality(2)."""
    if personality.flags:
        raise Unsupported("linux.personality.flags are not supported")
    program.call("set the personality", "personality", _PERSONALITIES[personality.domain])


def plan_ids(program: Program, user: User, *, can_setgroups: bool = True) -> None:
    """Supplementary groups, group and user, keeping the capabilities for what comes after."""
    if can_setgroups:
        groups = struct.pack(f"={len(user.additional_gids)}I", *user.additional_gids)
        program.call(
            "set the supplementary groups", "setgroups", len(user.additional_gids), groups or None
        )
    if user.gid:
        gid = user.gid
        program.call(f"become group {gid}", "setresgid", gid, gid, gid)
    if user.uid:
        uid = user.uid
        # Otherwise the kernel would clear the capabilities here, and the filter needs them.
        program.call(
            "keep capabilities across the change of user",
            "prctl",
            prctl.SET_SECUREBITS,
            prctl.SECBIT_NO_SETUID_FIXUP,
            0,
            0,
            0,
        )
        program.call(f"become user {uid}", "setresuid", uid, uid, uid)
        program.call("reset securebits", "prctl", prctl.SET_SECUREBITS, 0, 0, 0, 0)
    umask = _UMASK if user.umask is None else user.umask
    program.call(f"set umask {umask:04o}", "umask", umask)


def plan_bounding(program: Program, drop: Sequence[int], names: Sequence[str]) -> None:
    """Take capabilities out of the bounding set."""
    for number, name in zip(drop, names, strict=True):
        program.call(
            f"drop {name} from the bounding set", "prctl", prctl.CAPBSET_DROP, number, 0, 0, 0
        )


def plan_capabilities(
    program: Program, header: bytes, data: bytes, ambient: Sequence[int], *, clear_ambient: bool
) -> None:
    """capset(2), then the ambient set."""
    program.call("set capabilities", "capset", header, data)
    if clear_ambient:
        program.call(
            "clear ambient capabilities", "prctl", prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_CLEAR_ALL,
            0, 0, 0,
        )  # fmt: skip
    for number in ambient:
        program.call(
            "raise an ambient capability", "prctl", prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_RAISE,
            number, 0, 0,
        )  # fmt: skip


def plan_no_new_privs(program: Program) -> None:
    """No program run from here on gains privileges; prctl(2) PR_SET_NO_NEW_PRIVS."""
    program.call("set no_new_privs", "prctl", prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def plan_seccomp(program: Program, filter_: bytes, flags: int) -> Slot:
    """Install a filter: an array of struct sock_filter, 8 bytes each; what seccomp(2) returns."""
    if not filter_ or len(filter_) % 8:
        raise Invalid("a seccomp filter is not a whole number of instructions")
    code = Blob(filter_)
    # struct sock_fprog: a length in instructions, padding, a pointer.
    fprog = Patched(struct.pack("=H6xQ", len(filter_) // 8, 0), ((8, 8, code),))
    step = "install the system call filter"
    return program.call(step, "seccomp", SECCOMP_SET_MODE_FILTER, flags, fprog)


def plan_working_directory(program: Program, root: Slot, cwd: str, how: bytes, size: int) -> None:
    """Enter `cwd` inside `root` without following magic links (a descriptor of the host's)."""
    relative = cwd.lstrip("/") or "."
    fd = program.call(f"open {cwd}", "openat2", root, relative, how, size)
    program.call(f"enter {cwd}", "fchdir", fd)


def plan_close(program: Program) -> None:
    """Close every descriptor but the standard streams: no path leads to the host through one."""
    program.close("close all other descriptors")
