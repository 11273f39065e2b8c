"""What /proc tells of a process. See proc(5)."""

import os


def start_time(pid: int) -> int:
    """When process `pid` started, in clock ticks since boot; ProcessLookupError if there is none.

    With the pid it names a process for the life of the machine: a reused pid has another time.
    """
    return int(_stat_fields(pid)[19])


def state(pid: int) -> str:
    """The state letter of process `pid` (R, S, D, T, Z, …); ProcessLookupError if there is none."""
    return _stat_fields(pid)[0]


def kernel_flags(pid: int) -> int:
    """The kernel's PF_* flags of process `pid`; ProcessLookupError if there is none."""
    return int(_stat_fields(pid)[6])


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from field 3 (state) on; the name before it may hold spaces and brackets."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    return data[data.rindex(b")") + 2 :].decode("ascii").split()


def status(pid: "int | str" = "self") -> dict[str, str]:
    """/proc/PID/status as a mapping; ProcessLookupError if there is no such process."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def oom_score_adj(pid: "int | str" = "self") -> int:
    """The process's oom_score_adj, -1000 to 1000."""
    with open(f"/proc/{pid}/oom_score_adj", "rb") as file:
        return int(file.read())


def open_fds(pid: "int | str" = "self") -> dict[int, str]:
    """Open descriptors and what they point to; one that closes meanwhile is left out."""
    found: dict[int, str] = {}
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
    return found
