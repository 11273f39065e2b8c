"""Programs of other machines: which interpreter runs them, and how a user namespace is told.

Since Linux 6.7 every user namespace can have a binfmt_misc of its own, so that a registration is
its owner's alone and goes with it (kernel, Documentation/admin-guide/binfmt-misc.rst). The flags:
F opens the interpreter when it is registered, so that it need not be in the container; O and C run
set-user-id programs as what they say; P tells the interpreter the first argument as it was.
"""

import functools
import os
from dataclasses import dataclass
from typing import Literal

from bulkhead.errors import Unsupported
from bulkhead.linux import elf
from bulkhead.linux.program import Program, Slot
from bulkhead.oci.runtime import Mount

TYPE = "binfmt_misc"
PLACE = "/proc/sys/fs/binfmt_misc"
REMEDY = "apt-get install qemu-user-static"
_OPTION = "register="
_FLAGS = "OCPF"
_OLDEST = (6, 7)


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine's programs, as elf(5) tells them: 64 bits or 32, byte order, number."""

    name: str
    """As QEMU's programs are called."""
    wide: bool
    little: bool
    number: int


MACHINES = {
    "386": Machine("i386", False, True, 3),
    "amd64": Machine("x86_64", True, True, 62),
    "arm": Machine("arm", False, True, 40),
    "arm64": Machine("aarch64", True, True, 183),
    "loong64": Machine("loongarch64", True, True, 258),
    "mips64le": Machine("mips64el", True, True, 8),
    "ppc64le": Machine("ppc64le", True, True, 21),
    "riscv64": Machine("riscv64", True, True, 243),
    "s390x": Machine("s390x", True, False, 22),
}
"""By the names of image architectures."""


def registration(machine: Machine, interpreter: str) -> str:
    """What is written to `register` so that `interpreter` runs the programs of `machine`."""
    order: Literal["little", "big"] = "little" if machine.little else "big"
    head = b"\x7fELF" + bytes([2 if machine.wide else 1, 1 if machine.little else 2, 1, 0])
    magic = head + bytes(8) + (2).to_bytes(2, order) + machine.number.to_bytes(2, order)
    # Any system's ABI, and both kinds of programs: ET_EXEC is 2, ET_DYN 3.
    mask = b"\xff" * 7 + b"\0" + b"\xff" * 8 + (0xFFFE).to_bytes(2, order) + b"\xff\xff"
    return f":qemu-{machine.name}:M::{_escaped(magic)}:{_escaped(mask)}:{interpreter}:{_FLAGS}"


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


@functools.lru_cache(32)
def _is_static(path: str, stamp: int) -> bool:
    """Whether the program, last written at `stamp`, loads nothing else."""
    return not elf.needs(path).interpreter


def interpreter(architecture: str) -> str:
    """The static QEMU that runs programs of `architecture`; Unsupported with a remedy."""
    machine = MACHINES.get(architecture)
    if machine is None:
        raise Unsupported(f"programs for {architecture} cannot be run on this machine")
    for name in (f"qemu-{machine.name}-static", f"qemu-{machine.name}"):
        from shutil import which  # imports are most of a runtime's time

        found = which(name)
        if found is not None and _is_static(found, os.stat(found).st_mtime_ns):
            return found
    raise Unsupported(
        f"programs for {architecture} need an emulator, qemu-{machine.name}-static: {REMEDY}"
    )


def check_kernel() -> None:
    """Unsupported, with what to do, if a user namespace cannot have interpreters of its own."""
    release = os.uname().release
    version = tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())
    with open("/proc/filesystems", encoding="ascii") as file:
        known = any(line.split()[-1] == TYPE for line in file)
    if version < _OLDEST or not known:
        what = "CONFIG_BINFMT_MISC" if not known else "Linux 6.7 or later"
        raise Unsupported(
            f"programs of other machines need {what}, or a registration for the whole host: "
            "apt-get install qemu-user-static binfmt-support"
        )


def registered(architecture: str) -> bool:
    """Whether the host itself runs such programs, in containers too (flag F)."""
    machine = MACHINES.get(architecture)
    if machine is None:
        return False
    try:
        with open(f"{PLACE}/qemu-{machine.name}", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return "enabled" in lines and "F" in flags


def mount(architecture: str) -> Mount:
    """The mount that lets a container with a user namespace run programs of `architecture`."""
    text = registration(MACHINES[architecture], interpreter(architecture))
    return Mount(PLACE, TYPE, TYPE, ["nosuid", "nodev", "noexec", f"{_OPTION}{text}"])


def split(options: list[str]) -> tuple[list[str], list[str]]:
    """(options of the file system, what is to be registered in it)."""
    rest = [option for option in options if not option.startswith(_OPTION)]
    return rest, [o.removeprefix(_OPTION) for o in options if o.startswith(_OPTION)]


def plan_register(program: Program, mounted: Slot, texts: list[str]) -> None:
    """Write registrations; their paths are looked up where the process is, before it leaves."""
    for text in texts:
        name = text.split(":")[1]
        program.write(f"register the interpreter {name}", mounted, "register", text)
