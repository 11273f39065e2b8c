"""Capabilities as the kernel has them: numbers, this process's sets, capset(2)'s structures.

See capabilities(7) and include/uapi/linux/capability.h.
"""

import struct
from dataclasses import dataclass
from functools import cache

NAMES: tuple[str, ...] = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
"""In the order of their numbers."""

NUMBERS: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

_VERSION_3 = 0x20080522


@dataclass(frozen=True, slots=True)
class Sets:
    """The five sets of a thread, as bit masks."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


def mask(names: "tuple[str, ...] | list[str] | frozenset[str] | set[str]") -> int:
    """The bit mask of `names`; KeyError for one this table lacks."""
    total = 0
    for name in names:
        total |= 1 << NUMBERS[name]
    return total


def names(bits: int) -> tuple[str, ...]:
    """The names in a mask, by number; bits beyond this table are named "CAP_<number>"."""
    return tuple(
        NAMES[number] if number < len(NAMES) else f"CAP_{number}"
        for number in range(bits.bit_length())
        if bits >> number & 1
    )


def of_process(pid: int | str = "self") -> Sets:
    """The sets of process `pid` from /proc/PID/status; OSError if it is gone."""
    found: dict[str, int] = {}
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Cap"):
                key, _, value = line.partition(":")
                found[key] = int(value, 16)
    return Sets(found["CapInh"], found["CapPrm"], found["CapEff"], found["CapBnd"], found["CapAmb"])


@cache
def last() -> int:
    """The highest capability number of the running kernel."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return int(file.read())


def capset_arguments(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """capset(2)'s two structures (version 3, for the calling thread) as bytes."""
    header = struct.pack("=Ii", _VERSION_3, 0)
    data = b"".join(
        struct.pack(
            "=III",
            effective >> shift & 0xFFFFFFFF,
            permitted >> shift & 0xFFFFFFFF,
            inheritable >> shift & 0xFFFFFFFF,
        )
        for shift in (0, 32)
    )
    return header, data
