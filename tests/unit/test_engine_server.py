"""The RPC server: frames, errors, descriptors, cancellation, slow and hostile clients."""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from bulkhead.engine.calls import Call, Nothing, Params, Table
from bulkhead.engine.server import HIGH_WATER, Server
from bulkhead.errors import Conflict
from bulkhead.rpc import wire

TABLE = Table()
LOG: list[str] = []


class Echo(Params, frozen=True):
    """Something."""

    text: str


@TABLE.method("echo", Echo)
async def echo(engine: Any, params: Echo, call: Call) -> dict[str, Any]:
    """Say it."""
    return {"text": params.text}


@TABLE.method("fail", Nothing)
async def fail(engine: Any, params: Nothing, call: Call) -> None:
    """A clear error."""
    raise Conflict("it is taken", owner="abc")


@TABLE.method("defect", Nothing)
async def defect(engine: Any, params: Nothing, call: Call) -> None:
    """A defect."""
    raise ZeroDivisionError("oops")


@TABLE.method("wait", Nothing)
async def wait(engine: Any, params: Nothing, call: Call) -> None:
    """Wait to be cancelled."""
    LOG.append("waiting")
    try:
        await asyncio.Event().wait()
    finally:
        LOG.append("cancelled")


@TABLE.method("write", Nothing)
async def write(engine: Any, params: Nothing, call: Call) -> None:
    """Write to the descriptor that came along."""
    with call.take_fd("the output") as fd:
        os.write(int(fd), b"written")


@TABLE.method("flood", Nothing)
async def flood(engine: Any, params: Nothing, call: Call) -> None:
    """More than a client that does not read can take."""
    for number in range(1000):
        LOG.append(str(number))
        await call.item(b"x" * 65536)


class Client:
    """One end of a socket pair of which the server has the other."""

    def __init__(self, server: Server) -> None:
        from bulkhead.engine.server import Connection

        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        theirs.setblocking(False)
        self.connection = Connection(server, theirs)
        server.connections.add(self.connection)
        self._splitter = wire.Splitter()

    async def send(self, message: wire.Message, fds: list[int] | None = None) -> None:
        data = wire.frame(message)
        if fds:
            sent = socket.send_fds(self.sock, [data], fds)
            data = data[sent:]
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def answer(self) -> wire.Message:
        while True:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            assert data, "hung up"
            for message in self._splitter.feed(data):
                if message.done:
                    return message

    async def ask(self, method: str, params: object = None, **more: Any) -> wire.Message:
        fds = more.pop("fds", [])
        raw = wire.pack({} if params is None else params)
        await self.send(wire.Message(id=1, method=method, params=raw, fds=len(fds)), fds)
        return await self.answer()


def serve(scenario: Callable[[Client, Server], Awaitable[None]]) -> None:
    async def main() -> None:
        LOG.clear()
        server = Server(None, TABLE)  # type: ignore[arg-type]
        client = Client(server)
        try:
            await asyncio.wait_for(scenario(client, server), 60)
        finally:
            client.sock.close()
            await server.close()

    asyncio.run(main())


def test_a_result_comes_back() -> None:
    async def scenario(client: Client, server: Server) -> None:
        answer = await client.ask("echo", {"text": "hello"})
        assert msgspec.msgpack.decode(answer.result) == {"text": "hello"}

    serve(scenario)


@pytest.mark.parametrize(
    ("method", "params", "category", "words"),
    [
        ("fail", {}, "conflict", "it is taken"),
        ("nope", {}, "invalid", "unknown method 'nope'"),
        ("echo", {"text": 1}, "invalid", "$.text"),
        ("echo", {"text": "a", "more": 1}, "invalid", "more"),
        ("echo", {}, "invalid", "text"),
        ("defect", {}, "internal", "unexpected ZeroDivisionError: oops"),
        ("write", {}, "invalid", "the file descriptor for the output is missing"),
    ],
)
def test_errors_have_a_category_and_one_line(
    method: str, params: dict[str, Any], category: str, words: str
) -> None:
    async def scenario(client: Client, server: Server) -> None:
        answer = await client.ask(method, params)
        assert answer.error is not None
        assert answer.error.category == category
        assert words in answer.error.message
        if method == "fail":
            assert answer.error.details == {"owner": "abc"}

    serve(scenario)


def test_descriptors_cross() -> None:
    async def scenario(client: Client, server: Server) -> None:
        reading, writing = os.pipe()
        answer = await client.ask("write", fds=[writing])
        os.close(writing)
        assert answer.error is None
        assert os.read(reading, 100) == b"written"
        assert os.read(reading, 100) == b""  # the server closed its copy
        os.close(reading)

    serve(scenario)


def test_a_cancel_frame_cancels_that_request() -> None:
    async def scenario(client: Client, server: Server) -> None:
        await client.send(wire.Message(id=7, method="wait"))
        while "waiting" not in LOG:
            await asyncio.sleep(0)
        await client.send(wire.Message(id=7, method="cancel"))
        answer = await client.answer()
        assert answer.id == 7
        assert answer.error is not None
        assert LOG == ["waiting", "cancelled"]
        assert (await client.ask("echo", {"text": "still here"})).error is None

    serve(scenario)


def test_a_client_that_leaves_cancels_its_requests() -> None:
    async def scenario(client: Client, server: Server) -> None:
        await client.send(wire.Message(id=7, method="wait"))
        while "waiting" not in LOG:
            await asyncio.sleep(0)
        client.sock.close()
        while "cancelled" not in LOG:
            await asyncio.sleep(0)
        assert not server.connections

    serve(scenario)


def test_a_client_that_does_not_read_stops_its_stream() -> None:
    async def scenario(client: Client, server: Server) -> None:
        await client.send(wire.Message(id=1, method="flood"))
        quiet = 0
        while quiet < 200:
            before = len(LOG)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(LOG) == before else 0
        assert 0 < len(LOG) < 4 * HIGH_WATER // 65536
        await client.answer()
        assert len(LOG) == 1000

    serve(scenario)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", wire.MAX_FRAME + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        wire.frame(wire.Message(id=1, method="echo", fds=3)),
    ],
)
def test_what_is_not_a_frame_ends_the_connection(data: bytes) -> None:
    async def scenario(client: Client, server: Server) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client.sock, data)
        assert await loop.sock_recv(client.sock, 10) == b""
        assert not server.connections

    serve(scenario)
