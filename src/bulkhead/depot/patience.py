"""How long a connection is waited for: one that sends a byte a minute must not hold a thread."""

import io
import socket
import time
from collections.abc import Callable

IDLE_S = 60.0
"""Without a request, on a connection that had one or none."""
HEAD_S = 30.0
"""For a request's line and headers, from its first byte."""
SLOWEST = 8 << 10
"""Bytes per second of a body, after `IDLE_S` for nothing."""


class Patient(io.RawIOBase):
    """The reading side of a connection, with a deadline for each part of a request.

    TimeoutError when it has passed. `clock`: seconds.
    """

    def __init__(
        self, connection: socket.socket, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._connection = connection
        self._clock = clock
        self._taken = 0
        self._phase = "idle"
        self._deadline = 0.0
        self.idle()

    def idle(self) -> None:
        """Wait for a request."""
        self._phase = "idle"
        self._deadline = self._clock() + IDLE_S

    def body(self) -> None:
        """The head is complete."""
        self._phase = "body"
        self._taken = 0
        self._deadline = self._clock() + IDLE_S

    @property
    def waiting(self) -> bool:
        """Whether no request has begun."""
        return self._phase == "idle"

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As io.RawIOBase says."""
        room = self._deadline - self._clock()
        if self._phase == "body":
            room += self._taken / SLOWEST
        if room <= 0:
            raise TimeoutError("the client is too slow")
        self._connection.settimeout(min(room, IDLE_S))
        try:
            count = self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(IDLE_S)
        self._taken += count
        if count and self._phase == "idle":
            self._phase = "head"
            self._deadline = self._clock() + HEAD_S
        return count
