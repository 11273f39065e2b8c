"""Whether /dev/kvm works, found out by running a loop: Documentation/virt/kvm/api.rst.

A node that exists proves nothing: nested hosts have some whose guests never run, or that interpret
a guest's instructions one by one. So the guest counts to ten million, which a processor does in
some 10 ms and an interpreter in many seconds. `main` is run as a process of its own, which whoever
asks kills after a while: `python -m bulkhead.linux.kvm`.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys

_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_EXIT_HLT = 5
_CODE = b"\x66\xb9\x80\x96\x98\x00\x66\x49\x75\xfc\xf4"
"""mov ecx, 10000000; again: dec ecx; jnz again; hlt. For real mode, which guests begin in."""


def try_loop(path: str = "/dev/kvm") -> str:
    """Make a guest, let it loop and halt: "" if that worked, else what did not. May hang."""
    if platform.machine() != "x86_64":
        return f"not tried on {platform.machine()}"
    step = "open"
    try:
        kvm = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        step = "KVM_GET_API_VERSION"
        version = fcntl.ioctl(kvm, _GET_API_VERSION, 0)
        if version != 12:
            return f"{path}: version {version} instead of 12"
        step = "KVM_CREATE_VM"
        machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
        step = "KVM_SET_USER_MEMORY_REGION"
        memory = mmap.mmap(-1, 4096)
        memory[: len(_CODE)] = _CODE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("=IIQQQ", 0, 0, 0, 4096, address)
        fcntl.ioctl(machine, _SET_USER_MEMORY_REGION, region)
        step = "KVM_CREATE_VCPU"
        processor = fcntl.ioctl(machine, _CREATE_VCPU, 0)
        step = "KVM_SET_SREGS"
        special = bytearray(0x138)
        fcntl.ioctl(processor, _GET_SREGS, special)
        special[0:8] = bytes(8)  # the code segment's base
        special[12:14] = bytes(2)  # and its selector
        fcntl.ioctl(processor, _SET_SREGS, special)
        step = "KVM_SET_REGS"
        fcntl.ioctl(processor, _SET_REGS, struct.pack("=18Q", *([0] * 17), 2))
        step = "KVM_RUN"
        size = fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)
        shared = mmap.mmap(processor, size)
        fcntl.ioctl(processor, _RUN, 0)
        (reason,) = struct.unpack_from("=I", shared, 8)
    except OSError as error:
        return f"{path}: {step}: {error.strerror}"
    return "" if reason == _EXIT_HLT else f"{path}: the guest ended with {reason} instead of HLT"


def main() -> int:
    """Print what is wrong, or nothing."""
    problem = try_loop()
    sys.stdout.write(f"{problem}\n" if problem else "")
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
