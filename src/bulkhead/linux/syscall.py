"""Raw system calls: numbers by architecture, errors as OSError. See syscall(2), syscalls(2).

An unknown architecture is refused, never guessed: the numbers differ.
"""

import ctypes
import os
from functools import cache

_COMMON_SINCE_5_0 = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "faccessat2": 439,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    "statmount": 457,
    "listmount": 458,
}

NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "ioctl": 16, "dup": 32, "dup2": 33,
        "dup3": 292, "sendmsg": 46, "setsid": 112, "chdir": 80, "fchdir": 81, "umask": 95,
        "setuid": 105, "setgid": 106, "setgroups": 116, "setresuid": 117, "setresgid": 119,
        "capget": 125, "capset": 126, "personality": 135, "sched_setscheduler": 144,
        "prctl": 157, "setrlimit": 160, "prlimit64": 302, "chroot": 161, "mount": 165,
        "umount2": 166, "sethostname": 170, "setdomainname": 171, "pivot_root": 155,
        "setpriority": 141, "ioprio_set": 251, "sched_setaffinity": 203, "sched_setattr": 314,
        "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263,
        "symlinkat": 266, "fchmodat": 268, "unshare": 272, "setns": 308, "seccomp": 317,
        "bpf": 321, "execveat": 322, "execve": 59, "keyctl": 250, "exit_group": 231,
        "fchmod": 91, "fchown": 93, "getpid": 39, "kill": 62, "memfd_create": 319,
        "quotactl": 179, "finit_module": 313, "set_mempolicy": 238, "getdents64": 217,
        "newfstatat": 262,
        "statx": 332, "inotify_init1": 294, "inotify_add_watch": 254,
        "copy_file_range": 326, "fcntl": 72, "pipe2": 293, "wait4": 61,
        "socket": 41, "clock_settime": 227, "nanosleep": 35, "kcmp": 312,
        **_COMMON_SINCE_5_0,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "fstat": 80, "ioctl": 29, "dup": 23, "dup3": 24,
        "sendmsg": 211, "setsid": 157, "chdir": 49, "fchdir": 50, "umask": 166, "setuid": 146,
        "setgid": 144, "setgroups": 159, "setresuid": 147, "setresgid": 149, "capget": 90,
        "capset": 91, "personality": 92, "sched_setscheduler": 119, "prctl": 167,
        "setrlimit": 164, "prlimit64": 261, "chroot": 51, "mount": 40, "umount2": 39,
        "sethostname": 161, "setdomainname": 162, "pivot_root": 41, "setpriority": 140,
        "ioprio_set": 30, "sched_setaffinity": 122, "sched_setattr": 274, "openat": 56,
        "mkdirat": 34, "mknodat": 33, "fchownat": 54, "unlinkat": 35, "symlinkat": 36,
        "fchmodat": 53, "unshare": 97, "setns": 268, "seccomp": 277, "bpf": 280,
        "execveat": 281, "execve": 221, "keyctl": 219, "exit_group": 94, "fchmod": 52,
        "fchown": 55, "getpid": 172, "kill": 129, "memfd_create": 279, "quotactl": 60,
        "finit_module": 273,
        "set_mempolicy": 237, "getdents64": 61, "newfstatat": 79, "statx": 291,
        "inotify_init1": 26, "inotify_add_watch": 27,
        "copy_file_range": 285, "fcntl": 25, "pipe2": 59, "wait4": 260,
        "socket": 198, "clock_settime": 112, "nanosleep": 101, "kcmp": 272,
        **_COMMON_SINCE_5_0,
    },
}  # fmt: skip


@cache
def machine() -> str:
    """This process's architecture, as uname(2) names it; OSError(ENOSYS) if we have no table."""
    name = os.uname().machine
    if name not in NUMBERS:
        raise OSError(38, f"no system call table for architecture {name}")
    return name


@cache
def number(name: str) -> int:
    """The number of system call `name` here; OSError(ENOSYS) if this table lacks it."""
    try:
        return NUMBERS[machine()][name]
    except KeyError:
        raise OSError(38, f"system call {name} is not in the table of {machine()}") from None


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


type_word = ctypes.c_long
"""What every register argument is widened to."""


def call(name: str, *arguments: "int | ctypes.Array[ctypes.c_char] | bytes | None") -> int:
    """Make system call `name`; returns what the kernel returns, raises OSError with errno.

    An int is passed as a register, bytes and ctypes buffers by address, None as NULL. EINTR is
    raised like any other error: callers that may be interrupted retry.
    """
    converted = [
        type_word(a) if isinstance(a, int) else ctypes.c_char_p(a) if isinstance(a, bytes) else a
        for a in arguments
    ]
    result: int = _libc().syscall(type_word(number(name)), *converted)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result
