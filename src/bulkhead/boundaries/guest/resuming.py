"""What is done in a guest around a snapshot: it stands still, and a copy of it becomes another.

The workload's processes are frozen by the guest's own kernel before the machine is saved, and are
so still when it goes on. Then, before they are thawed, it gets what tells it from the first:
entropy and the clock with the monitor's greeting, addresses, host name and the files that name
them, a machine id. What processes have in their memory stays theirs: open connections, what was
drawn from their own random generators, the environment; and the guest's boot id, for it is that
boot.
"""

import errno
import os
import struct
import uuid

from bulkhead.boundaries.guest import frames, plan, wiring
from bulkhead.boundaries.guest.frames import Mode
from bulkhead.boundary.seam import Bundle
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.namespaces import NEWNS, NEWUTS
from bulkhead.linux.program import Fd, Program

FREEZE = f"{plan.GROUP}/cgroup.freeze"
_NAMES, _GO_ON = 11, 12
_MACHINE_ID = "/etc/machine-id"
_WITHOUT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EROFS)
_RUN = struct.Struct("<IIIHH")


def resume(bundle: Bundle, machine: plan.Machine, *, terminal: bool) -> plan.Planned:
    """The script for the monitor of a guest that was saved as it ran."""
    wires = _wires(bundle, machine)
    named = _named(bundle)
    thaw = Program()
    thaw.write("go on", AT_FDCWD, FREEZE, "0")
    mode = Mode.TERMINAL if terminal else Mode.PIPES
    programs = {plan.SETUP: wires.compile(), _NAMES: named.compile(), _GO_ON: thaw.compile()}
    setup = Mode.SETUP
    parts = [
        frames.run(plan.SETUP, programs[plan.SETUP].data, setup),
        frames.run(_NAMES, programs[_NAMES].data, setup, context=plan.MAIN),
        frames.encode(frames.Type.ADOPT, plan.MAIN, 0, _RUN.pack(0, mode, 0, 0, 0)),
        frames.run(_GO_ON, programs[_GO_ON].data, setup),
        frames.shutdown(machine.poweroff, ["/upper"]),
    ]
    return plan.Planned(b"".join(parts), {key: one.steps for key, one in programs.items()})


def _wires(bundle: Bundle, machine: plan.Machine) -> Program:
    """Its network, and the files of /etc that speak of it, which it has open."""
    program = Program()
    for nic in bundle.nics:
        wiring.plan_down(program, nic.name)
        wiring.plan_interface(program, nic, nic.name)
    plan.plan_files(program, plan.engine_files(bundle.spec))
    return program


def _named(bundle: Bundle) -> Program:
    """In the workload's own namespaces: its host name, and its machine id if it has one."""
    program = Program()
    program.call("see its host name", "setns", Fd(frames.CONTEXT), NEWUTS)
    if bundle.spec.hostname:
        name = bundle.spec.hostname.encode()
        program.call("set the host name", "sethostname", name, len(name))
    program.call("see its files", "setns", Fd(frames.CONTEXT), NEWNS)
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = program.call("open its machine id", "openat", AT_FDCWD, _MACHINE_ID, flags, 0, ok=_WITHOUT)
    text = f"{uuid.uuid4().hex}\n".encode()
    with program.when(fd):
        program.call("set its machine id", "write", fd, text, len(text))
    return program
