"""Which processes of the host an instance consists of. proc(5)."""

import os
from collections.abc import Iterator


def _all() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def parents() -> dict[int, int]:
    """Every process's parent."""
    found = {}
    for pid in _all():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                found[pid] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    return found


def descendants(pid: int) -> list[int]:
    """`pid` and all that descends from it."""
    children: dict[int, list[int]] = {}
    for child, parent in parents().items():
        children.setdefault(parent, []).append(child)
    found, left = [], [pid]
    while left:
        one = left.pop()
        found.append(one)
        left += children.get(one, [])
    return found


def group(pid: int | str) -> str:
    """The control group that says what an instance is: of the pids hierarchy, else of cgroup v2."""
    unified = ""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
        for line in file.read().splitlines():
            _, controllers, path = line.split(":", 2)
            if "pids" in controllers.split(","):
                return path
            if not controllers:
                unified = path
    return unified


def of_group(pid: int) -> list[int]:
    """All processes in the control group of `pid`; without one of its own, its descendants."""
    own = group(pid)
    if own in ("/", group("self")):
        return descendants(pid)
    found = []
    for one in _all():
        try:
            if group(one) == own or group(one).startswith(f"{own}/"):
                found.append(one)
        except OSError:
            continue
    return found


def threads(pids: list[int]) -> list[int]:
    """All threads of the processes that still live."""
    found = []
    for pid in pids:
        try:
            found += [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        except OSError:
            continue
    return found
