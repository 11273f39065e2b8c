"""SIGKILL for the background processes of an Installation, chosen by their part."""

import contextlib
import os
import signal
from pathlib import Path

from tests.helpers.installation import Installation
from tests.helpers.waiting import until

PARTS = {
    "engine": b"bulkhead.engine",
    "keeper": b"/keeper/main.py",
    "resolver": b"bulkhead.network.helper",
    "server": b"bulkhead.cli.server",
    "holder": b"bulkhead-holder",
}
"""A word of each part's command line; all name the run directory, too."""


def pids(here: Installation, part: str) -> list[int]:
    """The processes of one of PARTS; zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if PARTS[part] in line and str(here.run).encode() in line:
                    found.append(int(entry.name))
    return found


def kill(here: Installation, *parts: str) -> int:
    """SIGKILL all processes of `parts`, as nearly at once as can be, and wait until they are gone.

    How many were killed: none if they happened not to run.
    """
    handles = []
    for part in parts:
        for pid in pids(here, part):
            with contextlib.suppress(ProcessLookupError):
                handles.append((pid, os.pidfd_open(pid)))
    killed = 0
    for _, handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            killed += 1
    for pid, handle in handles:
        os.close(handle)
        until(lambda pid=pid: _gone(pid), f"process {pid} is dead")  # type: ignore[misc]
    return killed


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
