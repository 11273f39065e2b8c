"""The host system calls of a microVM's jail: QEMU, the monitor beside it, ld.so.

QEMU's own filter (-sandbox) is installed inside of this one and forbids more once it runs. The list
is what traces of boots, disks, networks, clones and ends show; anything else fails with EPERM. File
names reach only the jail's own read-only root, its disks and its temporary file system.
"""

from functools import cache
from typing import Literal

from bulkhead.oci.runtime import Seccomp, Syscall, SyscallArg

CALLS: tuple[tuple[str, str], ...] = (
    ("read write readv writev pread64 pwrite64 preadv pwritev lseek close", "disks, channel, taps"),
    ("recvmsg recvfrom sendmsg sendto", "the monitor's sockets, the channel"),
    ("openat open newfstatat fstat stat lstat statx statfs fstatfs access faccessat faccessat2 "
     "readlink readlinkat getdents64 getcwd fchdir", "ld.so, kernel, disks"),
    ("unlink fchmod chmod umask", "the monitor's socket"),
    ("ftruncate fallocate fsync fdatasync fadvise64", "the guest's flushes and discards"),
    ("mmap munmap mprotect madvise brk mremap mlock memfd_create get_mempolicy set_mempolicy mbind "
     "msync", "guest memory, translated code"),
    ("clone exit exit_group wait4 waitid", "threads; QEMU, which the monitor starts"),
    ("kill tgkill tkill getpid gettid getppid setsid", "its own processes"),
    ("rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigpending "
     "sigaltstack signalfd4 signalfd", "signals"),
    ("pidfd_open pidfd_send_signal", "the monitor waits for QEMU"),
    ("timer_create timer_settime timer_gettime timer_delete timer_getoverrun timerfd_create "
     "timerfd_settime timerfd_gettime clock_gettime clock_getres clock_nanosleep nanosleep "
     "gettimeofday time getrandom uname sysinfo", "the guest's clock and entropy"),
    ("epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait poll ppoll select pselect6 "
     "eventfd2 eventfd pipe2 pipe", "event loops"),
    ("socketpair bind listen accept4 accept connect shutdown getsockname getpeername getsockopt "
     "setsockopt", "the monitor's sockets, the channel"),
    ("fcntl dup dup2 dup3 close_range", "descriptors"),
    ("execve arch_prctl set_tid_address set_robust_list rseq prlimit64 getrlimit futex membarrier",
     "start of a program, threads"),
    ("prctl seccomp", "names, death signal, QEMU's own filter"),
    ("getuid geteuid getgid getegid getresuid getresgid", "libc"),
    ("sched_yield sched_getaffinity sched_getparam sched_getscheduler getcpu restart_syscall",
     "libc, threads"),
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
    (0x800454CF, "TUNGETFEATURES"),
    (0x800454D2, "TUNGETIFF"),
    (0x400454D0, "TUNSETOFFLOAD: what the guest can do"),
    (0x400454D4, "TUNSETSNDBUF"),
    (0x800454D7, "TUNGETVNETHDRSZ"),
    (0x400454D8, "TUNSETVNETHDRSZ"),
    (0x400454DC, "TUNSETVNETLE"),
    (0x80081272, "BLKGETSIZE64: a volume that is a block device"),
    (0x1268, "BLKSSZGET"),
)
"""Requests of ioctl(2) on terminals, taps and disks; none that types into a terminal."""

_KVM = 0xAE00
"""What all requests of /dev/kvm have in their second byte."""
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
            # QEMU then uses threads for its disks.
            Syscall(names=["io_uring_setup"], action="SCMP_ACT_ERRNO", errno_ret=_ENOSYS),
            Syscall(names=["socket"], action=allow, args=[SyscallArg(0, _AF_UNIX, "SCMP_CMP_EQ")]),
            Syscall(
                names=["ioctl"],
                action=allow,
                args=[SyscallArg(1, request, "SCMP_CMP_EQ") for request, _ in IOCTLS],
            ),
            Syscall(
                names=["ioctl"],
                action=allow,
                args=[SyscallArg(1, 0xFF00, "SCMP_CMP_MASKED_EQ", _KVM)],
            ),
        ],
    )
