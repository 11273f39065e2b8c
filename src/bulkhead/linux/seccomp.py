"""seccomp(2): constants, system call tables, classic BPF instructions, reading installed filters.

A filter is a sequence of `struct sock_filter` (include/uapi/linux/filter.h) over a
`struct seccomp_data`: nr at 0, arch at 4, instruction pointer at 8, six 64-bit arguments from 16.
"""

import ctypes
import errno
import os
import signal
import struct
import time
from functools import cache

import msgspec

from bulkhead.linux import syscall

SET_MODE_FILTER = 1
GET_ACTION_AVAIL = 2

FLAGS: dict[str, int] = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_NEW_LISTENER": 8,
    "SECCOMP_FILTER_FLAG_TSYNC_ESRCH": 16,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}

RET_KILL_PROCESS = 0x80000000
RET_KILL_THREAD = 0x00000000
RET_TRAP = 0x00030000
RET_ERRNO = 0x00050000
RET_USER_NOTIF = 0x7FC00000
RET_TRACE = 0x7FF00000
RET_LOG = 0x7FFC0000
RET_ALLOW = 0x7FFF0000
RET_ACTION_FULL = 0xFFFF0000
RET_DATA = 0x0000FFFF

ARCHITECTURES: dict[str, int] = {
    "x86_64": 0xC000003E,
    "x86": 0x40000003,
    "aarch64": 0xC00000B7,
    "arm": 0x40000028,
}
"""AUDIT_ARCH_* of include/uapi/linux/audit.h, by the names of the system call tables."""

X32_BIT = 0x40000000
"""Set in the number of an x32 call, whose architecture is that of x86-64."""

OFFSET_NUMBER = 0
OFFSET_ARCHITECTURE = 4
OFFSET_ARGUMENTS = 16

LD_W_ABS = 0x20
LD_W_LEN = 0x80
LDX_W_LEN = 0x81
LD_IMM = 0x00
ALU_AND_K = 0x54
JMP_JA = 0x05
JMP_JEQ_K = 0x15
JMP_JGT_K = 0x25
JMP_JGE_K = 0x35
JMP_JSET_K = 0x45
RET_K = 0x06
RET_A = 0x16

MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS; seccomp(2) answers EINVAL beyond."""

_INSTRUCTION = struct.Struct("=HBBI")
Instruction = tuple[int, int, int, int]
"""code, jt, jf, k."""

_PTRACE_DETACH = 17
_PTRACE_SECCOMP_GET_FILTER = 0x420C
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000


def pack(instructions: "list[Instruction] | tuple[Instruction, ...]") -> bytes:
    """The instructions as the kernel takes them."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def unpack(program: bytes) -> list[Instruction]:
    """The inverse of `pack`; ValueError if the length is not a multiple of 8."""
    if len(program) % _INSTRUCTION.size:
        raise ValueError("a filter's length must be a multiple of 8 bytes")
    return list(_INSTRUCTION.iter_unpack(program))


class _Tables(msgspec.Struct):
    source: str
    x86_64: dict[str, int]
    x86: dict[str, int]
    aarch64: dict[str, int]
    arm: dict[str, int]


@cache
def _tables() -> _Tables:
    from importlib import (
        resources,
    )  # imports are most of a runtime's time

    data = resources.files("bulkhead.linux").joinpath("syscall_numbers.json").read_bytes()
    return msgspec.json.decode(data, type=_Tables)


def numbers(architecture: str) -> dict[str, int]:
    """System call numbers by name of `architecture` (a key of ARCHITECTURES); read only.

    OSError(ENOSYS) for an architecture without a table: numbers are never guessed.
    """
    if architecture not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system call table for architecture {architecture}")
    table: dict[str, int] = getattr(_tables(), architecture)
    return table


@cache
def known_names() -> frozenset[str]:
    """Every system call name of every table."""
    return frozenset(name for arch in ARCHITECTURES for name in numbers(arch))


class SockFprog(ctypes.Structure):
    """struct sock_fprog: the number of instructions, and where they are."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(program: bytes, flags: int = 0) -> None:
    """Install a filter on the calling thread, for good (seccomp(2)).

    Needs no_new_privs or CAP_SYS_ADMIN: OSError EACCES without; EINVAL for a malformed program.
    """
    fprog = SockFprog(len(program) // _INSTRUCTION.size, program)
    address = ctypes.addressof(fprog)
    syscall.call("seccomp", SET_MODE_FILTER, flags, address)


def action_available(action: int) -> bool:
    """Whether the running kernel knows that SECCOMP_RET_ action (seccomp(2))."""
    word = ctypes.c_uint32(action)
    try:
        syscall.call("seccomp", GET_ACTION_AVAIL, 0, ctypes.addressof(word))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True


@cache
def _ptrace_function() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).ptrace
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    return function


def _ptrace(request: int, pid: int, address: int, data: "int | ctypes.Array[ctypes.c_char]") -> int:
    ctypes.set_errno(0)
    pointer = data if isinstance(data, int) else ctypes.addressof(data)
    result: int = _ptrace_function()(request, pid, address or None, pointer or None)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
    return result


def _stopped(pid: int, timeout_s: float) -> int:
    """The wait status of `pid` once it has stopped; TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"process {pid} does not stop (frozen, or in I/O)")
        time.sleep(0.001)


def installed(pid: int, timeout_s: float = 5.0) -> list[bytes]:
    """The filters of process `pid`, the last installed one first, read from the kernel.

    The process is stopped for that moment (ptrace(2): SEIZE, INTERRUPT, SECCOMP_GET_FILTER,
    DETACH). Needs CAP_SYS_ADMIN and no filter on the caller. OSError: EPERM, EBUSY or EACCES if
    it may not be traced or already is, EINVAL or EIO where the kernel cannot tell
    (CONFIG_CHECKPOINT_RESTORE), ESRCH if it is gone. TimeoutError if it does not stop in time: then
    it stays attached until the calling thread ends, which is best one of its own.
    """
    _ptrace(_PTRACE_SEIZE, pid, 0, 0)
    try:
        _ptrace(_PTRACE_INTERRUPT, pid, 0, 0)
        status = _stopped(pid, timeout_s)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} ended")
        stop = os.WSTOPSIG(status)
        found: list[bytes] = []
        try:
            while True:
                try:
                    count = _ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, len(found), 0)
                except OSError as error:
                    if error.errno == errno.ENOENT:
                        return found
                    raise
                buffer = ctypes.create_string_buffer(count * _INSTRUCTION.size)
                _ptrace(_PTRACE_SECCOMP_GET_FILTER, pid, len(found), buffer)
                found.append(buffer.raw)
        finally:
            # A signal that came instead of our interrupt is handed on.
            forwarded = 0 if status >> 16 or stop == signal.SIGTRAP else stop
            _ptrace(_PTRACE_DETACH, pid, 0, forwarded)
    except ChildProcessError:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} ended") from None
