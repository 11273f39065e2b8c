"""e2fsck(8) on a disk that a guest has written, in a jail.

    python -I -m bulkhead.volumes.checker IMAGE

What the program reads is hostile. It therefore runs as a user of its own, without capabilities, in
namespaces of its own without a network, sees the host's files but can write to none, can make no
file grow beyond the disk, and has a filter with the few system calls that it needs. It has the
image as descriptor 3, by whose name it opens it. Exit codes are e2fsck's; 125 if the jail cannot be
made.
"""

import os
import resource
import shutil
import signal
import sys

from bulkhead.isolation.seccomp.compile import compile_filter
from bulkhead.linux import mounts, namespaces, prctl, seccomp
from bulkhead.oci.runtime import Seccomp, Syscall, SyscallArg

UIDS = range(0x6F000000, 0x6F400000)
"""Nobody's; below those of guests. One per process id: two that run cannot reach each other."""
FAILED = 125
_IMAGE = 3
_PATHS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
_SECONDS = 600
_MEMORY = 2 << 30
_NO_NEW_PRIVS = 38
_DEATH = 1
CALLS: tuple[tuple[str, str], ...] = (
    ("read write pread64 pwrite64 readv writev lseek close", "the disk, messages"),
    ("openat open newfstatat fstat stat lstat statx access faccessat faccessat2 readlink getcwd",
     "ld.so, its configuration, the disk"),
    ("fsync fdatasync fallocate fadvise64 ftruncate", "the disk"),
    ("mmap munmap mprotect madvise brk mremap", "memory"),
    ("rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack alarm setitimer", "its own signals"),
    ("clock_gettime gettimeofday time nanosleep clock_nanosleep getrandom uname sysinfo", "libc"),
    ("getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid", "libc"),
    ("prctl arch_prctl set_tid_address set_robust_list rseq prlimit64 getrlimit getrusage futex",
     "ld.so, libc"),
    ("sched_yield sched_getaffinity sysfs statfs fstatfs umask dup dup2 fcntl pipe2 poll", "libc"),
    ("execve exit exit_group kill tgkill", "its beginning and its end"),
)  # fmt: skip
"""System calls, with the reason."""
IOCTLS = (0x80081272, 0x1260, 0x1268, 0x127B, 0x127C, 0x5401, 0x5413)
"""BLKGETSIZE64, BLKGETSIZE, BLKSSZGET, BLKPBSZGET, BLKDISCARDZEROES; is it a terminal."""


def profile() -> Seccomp:
    """The filter; anything else fails with EPERM."""
    plain = [name for names, _ in CALLS for name in names.split()]
    return Seccomp(
        default_action="SCMP_ACT_ERRNO",
        default_errno_ret=1,
        syscalls=[
            Syscall(names=plain, action="SCMP_ACT_ALLOW"),
            Syscall(
                names=["ioctl"],
                action="SCMP_ACT_ALLOW",
                args=[SyscallArg(1, request, "SCMP_CMP_EQ") for request in IOCTLS],
            ),
        ],
    )


def own_uid() -> int:
    """The user, and group, of this process's jail; process ids are below 1 << 22 (proc(5))."""
    return UIDS[os.getpid()]


def confine(size: int) -> None:
    """Give up everything but the image."""
    uid = own_uid()
    namespaces.unshare(
        namespaces.NEWNS | namespaces.FLAGS["network"] | namespaces.FLAGS["ipc"]
        | namespaces.FLAGS["uts"]
    )  # fmt: skip
    with mounts.clone_tree("/", recursive=True) as root:
        mounts.set_attributes(
            int(root), set_=mounts.ATTR_RDONLY | mounts.ATTR_NOSUID,
            propagation=mounts.MS_PRIVATE, recursive=True,
        )  # fmt: skip
        mounts.attach(int(root), "/")
        os.fchdir(int(root))
    os.chroot(".")
    os.chdir("/")
    for kind, most in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl.prctl(_DEATH, signal.SIGKILL)
    prctl.prctl(_NO_NEW_PRIVS, 1)


def main(path: str) -> int:
    """Become e2fsck."""
    program = shutil.which("e2fsck", path=_PATHS)
    if program is None:
        sys.stderr.write("e2fsck is not installed: apt-get install e2fsprogs\n")
        return FAILED
    try:
        filter_ = compile_filter(profile())
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.fchown(fd, own_uid(), own_uid())
        size = os.fstat(fd).st_size
        os.dup2(fd, _IMAGE)
        os.set_inheritable(_IMAGE, True)
        confine(size)
        seccomp.install(filter_.program, filter_.flags)
        os.execve(program, ["e2fsck", "-p", "-f", f"/proc/self/fd/{_IMAGE}"], {"LC_ALL": "C"})
    except OSError as error:
        sys.stderr.write(f"the jail of e2fsck: {error}\n")
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
