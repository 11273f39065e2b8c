"""`explain`: a running workload as the kernel shows it, never as our records have it.

Read from /proc/PID (proc(5)), the control groups' files and, where ptrace permits, the seccomp
filter itself (PTRACE_SECCOMP_GET_FILTER); else the filter we compiled for it, said to be so.
"""

import errno
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from bulkhead.engine.records import Workload
from bulkhead.errors import Conflict
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.isolation.seccomp import compile as seccomp_compile
from bulkhead.isolation.seccomp import describe as seccomp_describe
from bulkhead.linux import capabilities as caps
from bulkhead.linux import namespaces, procfs, seccomp

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}


def view(engine: "Engine", workload: Workload) -> dict[str, Any]:
    """Section by section; Conflict if it does not run."""
    if not workload.running:
        raise Conflict(f"container {workload.id} is not running: the kernel knows nothing of it")
    pid = workload.record.pid
    try:
        status = procfs.status(pid)
    except ProcessLookupError:
        raise Conflict(f"container {workload.id} has just ended") from None
    return {
        "Process": _process(pid, status),
        "Namespaces": _namespaces(pid),
        "Ids": _ids(pid, status),
        "Capabilities": {name: _names(int(status.get(name, "0"), 16)) for name in _SETS},
        "Seccomp": _seccomp(workload, status),
        "ControlGroups": _groups(engine, workload, pid),
        "Limits": _limits(pid),
        "Mounts": _mounts(pid),
        "Network": _network(pid),
    }


def _names(mask: int) -> list[str]:
    return list(caps.names(mask))


def _process(pid: int, status: dict[str, str]) -> dict[str, Any]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        line = file.read().rstrip(b"\0").split(b"\0")
    return {
        "Pid": pid,
        "PidsInside": status.get("NSpid", "").split(),
        "Command": [word.decode("utf-8", "replace") for word in line],
        "State": status.get("State", ""),
        "Threads": status.get("Threads", ""),
        "NoNewPrivileges": status.get("NoNewPrivs", "") == "1",
        "OomScoreAdj": procfs.oom_score_adj(pid),
        "Label": _label(pid),
        "Umask": status.get("Umask", ""),
    }


def _label(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/attr/current", encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""


def _namespaces(pid: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, name in namespaces.PROC_NAMES.items():
        try:
            target = os.readlink(f"/proc/{pid}/ns/{name}")
        except FileNotFoundError:
            continue
        own = target != os.readlink(f"/proc/self/ns/{name}")
        shared = "its own" if own else "the host's"
        if kind == "mount":
            shared = "its own"
        found[kind] = f"{target} ({shared})"
    return found


def _ids(pid: int, status: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "Uid": status.get("Uid", "").split(),
        "Gid": status.get("Gid", "").split(),
        "Groups": status.get("Groups", "").split(),
    }
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
            found[name] = [" ".join(line.split()) for line in file.read().splitlines()]
    return found


def _seccomp(workload: Workload, status: dict[str, str]) -> dict[str, Any]:
    mode = _SECCOMP.get(status.get("Seccomp", "0"), "unknown")
    found: dict[str, Any] = {"Mode": mode, "Filters": status.get("Seccomp_filters", "")}
    if mode != "filter":
        return found
    try:
        if workload.record.status == "paused":
            raise BlockingIOError(errno.EAGAIN, "it is paused")
        programs = _installed(workload.record.pid)
        found["Source"] = "the kernel (PTRACE_SECCOMP_GET_FILTER)"
    except OSError as error:
        bundle = workload.bundle
        if bundle is None or bundle.spec.linux.seccomp is None:
            found["Source"] = f"unknown: the kernel cannot be asked ({error.strerror})"
            return found
        programs = [seccomp_compile.compile_filter(bundle.spec.linux.seccomp).program]
        found["Source"] = (
            f"what was given to the kernel at start, which cannot be asked ({error.strerror})"
        )
    rules = [seccomp_describe.describe(program) for program in programs]
    found["Rules"] = rules[0] if len(rules) == 1 else rules
    return found


def _installed(pid: int) -> list[bytes]:
    """The filters of `pid` from the kernel. Its tracer is a thread that ends here in any case."""
    with ThreadPoolExecutor(1, thread_name_prefix="explain") as tracer:
        return tracer.submit(seccomp.installed, pid).result()


def _groups(engine: "Engine", workload: Workload, pid: int) -> dict[str, Any]:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
        paths = file.read().splitlines()
    group = cgroups.detect().open(engine.cgroup_path(workload.record))
    return {"Membership": paths, "Files": group.files()}


def _limits(pid: int) -> list[str]:
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        return [" ".join(line.split()) for line in file.read().splitlines()[1:]]


def _mounts(pid: int) -> list[str]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        fields = line.split(" ")
        dash = fields.index("-")
        root = "" if fields[3] == "/" else f" (of {fields[3]})"
        flags = fields[5] + (f" {' '.join(fields[6:dash])}" if dash > 6 else "")
        found.append(f"{fields[4]}: {fields[dash + 1]}{root} {flags}")
    return found


def _network(pid: int) -> dict[str, Any]:
    return {
        "Interfaces": _interfaces(pid),
        "Routes": _routes4(pid),
        "Routes6": _routes6(pid),
        "Listening": _listening(pid),
    }


def _lines(path: str, skip: int) -> list[list[str]]:
    try:
        with open(path, encoding="ascii") as file:
            return [line.split() for line in file.read().splitlines()[skip:]]
    except OSError:
        return []


def _interfaces(pid: int) -> list[str]:
    return [row[0].rstrip(":") for row in _lines(f"/proc/{pid}/net/dev", 2)]


def _v4(word: str) -> str:
    return socket.inet_ntoa(struct.pack("=I", int(word, 16)))


def _routes4(pid: int) -> list[str]:
    found = []
    for row in _lines(f"/proc/{pid}/net/route", 1):
        bits = int(row[7], 16).bit_count()
        target = "default" if row[1] == "00000000" and bits == 0 else f"{_v4(row[1])}/{bits}"
        via = "" if row[2] == "00000000" else f" via {_v4(row[2])}"
        found.append(f"{target}{via} dev {row[0]}")
    return found


def _routes6(pid: int) -> list[str]:
    found = []
    for row in _lines(f"/proc/{pid}/net/ipv6_route", 0):
        target = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))
        gateway = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[4]))
        via = "" if gateway == "::" else f" via {gateway}"
        found.append(f"{target}/{int(row[1], 16)}{via} dev {row[9]}")
    return found


def _listening(pid: int) -> list[str]:
    found = []
    for name in ("tcp", "tcp6"):
        for row in _lines(f"/proc/{pid}/net/{name}", 1):
            if row[3] != "0A":
                continue
            address, _, port = row[1].partition(":")
            raw = bytes.fromhex(address)
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            family = socket.AF_INET6 if len(raw) == 16 else socket.AF_INET
            found.append(f"{name} {socket.inet_ntop(family, words)} port {int(port, 16)}")
    return found
