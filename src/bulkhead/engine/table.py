"""Processes and interfaces of a workload, read from /proc; see proc(5)."""

import contextlib
import os
import pwd
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bulkhead.errors import Invalid

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FULL = ("uid", "pid", "ppid", "c", "stime", "tty", "time", "cmd")
_TITLES = {
    "uid": "UID", "pid": "PID", "ppid": "PPID", "c": "C", "stime": "STIME", "tty": "TTY",
    "time": "TIME", "cmd": "CMD", "user": "USER", "%cpu": "%CPU", "%mem": "%MEM", "vsz": "VSZ",
    "rss": "RSS", "stat": "STAT", "start": "START", "command": "COMMAND", "comm": "COMMAND",
    "args": "COMMAND", "ni": "NI", "pri": "PRI", "nlwp": "NLWP", "pgid": "PGID", "sid": "SID",
    "gid": "GID", "group": "GROUP", "etime": "ELAPSED", "tname": "TTY", "wchan": "WCHAN",
    "pcpu": "%CPU", "pmem": "%MEM", "state": "S", "s": "S", "ucmd": "CMD", "cputime": "TIME",
    "tid": "TID", "vsize": "VSZ", "rssize": "RSS", "euser": "EUSER", "euid": "EUID",
}  # fmt: skip
_AUX = ("user", "pid", "%cpu", "%mem", "vsz", "rss", "tty", "stat", "start", "time", "command")

_STAT = re.compile(rb"(\d{1,9}) \(.*\) [A-Za-z]((?: -?\d{1,20}){21,60})\n?", re.DOTALL)
"""/proc/PID/stat as far as its fields are used; the name may contain anything."""


@dataclass(slots=True)
class _Process:
    pid: int
    fields: list[str]
    name: str
    uid: int
    gid: int
    command: str


@lru_cache(maxsize=512)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _read(pid: int) -> _Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            raw = file.read()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
        status = os.stat(f"/proc/{pid}")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse(raw, line, status.st_uid, status.st_gid)


def parse(raw: bytes, line: bytes, uid: int, gid: int) -> _Process | None:
    """A process by its /proc/PID/stat and command line; None if that is not what it is."""
    found = _STAT.fullmatch(raw)
    if found is None:
        return None
    name = raw[raw.index(b"(") + 1 : raw.rindex(b")")].decode("utf-8", "replace")
    fields = raw[raw.rindex(b")") + 2 :].decode("ascii").split()
    command = line.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    return _Process(int(found[1]), fields, name, uid, gid, command or f"[{name}]")


def _uptime_s() -> float:
    with open("/proc/uptime", encoding="ascii") as file:
        return float(file.read().split()[0])


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _terminal(number: int) -> str:
    if number == 0:
        return "?"
    major, minor = os.major(number), os.minor(number)
    return f"pts/{minor}" if major == 136 else f"tty{minor}" if major == 4 else "?"


def _values(process: _Process, now: float, boot: float, memory: int) -> dict[str, str]:
    fields = process.fields
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS
    started = boot + int(fields[19]) / _TICKS
    lived = max(now - started, 0.01)
    resident = int(fields[21]) * _PAGE
    share = 100 * cpu_s / lived
    shown = time.strftime("%H:%M" if now - started < 86400 else "%b%d", time.localtime(started))
    user = _user(process.uid)
    return {
        "uid": user, "user": user, "euser": user, "euid": str(process.uid),
        "gid": str(process.gid), "group": str(process.gid),
        "pid": str(process.pid), "tid": str(process.pid), "ppid": fields[1],
        "pgid": fields[2], "sid": fields[3], "c": str(int(share)),
        "stime": shown, "start": shown, "etime": _clock(int(lived)),
        "tty": _terminal(int(fields[4])), "tname": _terminal(int(fields[4])),
        "time": _clock(int(cpu_s)), "cputime": _clock(int(cpu_s)),
        "cmd": process.command, "command": process.command, "args": process.command,
        "comm": process.name, "ucmd": process.name, "%cpu": f"{share:.1f}", "pcpu": f"{share:.1f}",
        "%mem": f"{100 * resident / memory:.1f}", "pmem": f"{100 * resident / memory:.1f}",
        "vsz": str(int(fields[20]) // 1024), "vsize": str(int(fields[20]) // 1024),
        "rss": str(resident // 1024), "rssize": str(resident // 1024),
        "stat": fields[0], "state": fields[0], "s": fields[0],
        "ni": fields[16], "pri": fields[15], "nlwp": fields[17], "wchan": "-",
    }  # fmt: skip


def columns(ps_args: str) -> list[str]:
    """The columns that ps(1)'s options ask for: -o list, aux, -ef (the default)."""
    words = ps_args.split()
    chosen: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word in {"-o", "o", "-eo", "-Ao", "axo", "--format"}:
            position += 1
            if position == len(words):
                raise Invalid("top: -o needs a list of columns")
            chosen += words[position].split(",")
        elif word.startswith("-o") and len(word) > 2:
            chosen += word[2:].split(",")
        elif word in {"aux", "-aux", "au", "u"}:
            chosen += _AUX
        elif word in {"-ef", "-e", "-f", "ax", "-A", "-eF", "f"}:
            pass
        else:
            raise Invalid(f"top: the ps option {word!r} is not supported; use -ef, aux or -o LIST")
        position += 1
    names = [name.partition("=")[0].strip().lower() for name in chosen if name.strip()]
    for name in names:
        if name not in _TITLES:
            raise Invalid(f"top: unknown column {name!r}")
    return names or list(_FULL)


def processes(pids: Iterable[int], ps_args: str) -> dict[str, Any]:
    """Docker's ContainerTop."""
    wanted = columns(ps_args)
    now, uptime_s = time.time(), _uptime_s()
    memory = _PAGE * os.sysconf("SC_PHYS_PAGES")
    found = [process for pid in sorted(pids) if (process := _read(pid)) is not None]
    return shown(found, wanted, now=now, uptime_s=uptime_s, memory=memory)


def shown(
    found: Iterable[_Process], wanted: list[str], *, now: float, uptime_s: float, memory: int
) -> dict[str, Any]:
    """Docker's ContainerTop of processes of a kernel that has run for `uptime_s` at `now`."""
    rows = []
    for process in found:
        values = _values(process, now, now - uptime_s, memory)
        rows.append([values[name] for name in wanted])
    return {"Titles": [_TITLES[name] for name in wanted], "Processes": rows}


def interfaces(pid: int) -> dict[str, dict[str, int]]:
    """Docker's `networks` of a statistics sample: every interface but the loopback."""
    found: dict[str, dict[str, int]] = {}
    pick: Callable[[list[str], int], int] = lambda row, at: int(row[at])  # noqa: E731
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/dev", encoding="ascii") as file:
        for line in file.read().splitlines()[2:]:
            name, _, rest = line.partition(":")
            row = rest.split()
            if name.strip() == "lo":
                continue
            found[name.strip()] = {
                "rx_bytes": pick(row, 0), "rx_packets": pick(row, 1), "rx_errors": pick(row, 2),
                "rx_dropped": pick(row, 3), "tx_bytes": pick(row, 8), "tx_packets": pick(row, 9),
                "tx_errors": pick(row, 10), "tx_dropped": pick(row, 11),
            }  # fmt: skip
    return found
