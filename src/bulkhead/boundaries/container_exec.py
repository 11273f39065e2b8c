"""The launch program that runs one more process in a running container.

The child enters the namespaces through a pidfd, so a reused pid cannot lead it astray. It is
undumpable until its exec: processes inside may not look into it while it holds the host's files
(CVE-2016-9962), and all its descriptors are closed before the program's path is walked.
"""

import os

from bulkhead.boundaries import container_process as common
from bulkhead.boundaries.container_plan import Template
from bulkhead.boundaries.container_process import FdTable, Filter
from bulkhead.isolation import credentials, tty
from bulkhead.isolation.namespaces import plan_become_root
from bulkhead.linux import namespaces as kernel
from bulkhead.linux import prctl
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Program
from bulkhead.linux.tree import Tree
from bulkhead.oci.runtime import Process, Spec


def joined(spec: Spec) -> int:
    """The CLONE_NEW* flags of the namespaces that are the container's own or not the host's."""
    return sum(kernel.FLAGS[namespace.type_] for namespace in spec.linux.namespaces)


def exec_template(
    spec: Spec,
    process: Process,
    *,
    joins: int,
    terminal: bool,
    filter_: Filter | None,
    oom_score_adj: int,
    kept: int = 0,
    keep_numbers: bool = False,
    listener: bool = False,
    group: str = "",
    available: frozenset[str] | None = None,
) -> Template:
    """The program; its descriptors are "target" (a pidfd), "join0"…, "kept0"… and the streams."""
    program, fds = Program(), FdTable()
    common.plan_streams(program, fds)
    program.call("become undumpable", "prctl", prctl.SET_DUMPABLE, 0, 0, 0, 0)
    _plan_group(program, fds, spec, process, joins=joins, group=group)
    wanted = process.oom_score_adj
    if wanted is None and spec.process is not None:
        wanted = spec.process.oom_score_adj
    proc = None
    if (wanted is not None and wanted != oom_score_adj) or common.has_label(process):
        proc = common.plan_host_proc(program)
        common.plan_oom_score(program, wanted, oom_score_adj, proc)
    flags = joined(spec)
    program.call("enter the container's namespaces", "setns", fds.fd("target"), flags)
    if flags & kernel.NEWUSER:
        plan_become_root(program)
    if flags & kernel.NEWPID:
        program.fork("enter the pid namespace")
    open_flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    root = program.call("open the root", "openat", AT_FDCWD, "/", open_flags, 0)
    slave = None
    if terminal:
        master = tty.plan_open_inside(program, root)
        size = common.window(program, 0, 0)
        slave = tty.plan_use(program, master, uid=process.user.uid, size=size)
    credentials.plan_session(program)
    if spec.linux.memory_policy is not None:
        credentials.plan_memory_policy(program, spec.linux.memory_policy)
    if slave is not None:
        tty.plan_control(program, slave)
    common.plan_directory(Tree(program, root), process.cwd, create=False)
    common.plan_label(program, proc, process)
    common.plan_identity(
        program,
        process,
        filter_,
        available=available,
        keep=[fds.fd(f"kept{number}") for number in range(kept)],
        keep_numbers=keep_numbers,
        listener=common.plan_listener(program, fds) if listener else None,
    )
    common.plan_exec(program, process, common.candidates(process))
    return Template(program.compile(), tuple(fds.keys), 0)


def _plan_group(
    program: Program, fds: FdTable, spec: Spec, process: Process, *, joins: int, group: str
) -> None:
    """Join the control group, on the processors for before and after."""
    affinity = process.exec_cpu_affinity
    if affinity is None and spec.process is not None:
        affinity = spec.process.exec_cpu_affinity
    if affinity is not None:  # on v2 the child is born in the group: what that allows counts
        credentials.plan_affinity(program, affinity.initial)
    for position in range(joins):
        fd = fds.fd(f"join{position}")
        program.call("join the control group", "write", fd, b"0", 1)
    common.plan_group(program, group)
    if affinity is not None:
        credentials.plan_affinity(program, affinity.final)
