"""SIGKILL for the background processes of an Installation, chosen by their part."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tests.helpers.waiting import DEADLINE_S

PARTS = {
    "engine": b"bulkhead.engine",
    "keeper": b"/keeper/main.py",
    "resolver": b"bulkhead.network.helper",
    "server": b"bulkhead.cli.server",
    "holder": b"bulkhead-holder",
}
"""A word of each part's command line; all name the run directory, too."""


class Running(Protocol):
    """Something with a run directory."""

    @property
    def run(self) -> Path:
        """The directory."""
        ...


def pids(here: Running, part: str) -> list[int]:
    """The processes of one of PARTS; zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if PARTS[part] in line and str(here.run).encode() in line:
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def aimed(here: Running, *parts: str) -> Iterator[Callable[[], int]]:
    """A function that kills all processes that `parts` have now, as nearly at once as can be.

    It waits until they are gone with all their threads, and says how many it has killed.
    """
    with aimed_at([pid for part in parts for pid in pids(here, part)]) as fire:
        yield fire


@contextlib.contextmanager
def aimed_at(targets: Iterable[int]) -> Iterator[Callable[[], int]]:
    """Likewise for these processes."""
    handles = []
    with contextlib.ExitStack() as undo:
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                undo.callback(os.close, handle)
                handles.append((pid, handle))

        def fire() -> int:
            killed = 0
            for _, handle in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    killed += 1
            for pid, handle in handles:
                assert select.select([handle], [], [], DEADLINE_S)[0], f"{pid} does not die"
            return killed

        yield fire


def kill(here: Running, *parts: str) -> int:
    """SIGKILL all processes of `parts`, and wait until they are gone; how many there were."""
    with aimed(here, *parts) as fire:
        return fire()
