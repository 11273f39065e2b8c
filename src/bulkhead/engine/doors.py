"""Sockets on which others than our own clients are served, by modules imported when they come.

The engine knows such a module by its name only (it stands above the engine) and imports it at the
first connection, so that a door which nobody uses costs a listening socket and no memory.
"""

import asyncio
import functools
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from bulkhead.engine.calls import Method
from bulkhead.engine.listening import Listeners

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

DOCKER = ("bulkhead.api.service", "Service")
"""(module, class) of the Docker Engine API; the class is called with the engine and its methods."""


class Host(Protocol):
    """Who serves a door's clients."""

    def accept(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve a client that has just connected."""

    async def close(self) -> None:
        """End every connection."""


class Door:
    """Listening sockets, and behind them what serves who comes in."""

    def __init__(
        self, engine: "Engine", methods: Mapping[str, Method], host: tuple[str, str] = DOCKER
    ) -> None:
        self._engine = engine
        self._methods = methods
        self._name = host
        self._host: Host | None = None
        self._listening = Listeners(asyncio.get_running_loop())

    def listen(self, sock: socket.socket, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        """Serve a socket that is bound and listening; it belongs to the door from now on."""
        self._listening.add(sock, functools.partial(self._came, tls))

    def _came(self, tls: Callable[[], ssl.SSLContext] | None, sock: socket.socket) -> None:
        try:
            self._behind().accept(sock, tls() if tls else None)
        except Exception:
            log.exception("a client of %s cannot be served", self._name[0])
            sock.close()

    def _behind(self) -> Host:
        """Who serves, imported now if this is the first client."""
        if self._host is None:
            module, name = self._name
            made: Host = getattr(import_module(module), name)(self._engine, self._methods)
            self._host = made
        return self._host

    async def close(self) -> None:
        """Stop listening and end every connection."""
        self._listening.close()
        if self._host is not None:
            await self._host.close()
