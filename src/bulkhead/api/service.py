"""From a request to its handler: versions, errors, the connections there are."""

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bulkhead.api import (
    absent,
    answers,
    archives,
    buildkit,
    builds,
    containers,
    extensions,
    images,
    networks,
    processes,
    streams,
    system,
    transfers,
    volumes,
    websocket,
)
from bulkhead.api.answers import Reply
from bulkhead.api.connection import Connection, Gone
from bulkhead.api.exchange import Exchange
from bulkhead.api.message import BadRequest, Head
from bulkhead.api.plain import Plain
from bulkhead.api.routes import ROUTES, SENT
from bulkhead.api.tls import Tls
from bulkhead.engine.calls import Method
from bulkhead.errors import BulkheadError, Invalid, NotFound

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.api")
PARTS = (
    absent, archives, buildkit, builds, containers, extensions, images, networks, processes,
    streams, system, transfers, volumes, websocket,
)  # fmt: skip
"""The modules that add routes."""

MAXIMUM, MINIMUM = (1, 50), (1, 40)
OLDEST = (1, 22)
"""Clients that ask for less than the minimum get its answers: skopeo asks for 1.22 always."""
MAX_CONNECTIONS = 2048
MAX_UNKNOWN = 256
_VERSION = re.compile(r"/v(\d{1,4})\.(\d{1,4})(?=/|$)")


def version_of(path: str) -> tuple[tuple[int, int], str]:
    """(API version, the path without it); Invalid for a version that is not served."""
    match = _VERSION.match(path)
    if match is None:
        return MAXIMUM, path
    asked = int(match[1]), int(match[2])
    given = f"{asked[0]}.{asked[1]}"
    if asked > MAXIMUM:
        raise Invalid(
            f"client version {given} is too new. Maximum supported API version is {{}}.{{}}".format(
                *MAXIMUM
            )
        )
    if asked < OLDEST:
        raise Invalid(
            f"client version {given} is too old. Minimum supported API version is "
            "{}.{}, please upgrade your client to a newer version".format(*MINIMUM)
        )
    return max(asked, MINIMUM), path[match.end() :] or "/"


class Service:
    """Serves the clients of one engine."""

    def __init__(self, engine: "Engine", methods: Mapping[str, Method]) -> None:
        self._engine = engine
        self._methods = methods
        self.connections: set[Connection] = set()
        self.unknown: set[Tls] = set()
        """TCP connections whose handshake is not done."""
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve a client that has just connected."""
        # Who has no certificate yet must not take the room of who has one.
        known, room = (self.unknown, MAX_UNKNOWN) if tls else (self.connections, MAX_CONNECTIONS)
        if len(known) >= room or len(self.connections) >= MAX_CONNECTIONS:
            log.warning("more than %d clients of the API: one is turned away", room)
            sock.close()
            return
        sock.setblocking(False)
        if tls is None and sock.family == socket.AF_UNIX:
            Plain(self._engine.loop, sock, Connection(self.handle, self.connections))
            return
        task = self._engine.loop.create_task(self._connect(sock, tls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        def plain() -> asyncio.Protocol:
            return Connection(self.handle, self.connections)

        def secured() -> asyncio.Protocol:
            assert tls is not None
            return Tls(tls, plain, self.unknown)

        try:
            await self._engine.loop.connect_accepted_socket(secured if tls else plain, sock)
        except OSError as error:
            log.info("a client of the API was not let in: %s", error)
            sock.close()

    async def handle(self, connection: Connection, head: Head) -> None:
        """Answer one request."""
        head.version = MAXIMUM
        exchange = Exchange(self._engine, self._methods, connection, head)
        try:
            reply = await self._answer(exchange, head)
        except BadRequest as error:
            head.keep_alive = False
            reply = answers.refusal(error)
        except BulkheadError as error:
            reply = answers.refusal(error)
        except Gone:
            connection.transport.close()
            return
        except Exception as error:
            log.exception("%s %s failed unexpectedly", head.method, head.path)
            reply = Reply(
                500, text=answers.error_body(f"unexpected {type(error).__name__}: {error}")
            )
        if reply is None:
            return
        if connection.began:
            connection.transport.close()  # too late to say it: cut off
            return
        exchange.send(reply)

    async def _answer(self, exchange: Exchange, head: Head) -> Reply | None:
        head.version, path = version_of(head.path)
        found = ROUTES.find(head.method, path)
        if found is None:
            raise NotFound("page not found")
        handler, exchange.at = found
        result = await handler(exchange)
        if result is SENT:
            if exchange.stream is not None:
                exchange.stream.flush()
            return None
        return result if isinstance(result, Reply) else Reply(200, result)

    async def close(self) -> None:
        """End every connection."""
        for task in list(self._tasks):
            task.cancel()
        for stranger in list(self.unknown):
            stranger.raw.abort()
        for connection in list(self.connections):
            with contextlib.suppress(Exception):
                await connection.finish()
