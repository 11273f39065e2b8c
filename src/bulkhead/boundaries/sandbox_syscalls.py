"""The host system calls of a user-mode-linux jail: its kernel, the monitor beside it, ld.so.

The guest's own system calls are none of these: they are intercepted by ptrace (PTRACE_SYSEMU) and
never reach the host's kernel. The list is what linux.uml imports and what traces of boots, disks,
networks, many processes and ends show; anything else fails with EPERM. File names reach only the
jail's own read-only root, its disks and its temporary file system.
"""

from functools import cache
from typing import Literal

from bulkhead.oci.runtime import Seccomp, Syscall, SyscallArg

CALLS: tuple[tuple[str, str], ...] = (
    ("read write readv writev pread64 pwrite64 lseek close", "console, channel, disks"),
    ("recvmsg recvmmsg recvfrom sendmsg sendmmsg sendto", "tap packets, the monitor's sockets"),
    ("openat open newfstatat fstat stat lstat statx statfs fstatfs access faccessat faccessat2",
     "ld.so, disks, the memory file"),
    ("umask chmod fchmod", "the modes of the memory file and of the monitor's socket"),
    ("mkdir rmdir unlink unlinkat getdents64 readlink getcwd", "its pid directory in /tmp"),
    ("ftruncate fallocate fsync fdatasync", "memory file; the guest's flushes of its disk"),
    ("mmap munmap mprotect madvise brk mremap", "guest memory; also done by the stubs"),
    ("clone fork vfork wait4 waitid exit exit_group", "one host process per guest address space"),
    ("ptrace", "how guest processes are run; only its own children are traced"),
    ("kill tgkill getpid gettid getppid setsid setpgid getpgrp", "its own processes"),
    ("rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sigaltstack",
     "interrupts of the guest are signals"),
    ("signalfd4 pidfd_open pidfd_send_signal", "the monitor waits for its kernel"),
    ("timer_create timer_settime timer_gettime timer_delete clock_gettime clock_nanosleep "
     "nanosleep gettimeofday getrandom uname", "the guest's clock and entropy"),
    ("epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait poll ppoll eventfd2 pipe2",
     "interrupt sources of the guest; the monitor's loop"),
    ("socketpair bind listen accept4 connect shutdown getsockname getsockopt setsockopt",
     "sockets between the threads of the kernel, and of the monitor"),
    ("fcntl dup dup2 dup3 close_range", "descriptors"),
    ("execve arch_prctl set_tid_address set_robust_list rseq prlimit64 getrlimit setrlimit futex",
     "start of a program; ld.so and libc"),
    ("prctl", "names, death signal"),
    ("getuid geteuid getgid getegid", "libc, ld.so"),
    ("sched_yield sched_getaffinity restart_syscall", "libc"),
)  # fmt: skip
"""System calls, with the reason."""

IOCTLS: tuple[tuple[int, str], ...] = (
    (0x5401, "TCGETS: is it a terminal"),
    (0x5402, "TCSETS: raw mode"),
    (0x5403, "TCSETSW"),
    (0x5404, "TCSETSF"),
    (0x540B, "TCFLSH"),
    (0x5413, "TIOCGWINSZ: the size to pass on"),
    (0x541B, "FIONREAD"),
    (0x5421, "FIONBIO"),
    (0x5452, "FIOASYNC"),
)
"""Requests of ioctl(2): what reads and sets a terminal's mode, nothing that types into it."""

_AF_UNIX = 1
_NEW_NAMESPACES = 0x7E020000
_ENOSYS = 38


@cache
def profile() -> Seccomp:
    """The filter; one object, since compiled filters are kept by identity."""
    allow: Literal["SCMP_ACT_ALLOW"] = "SCMP_ACT_ALLOW"
    plain = [name for names, _ in CALLS for name in names.split() if name != "clone"]
    return Seccomp(
        default_action="SCMP_ACT_ERRNO",
        default_errno_ret=1,
        architectures=["SCMP_ARCH_X86_64"],
        syscalls=[
            Syscall(names=plain, action=allow),
            Syscall(
                names=["clone"],
                action=allow,
                args=[SyscallArg(0, _NEW_NAMESPACES, "SCMP_CMP_MASKED_EQ", 0)],
            ),
            # libc then uses clone, whose flags can be read by a filter.
            Syscall(names=["clone3"], action="SCMP_ACT_ERRNO", errno_ret=_ENOSYS),
            Syscall(names=["socket"], action=allow, args=[SyscallArg(0, _AF_UNIX, "SCMP_CMP_EQ")]),
            Syscall(
                names=["ioctl"],
                action=allow,
                args=[SyscallArg(1, request, "SCMP_CMP_EQ") for request, _ in IOCTLS],
            ),
        ],
    )
