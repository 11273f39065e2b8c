"""Compiled filters under the kernel: what it takes, what it answers, what it tells of them."""

import errno
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from bulkhead.isolation.seccomp import profile
from bulkhead.isolation.seccomp.compile import Filter, compile_filter
from bulkhead.isolation.seccomp.describe import describe
from bulkhead.linux import seccomp as kernel
from bulkhead.linux import syscall
from bulkhead.oci.runtime import Seccomp, Syscall, SyscallArg

# The child: installs the filter, makes the calls, prints what each answered (negative: errno).
CHILD = """
import ctypes, json, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
request = json.load(sys.stdin)
code = bytes.fromhex(request["filter"])

class Fprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

def call(number, *arguments):
    words = [ctypes.c_ulong(a) for a in arguments] + [ctypes.c_ulong(0)] * (6 - len(arguments))
    result = libc.syscall(ctypes.c_long(number), *words)
    return -ctypes.get_errno() if result == -1 else result

def legacy(number, first):
    # mov eax, number; mov ebx, first; int 0x80; ret - with rbx saved
    body = (b"\\x53\\xb8" + number.to_bytes(4, "little") + b"\\xbb"
            + first.to_bytes(4, "little") + b"\\xcd\\x80\\x5b\\xc3")
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(body)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()

if code:
    fprog = Fprog(len(code) // 8, code)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert call(request["seccomp"], 1, request["flags"], ctypes.addressof(fprog)) == 0
answers = [legacy(n, a[0] if a else 0) if old else call(n, *a) for n, a, old in request["calls"]]
print(json.dumps(answers), flush=True)
"""


def run(code: bytes, flags: int, calls: list[tuple[int, list[int], bool]]) -> tuple[int, list[int]]:
    request = {
        "filter": code.hex(),
        "flags": flags,
        "calls": calls,
        "seccomp": syscall.number("seccomp"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    answers: list[int] = json.loads(done.stdout) if done.returncode == 0 else []
    assert answers or done.returncode < 0, done.stderr
    return done.returncode, answers


def usable() -> bool:
    allow = kernel.pack([(kernel.RET_K, 0, 0, kernel.RET_ALLOW)])
    return run(allow, 0, [(number("getppid"), [], False)])[0] == 0


def number(name: str) -> int:
    return kernel.numbers(syscall.machine())[name]


pytestmark = pytest.mark.skipif(not usable(), reason="no filter can be installed here")

UNTAKEN = 0xFFFF_FFFF_FFFF_0000
"""An address that nothing is at."""
CLONE_NEWUSER = 0x10000000


def default(*caps: str) -> Filter:
    return compile_filter(profile.default_for(frozenset(caps)))


def answers(compiled: Filter, *calls: tuple[Any, ...]) -> list[int]:
    wanted = [(number(c[0]) if isinstance(c[0], str) else c[0], list(c[1:]), False) for c in calls]
    return run(compiled.program, compiled.flags, wanted)[1]


def test_what_the_default_profile_refuses_and_lets_through() -> None:
    refused = [
        ("mount", UNTAKEN, UNTAKEN, 0, 0, 0),
        ("unshare", CLONE_NEWUSER),
        ("keyctl", 0, 0),
        ("bpf", 0, 0, 0),
        ("io_uring_setup", 1, UNTAKEN),
        ("personality", 0x40000),
        ("socket", 38, 2, 0),
        ("socket", 40, 1, 0),
        ("clone", CLONE_NEWUSER | 17, 0),
        ("init_module", 0, 0, 0),
        ("kexec_load", 0, 0, 0, 0),
        ("setns", -1 & 0xFFFFFFFF, 0),
        ("userfaultfd", 0xFFFF),
        ("pivot_root", UNTAKEN, UNTAKEN),
        ("swapon", UNTAKEN, 0),
        ("perf_event_open", UNTAKEN, 0, 0, 0, 0),
        ("open_by_handle_at", 0, UNTAKEN, 0),
        ("reboot", 0, 0, 0, 0),
    ]
    assert answers(default(), *refused) == [-errno.EPERM] * len(refused)
    assert answers(default(), ("clone3", UNTAKEN, 64), (5000,)) == [-errno.ENOSYS] * 2
    through = [
        ("personality", 0xFFFFFFFF),
        ("getppid",),
        ("umask", 0o22),
        ("openat2", 0, UNTAKEN, UNTAKEN, 1),
        ("chroot", UNTAKEN),
    ]
    mask = os.umask(0o22)
    os.umask(mask)
    found = answers(default("CAP_SYS_CHROOT"), *through)
    assert found[0] == 0
    assert found[1] > 1
    assert found[2:] == [mask, -errno.EINVAL, -errno.EFAULT]


def test_capabilities_open_what_they_stand_for() -> None:
    admin = default("CAP_SYS_ADMIN")
    calls = [("mount", UNTAKEN, UNTAKEN, 0, 0, 0), ("clone3", UNTAKEN, 64), ("setns", 99999, 0)]
    found = answers(admin, *calls)
    assert -errno.EPERM not in (found[0], found[2])
    assert found[1] == -errno.EFAULT


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 and int 0x80 are x86-64's")
def test_other_ways_to_call_are_filtered_too() -> None:
    table = kernel.numbers("x86")
    mount, personality = table["mount"], table["personality"]
    bare_code, bare = run(b"", 0, [(table["getppid"], [], True)])
    compiled = default()
    x32 = number("getppid") | kernel.X32_BIT
    assert answers(compiled, (x32,)) == [-errno.ENOSYS]
    if bare_code or bare[0] <= 0:
        pytest.skip("this kernel has no 32-bit calls")
    calls = [
        (table["getppid"], [], True),
        (mount, [0], True),
        (personality, [0xFFFFFFFF], True),
        (personality, [0x40000], True),
        (5000, [], True),
    ]
    code, found = run(compiled.program, compiled.flags, calls)
    assert code == 0
    assert found[0] == os.getpid()
    assert found[1:] == [-errno.EPERM, 0, -errno.EPERM, -errno.ENOSYS]
    only = compile_filter(Seccomp(default_action="SCMP_ACT_ALLOW"))
    assert run(only.program, only.flags, calls[:1])[0] == -signal.SIGSYS


def test_arguments_are_compared_in_full_width() -> None:
    rules = [
        Syscall(
            names=["getpriority"],
            action="SCMP_ACT_ERRNO",
            errno_ret=errno.EXDEV,
            args=[condition],
        )
        for condition in (
            SyscallArg(index=1, op="SCMP_CMP_EQ", value=1 << 40 | 7),
            SyscallArg(index=1, op="SCMP_CMP_GT", value=1 << 50),
        )
    ]
    compiled = compile_filter(Seccomp(default_action="SCMP_ACT_ALLOW", syscalls=rules))
    found = answers(
        compiled,
        ("getpriority", 9, 1 << 40 | 7),
        ("getpriority", 9, 7),
        ("getpriority", 9, 1 << 50),
        ("getpriority", 9, (1 << 50) + 1),
    )
    assert found == [-errno.EXDEV, -errno.EINVAL, -errno.EINVAL, -errno.EXDEV]


def test_killing_and_the_largest_filter_the_kernel_takes() -> None:
    kill = Syscall(names=["getppid"], action="SCMP_ACT_KILL_PROCESS")
    compiled = compile_filter(Seccomp(default_action="SCMP_ACT_ALLOW", syscalls=[kill]))
    code, _ = run(compiled.program, compiled.flags, [(number("getppid"), [], False)])
    assert code == -signal.SIGSYS
    names = sorted(kernel.numbers(syscall.machine()), key=number)[:300]
    many = [
        Syscall(
            names=[name],
            action="SCMP_ACT_ERRNO",
            args=[SyscallArg(index=5, op="SCMP_CMP_EQ", value=n << 32 | number(name) + 1000)],
        )
        for name in names
        for n in range(1, 3)
    ]
    compiled = compile_filter(Seccomp(default_action="SCMP_ACT_ALLOW", syscalls=many))
    assert compiled.instructions > 1500
    found = answers(
        compiled,
        ("getppid", 0, 0, 0, 0, 0, 2 << 32 | number("getppid") + 1000),
        ("getppid", 0, 0, 0, 0, 0, 3 << 32 | number("getppid") + 1000),
    )
    assert found == [-errno.EPERM, os.getpid()]


def test_the_kernel_tells_the_filter_of_a_running_process() -> None:
    compiled = default("CAP_CHOWN")
    script = (
        "import sys; from bulkhead.linux import seccomp, syscall\n"
        "syscall.call('prctl', 38, 1, 0, 0, 0)\n"
        f"seccomp.install(bytes.fromhex('{compiled.program.hex()}'), {compiled.flags})\n"
        "print('on', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"on\n"
            try:
                found = kernel.installed(process.pid)
            except PermissionError as error:
                pytest.skip(f"filters cannot be read here: {error}")
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EIO):
                    pytest.skip(f"this kernel does not tell filters: {error}")
                raise
            assert found == [compiled.program]
            told = describe(found[0])[syscall.machine()]
            assert "getppid" in told["allow"]
            assert "mount" in told["errno EPERM"]
            # Reading it leaves no trace: the process goes on and ends as it would have.
            assert kernel.installed(process.pid) == found
        finally:
            process.stdin.close()
            code = process.wait(timeout=60)
        assert code == 0


def test_every_action_is_known_to_the_kernel() -> None:
    for action in (kernel.RET_ALLOW, kernel.RET_ERRNO, kernel.RET_KILL_PROCESS, kernel.RET_LOG):
        assert kernel.action_available(action)
    assert not kernel.action_available(0x12340000)
