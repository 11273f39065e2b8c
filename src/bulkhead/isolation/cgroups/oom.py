"""What the kernel's log says of a process that was killed for want of memory; see mm/oom_kill.c."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SUMMARY = re.compile(
    r"oom-kill:constraint=(?P<constraint>\w+),.*?(?:oom_memcg=(?P<limited>[^,]*),)?"
    r"task_memcg=(?P<group>[^,]*),task=(?P<name>.*),pid=(?P<pid>\d+),uid=(?P<uid>\d+)"
)
_KILLED = re.compile(
    r"Killed process (?P<pid>\d+) \(.*\) total-vm:\d+kB, anon-rss:(?P<anonymous>\d+)kB"
)
_RECORDS = 200_000
"""At most that many records of the log are read."""


@dataclass(frozen=True, slots=True)
class Report:
    """One kill: the victim, whose limit it was, and what the victim held."""

    pid: int
    name: str
    group: str
    limited: str
    """The group whose limit was reached; "" if the whole machine was out of memory."""
    anonymous_bytes: int | None = None


def _log() -> Iterator[str]:
    """Messages of the kernel's log, oldest first; kernel.org's dev-kmsg. OSError if unreadable."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for _ in range(_RECORDS):
            try:
                record = os.read(fd, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten while we read: goes on with what is left
                continue
            yield record.decode(errors="replace").partition(";")[2].partition("\n")[0]
    finally:
        os.close(fd)


def search(messages: Iterable[str], path: str) -> Report | None:
    """The last kill in the group `path` or below it that `messages` tell of."""
    found: Report | None = None
    for message in messages:
        match = _SUMMARY.search(message)
        if match:
            group = match["group"]
            # Within a cgroup namespace the kernel's path is longer than ours.
            if not f"{group}/".endswith(f"{path}/") and f"{path}/" not in f"{group}/":
                continue
            memory = match["constraint"] == "CONSTRAINT_MEMCG"
            limited = (match["limited"] or "") if memory else ""
            found = Report(int(match["pid"]), match["name"], group, limited)
            continue
        killed = _KILLED.search(message)
        if killed and found is not None and int(killed["pid"]) == found.pid:
            held = int(killed["anonymous"]) * 1024
            found = Report(found.pid, found.name, found.group, found.limited, held)
    return found


def find(path: str) -> Report | None:
    """The last kill in group `path` by the kernel's log; None if there is none, or no log."""
    try:
        return search(_log(), path)
    except OSError:
        return None


def size(count: int) -> str:
    """Bytes for people, exact where they can be: "64 MiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            value = f"{count / (1 << shift):.1f}".removesuffix(".0")
            return f"{value} {unit}"
    return f"{count} bytes"


def explain(report: Report | None, limit: int | None, path: str) -> str:
    """One line: who was killed, and which limit it was."""
    if report is None:
        who = "a process"
    else:
        held = report.anonymous_bytes
        who = f"{report.name} (pid {report.pid}" + (f", holding {size(held)})" if held else ")")
    killed = f"out of memory: the kernel killed {who}"
    if report is not None and not report.limited:
        return f"{killed}: the whole machine had no memory left"
    limited = report.limited if report is not None else path
    if limit is None or not limited.endswith(path):
        return f"{killed}: the limit of control group {limited}"
    return f"{killed}: the memory limit is {size(limit)} (--memory)"
