"""Time and cancellation for transfers: both are handed in, so tests need neither sleep nor luck."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from bulkhead.errors import Unavailable


class Cancelled(Unavailable):
    """The caller gave the transfer up."""


class Interrupted(Unavailable):
    """The connection broke, timed out or could not be made; `final`: trying again is no use."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Cancel:
    """A switch that ends a transfer from another thread, also one that waits for the network."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._wake: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Ask for the end; connections in use are shut down."""
        self._event.set()
        with self._lock:
            wake = list(self._wake)
        for each in wake:
            each()

    def check(self) -> None:
        """Raise Cancelled once it was asked for."""
        if self._event.is_set():
            raise Cancelled("cancelled")

    def wait(self, seconds: float) -> None:
        """Sleep, or raise Cancelled as soon as it is asked for."""
        self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have `wake` called on cancellation while the block runs."""
        with self._lock:
            self._wake.append(wake)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._wake.remove(wake)


class Clock(Protocol):
    """What a transfer knows of time, in seconds."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float, cancel: Cancel) -> None:
        """Wait; Cancelled when the transfer is given up meanwhile."""
        ...

    def jitter(self) -> float:
        """A random number in [0, 1)."""
        ...


class RealClock:
    """The machine's."""

    def monotonic(self) -> float:
        """time.monotonic()."""
        return time.monotonic()

    def sleep(self, seconds: float, cancel: Cancel) -> None:
        """Wait for real."""
        cancel.wait(seconds)

    def jitter(self) -> float:
        """random.random()."""
        return random.random()  # noqa: S311 - spreads retries, hides nothing


def delay(attempt: int, clock: Clock, asked_s: float = 0.0) -> float:
    """Seconds before retry number `attempt` (from 0): 0.5, 1, 2, … up to 15, halved at random.

    `asked_s`, a Retry-After, is followed up to a minute.
    """
    backoff = min(15.0, 0.5 * 2.0**attempt) * (0.5 + clock.jitter() / 2)
    return float(max(backoff, min(asked_s, 60.0)))
