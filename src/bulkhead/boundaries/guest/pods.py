"""A further workload in a guest that runs: what the guest is told to do for it. Pure, like plan.py.

    /members/ID/{layers,upper,files,shares,volumes,shm}    its places, on a file system of their own
    /sys/fs/cgroup/member-ID                               its control group

It has a root and mount, uts and cgroup namespaces of its own, PID and IPC namespaces of its own or
those of another of the same guest, limits, powers and filter as usual; the network is the guest's.
"""

import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from bulkhead.boundaries.guest import frames, plan
from bulkhead.boundary.seam import Bundle
from bulkhead.errors import Unsupported
from bulkhead.isolation import mounts
from bulkhead.linux.mounts import AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH, OPEN_TREE_CLONE
from bulkhead.linux.namespaces import NEWNS
from bulkhead.linux.program import Compiled, Fd, Program
from bulkhead.oci.runtime import Resources

FOLDER = "/members"
SHM = "/guest/shm"
"""As a bind's source: the /dev/shm of the workload whose IPC namespace is joined."""
_WAITS_MS = (1, 5, 20, 100, 400, 1000)
_MNT_DETACH = 2
_GONE = (errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Plan:
    """Programs of the set-up and of its undoing, and the frames of the process."""

    setup: Program
    farewell: Compiled
    main: plan.Planned


def base(identity: str) -> str:
    """Where a member has its places."""
    return f"{FOLDER}/{identity[:16]}"


def group(identity: str) -> str:
    """Its control group."""
    return f"/sys/fs/cgroup/member-{identity[:16]}"


def inner_sources(
    bundle: Bundle, place: str, known: Mapping[str, tuple[str, bool]]
) -> dict[int, plan.Source]:
    """Binds that come from the guest itself: shared memory, and what it has of the host already.

    `known`: where the latter is, and whether it can be written. Two mounts of one directory would
    not see each other's changes at once; two of one disk would destroy it.
    """
    found: dict[int, plan.Source] = {}
    for position, mount in enumerate(bundle.spec.mounts):
        if not mounts.is_bind(mount):
            continue
        if mount.source == SHM:
            found[position] = plan.Inside(f"{place}/shm", directory=True)
            continue
        base = next((one for one in bundle.disks if _below(mount.source, one)), mount.source)
        inside, writable = known.get(base, ("", False))
        if inside and (writable or not {"ro", "rro"}.isdisjoint(mount.options)):
            directory = not inside.endswith("/file")
            found[position] = plan.Inside(inside + mount.source[len(base) :], directory=directory)
        elif inside and base in bundle.disks:
            raise Unsupported(
                f"{mount.destination}: the volume is read-only in this guest, for its first "
                "workload mounts it so"
            )
    return found


def _below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(f"{directory}/")


def make(
    bundle: Bundle,
    machine: plan.Machine,
    *,
    context: int,
    terminal: bool,
    rows: int = 0,
    columns: int = 0,
) -> Plan:
    """All of one start; `context` is the process whose namespaces are joined, 0 for none."""
    sources = {**plan.engine_files(bundle.spec), **machine.sources}
    main = plan.member(
        bundle, machine, sources, context=context, terminal=terminal, rows=rows, columns=columns
    )
    return Plan(_setup(bundle, machine, sources), _farewell(machine, sources), main)


def _setup(bundle: Bundle, machine: plan.Machine, sources: Mapping[int, plan.Source]) -> Program:
    program = Program()
    program.call("clear the umask", "umask", 0)
    plan.plan_modules(program, machine.modules)
    for path in (FOLDER, machine.base):
        program.call(f"make {path}", "mkdirat", AT_FDCWD, path, 0o755, ok=(errno.EEXIST,))
    program.call("its places", "mount", "member", machine.base, "tmpfs", 0, "mode=755")
    plan.plan_disks(program, machine, sources)
    plan.plan_group(program, bundle.spec, machine.group)
    limits = cgroup_limits(bundle.spec.linux.resources)
    for name, value in limits.items():
        program.write(f"limit {name}", AT_FDCWD, f"{machine.group}/{name}", value)
    plan.plan_files(program, sources, machine.base)
    shm = f"{machine.base}/shm"
    if any(isinstance(one, plan.Inside) and one.path == shm for one in sources.values()):
        _plan_shm(program, shm)
    return program


def cgroup_limits(resources: Resources | None) -> dict[str, str]:
    """Files of a control group (v2) and their values: memory and processors, inside the guest."""
    found: dict[str, str] = {}
    memory = resources.memory if resources is not None else None
    if memory is not None and memory.limit:
        found["memory.max"] = str(memory.limit) if memory.limit > 0 else "max"
    cpu = resources.cpu if resources is not None else None
    if cpu is not None and cpu.quota:
        quota = str(cpu.quota) if cpu.quota > 0 else "max"
        found["cpu.max"] = f"{quota} {cpu.period or 100_000}"
    return found


def _plan_shm(program: Program, place: str) -> None:
    """The /dev/shm of the context process, at `place`."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    own = program.call("our mounts", "openat", AT_FDCWD, "/proc/thread-self/ns/mnt", flags, 0)
    program.call("see the other's mounts", "setns", Fd(frames.CONTEXT), NEWNS)
    clone = OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = program.call("its shared memory", "open_tree", AT_FDCWD, "/dev/shm", clone)
    program.call("see our mounts", "setns", own, NEWNS)
    program.call(f"make {place}", "mkdirat", AT_FDCWD, place, 0o755)
    empty = MOVE_MOUNT_F_EMPTY_PATH
    program.call("its shared memory", "move_mount", tree, "", AT_FDCWD, place, empty)


def _farewell(machine: plan.Machine, sources: Mapping[int, plan.Source]) -> Compiled:
    """End what lives on, write back, unmount. If that fails the disks are never given to others."""
    program = Program()
    program.write("end the rest", AT_FDCWD, f"{machine.group}/cgroup.kill", "1", ok=_GONE)
    for wait_ms in _WAITS_MS:
        flags = os.O_PATH | os.O_CLOEXEC
        left = program.call("look", "openat", AT_FDCWD, machine.group, flags, 0, ok=_GONE)
        with program.when(left):
            program.call("close", "close", left)
            step = "remove the control group"
            busy = (errno.EBUSY, *_GONE)
            at_removedir = 0x200
            gone = program.call(step, "unlinkat", AT_FDCWD, machine.group, at_removedir, ok=busy)
            with program.when(gone, failed=True):
                pause = struct.pack("<qq", *divmod(wait_ms * 1_000_000, 10**9))
                program.call("wait", "nanosleep", pause, None)
    for number in sorted({s.number for s in sources.values() if isinstance(s, plan.Share)}):
        place = f"{machine.base}/shares/{number}"
        program.call(f"unmount {place}", "umount2", place, _MNT_DETACH, ok=_GONE)
    for place in plan.unmounts(machine, sources):
        program.call(f"unmount {place}", "umount2", place, 0, ok=_GONE)
    for number in range(len(machine.layers)):
        place = f"{machine.base}/layers/{number}"
        program.call(f"unmount {place}", "umount2", place, 0, ok=(*_GONE, errno.EBUSY))
    program.call("unmount its places", "umount2", machine.base, _MNT_DETACH, ok=_GONE)
    program.call("forget it", "unlinkat", AT_FDCWD, machine.base, 0x200, ok=(*_GONE, errno.EBUSY))
    return program.compile()
