"""eBPF: instructions, and bpf(2) for programs attached to control groups.

Encodings: include/uapi/linux/bpf.h and Documentation/bpf/standardization/instruction-set.rst.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

PROG_LOAD = 5
PROG_ATTACH = 8
PROG_DETACH = 9
PROG_GET_FD_BY_ID = 13
PROG_QUERY = 16

PROG_TYPE_CGROUP_DEVICE = 15
ATTACH_CGROUP_DEVICE = 6

F_ALLOW_MULTI = 2
F_REPLACE = 4

_LOG_SIZE = 64 << 10


@dataclass(frozen=True, slots=True)
class Instruction:
    """struct bpf_insn."""

    code: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    jumps: bool = False

    def aimed(self, offset: int) -> "Instruction":
        """The same jump over `offset` instructions."""
        return replace(self, offset=offset)


def assemble(code: Iterable[Instruction]) -> bytes:
    """The instructions as the kernel takes them (little-endian registers, our machines')."""
    return b"".join(
        struct.pack(
            "=BBhI", i.code, i.source << 4 | i.destination, i.offset, i.immediate & 0xFFFFFFFF
        )
        for i in code
    )


def load32(destination: int, source: int, offset: int) -> Instruction:
    """destination = *(u32 *)(source + offset)."""
    return Instruction(0x61, destination, source, offset)


def move_register32(destination: int, source: int) -> Instruction:
    """destination = source, lower halves."""
    return Instruction(0xBC, destination, source)


def move32(destination: int, value: int) -> Instruction:
    """destination = value."""
    return Instruction(0xB4, destination, immediate=value)


def and32(destination: int, value: int) -> Instruction:
    """destination &= value."""
    return Instruction(0x54, destination, immediate=value)


def shift_right32(destination: int, value: int) -> Instruction:
    """destination >>= value."""
    return Instruction(0x74, destination, immediate=value)


def jump_equal32(register: int, value: int, offset: int) -> Instruction:
    """Jump if the lower half of register == value."""
    return Instruction(0x16, register, 0, offset, value, jumps=True)


def jump_not_equal32(register: int, value: int, offset: int) -> Instruction:
    """Jump if the lower half of register != value."""
    return Instruction(0x56, register, 0, offset, value, jumps=True)


def exit_() -> Instruction:
    """Return r0."""
    return Instruction(0x95)


def _bpf(command: int, attribute: bytes) -> tuple[int, bytes]:
    buffer = ctypes.create_string_buffer(attribute, len(attribute))
    result = syscall.call("bpf", command, ctypes.addressof(buffer), len(attribute))
    return result, buffer.raw


def load(program_type: int, program: bytes, name: str) -> OwnedFd:
    """Load a program; OSError with the verifier's last line if it is refused."""
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")

    def attribute(log: int, size: int) -> bytes:
        # Up to prog_name; the kernel takes the rest of union bpf_attr as zero.
        return struct.pack(
            "=IIQQIIQII16s",
            program_type,
            len(program) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            1 if log else 0,
            size,
            log,
            0,
            0,
            name.encode()[:15],
        )

    try:
        return OwnedFd(_bpf(PROG_LOAD, attribute(0, 0))[0])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        buffer = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return OwnedFd(_bpf(PROG_LOAD, attribute(ctypes.addressof(buffer), _LOG_SIZE))[0])
        except OSError as again:
            lines = buffer.value.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else os.strerror(again.errno or 0)
            raise OSError(again.errno, f"bpf: program {name} refused: {reason}") from None


def attached(cgroup: int, kind: int) -> list[int]:
    """Ids of the programs attached to that very control group."""
    ids = (ctypes.c_uint32 * 64)()
    # target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt
    attribute = struct.pack(
        "=IIIIQIIQQQQ", cgroup, kind, 0, 0, ctypes.addressof(ids), 64, 0, 0, 0, 0, 0
    )
    _, answer = _bpf(PROG_QUERY, attribute)
    count: int = struct.unpack_from("=I", answer, 24)[0]
    return list(ids[:count])


def by_id(identity: int) -> OwnedFd:
    """A descriptor of the loaded program with that id; OSError ENOENT if there is none."""
    return OwnedFd(_bpf(PROG_GET_FD_BY_ID, struct.pack("=III", identity, 0, 0))[0])


def attach(cgroup: int, program: int, kind: int, *, instead_of: int = -1) -> None:
    """Attach a program to a control group beside others, or in another's place (5.6)."""
    flags = F_ALLOW_MULTI if instead_of < 0 else F_ALLOW_MULTI | F_REPLACE
    # target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd
    _bpf(PROG_ATTACH, struct.pack("=IIIII", cgroup, program, kind, flags, max(instead_of, 0)))


def detach(cgroup: int, program: int, kind: int) -> None:
    """Detach a program from a control group."""
    _bpf(PROG_DETACH, struct.pack("=IIIII", cgroup, program, kind, 0, 0))
