"""Signals as something to poll: a pipe that tells which arrived. See signal(7).

In a worker of the command server they come from the client, which forwards what it gets
(cli/server.py makes real signals of them), so that this works in both.
"""

import importlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

FORWARDED: tuple[int, ...] = tuple(
    map(
        int,
        (
            signal.SIGHUP,
            signal.SIGINT,
            signal.SIGQUIT,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGALRM,
            signal.SIGTERM,
            signal.SIGCONT,
            signal.SIGWINCH,
        ),
    )
)


# Below the conversions to enumerations, which cost more than the system calls.
_set: Callable[[int, Any], object] = importlib.import_module("_signal").signal


def _nothing(number: int, frame: object) -> None:
    """A handler only so that the number reaches the wake-up pipe."""


class SignalPipe:
    """While entered, `signals` do nothing but make `fileno()` readable; `read()` lists them."""

    def __init__(self, signals: Sequence[int]) -> None:
        self._signals = signals
        self._old: list[tuple[int, object]] = []
        self._read = self._write = -1
        self._old_wakeup = -1

    def __enter__(self) -> "SignalPipe":
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._signals:
            self._old.append((number, _set(number, _nothing)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old:
            _set(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """The readable end, for poll(2)."""
        return self._read

    def read(self) -> list[int]:
        """The signals since the last call; those we did not ask for are left out."""
        try:
            data = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [number for number in data if number in self._signals]
