"""The API's connections at their limits: uploads that break, peers without certificates."""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from bulkhead.api import exchange, tls
from bulkhead.api.connection import Connection
from bulkhead.api.message import BadRequest, Head
from bulkhead.linux.fds import OwnedFd


class _Transport(asyncio.Transport):
    """A socket's transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: Any) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return False


def _upload(*pieces: bytes, fault: Exception | None = None) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if fault is not None:
            raise fault

    return SimpleNamespace(connection=SimpleNamespace(chunks=chunks))


def test_a_broken_body_is_no_success() -> None:
    async def work(file: OwnedFd) -> bytes:
        return b"".join([piece async for piece in exchange.pieces(file)])

    async def whole() -> bytes:
        return await exchange.with_upload(_upload(b"a", b"b"), work)

    async def broken() -> bytes:
        return await exchange.with_upload(_upload(b"a", fault=BadRequest("broken")), work)

    assert asyncio.run(whole()) == b"ab"
    with pytest.raises(BadRequest, match="broken"):
        asyncio.run(broken())


def test_an_upload_that_nobody_wants_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OwnedFd] = []
    pipe = exchange.pipe

    def remembered() -> tuple[OwnedFd, OwnedFd]:
        made.extend(pipe())
        return made[0], made[1]

    async def work(file: OwnedFd) -> None:
        raise BadRequest("refused before anything is read")

    monkeypatch.setattr(exchange, "pipe", remembered)
    with pytest.raises(BadRequest, match="refused"):
        asyncio.run(exchange.with_upload(_upload(b"a"), work))
    assert [fd.closed for fd in made] == [True, True]


def test_what_is_no_request_is_answered_after_one_that_was() -> None:
    async def handle(connection: Connection, head: Head) -> None:
        connection.began = True
        connection.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async def scene() -> bytes:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: Connection(handle, set()), ours)
        reader, writer = await asyncio.open_connection(sock=theirs)
        writer.write(b"GET / HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
        answers = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answers

    assert re.findall(rb"HTTP/1\.1 (\d+)", asyncio.run(scene())) == [b"204", b"400"]


def test_who_has_shown_no_certificate_is_counted() -> None:
    async def scene() -> None:
        unknown: set[tls.Tls] = set()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        peer = tls.Tls(context, asyncio.Protocol, unknown)
        peer.connection_made(_Transport())
        assert unknown == {peer}
        peer.connection_lost(None)
        assert not unknown

    asyncio.run(scene())
