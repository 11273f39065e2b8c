"""The host system calls of a guest's file server (native/files*.c), a static program.

It is sent a socket and makes none; it starts nothing, mounts nothing and changes no limits. What it
may do to files it may only do in its own mounts.
"""

from functools import cache
from typing import Literal

from bulkhead.oci.runtime import Seccomp, Syscall

CALLS: tuple[tuple[str, str], ...] = (
    ("read write writev poll ppoll restart_syscall", "the socket; last words"),
    ("open openat close fcntl", "files, once their kind is known; locks"),
    ("statx newfstatat fstat stat fstatfs readlink readlinkat getdents64", "what is there"),
    ("chown fchown fchownat chmod fchmod fchmodat utimensat", "owners, modes, times"),
    ("mknodat mkdirat symlinkat linkat unlinkat renameat renameat2", "names"),
    ("pread64 pwrite64 pwritev2 ftruncate fallocate lseek copy_file_range", "contents"),
    ("fsync fdatasync flock", "what the guest asks for"),
    ("getxattr listxattr setxattr removexattr", "a few extended attributes"),
    ("mmap munmap mremap mprotect madvise brk getrandom", "memory"),
    ("execve arch_prctl set_tid_address set_robust_list rseq prlimit64 uname umask", "its start"),
    ("prctl", "the death signal is cleared by it: a server outlives the holder"),
    ("rt_sigaction rt_sigprocmask rt_sigreturn tgkill getpid gettid exit exit_group", "its end"),
)
"""System calls, with the reason."""


@cache
def profile() -> Seccomp:
    """The filter; one object, since compiled filters are kept by identity."""
    allow: Literal["SCMP_ACT_ALLOW"] = "SCMP_ACT_ALLOW"
    return Seccomp(
        default_action="SCMP_ACT_ERRNO",
        default_errno_ret=1,
        architectures=["SCMP_ARCH_X86_64"],
        syscalls=[Syscall(names=[n for names, _ in CALLS for n in names.split()], action=allow)],
    )
