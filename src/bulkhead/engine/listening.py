"""Listening sockets on the loop, and rest while a client cannot be accepted.

Without descriptors or memory left accept(2) fails at once and the socket stays readable: a loop
that tried again at once would do nothing else.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

log = logging.getLogger("bulkhead.engine")

REST_S = 0.5
_AT_ONCE = 64
"""How many are accepted before others have their turn."""

Came = Callable[[socket.socket], None]


class Listeners:
    """Sockets that are listened on; `close` ends that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sockets: dict[socket.socket, asyncio.TimerHandle | None] = {}
        """With the timer of those that rest."""

    def add(self, sock: socket.socket, came: Came) -> None:
        """Have `came` called with each client's socket; `sock` belongs to this object now."""
        sock.setblocking(False)
        self._sockets[sock] = None
        self._loop.add_reader(sock.fileno(), self._accept, sock, came)

    def _accept(self, listening: socket.socket, came: Came) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("cannot accept a client: %s; trying again in %s s", error, REST_S)
                self._loop.remove_reader(listening.fileno())
                timer = self._loop.call_later(REST_S, self._again, listening, came)
                self._sockets[listening] = timer
                return
            came(sock)

    def _again(self, listening: socket.socket, came: Came) -> None:
        self.add(listening, came)
        self._accept(listening, came)

    def close(self) -> None:
        """Stop listening."""
        for sock, timer in self._sockets.items():
            if timer is not None:
                timer.cancel()
            with contextlib.suppress(OSError):
                self._loop.remove_reader(sock.fileno())
            sock.close()
        self._sockets.clear()
