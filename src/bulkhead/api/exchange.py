"""One request and its answer, for handlers: the engine's methods, streams out, bodies in, hijacks.

Output is gathered and sent once per turn of the loop, since a system call per log line would cost
more than the line. Whoever produces much waits in `Stream.drained`.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from bulkhead.api import answers, lenient, message, query
from bulkhead.api.connection import Connection, Gone
from bulkhead.api.message import Head
from bulkhead.engine.calls import Call, Method
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_T = TypeVar("_T")
MAX_BODY = 4 << 20
"""Bytes of a JSON body."""
_GATHER = 64 << 10
_CREDENTIALS = struct.Struct("3i")
NOBODY = 65534

Item = Callable[[Any], None]


class Exchange:
    """What a handler works with."""

    def __init__(
        self,
        engine: "Engine",
        methods: Mapping[str, Method],
        connection: Connection,
        head: Head,
    ) -> None:
        self.engine = engine
        self.methods = methods
        self.connection = connection
        self.head = head
        self.query = head.query
        self.at: dict[str, str] = {}
        """The variable parts of the path."""
        self.stream: Stream | None = None

    @property
    def version(self) -> tuple[int, int]:
        """The API version that the client asked for."""
        return self.head.version

    def header(self, name: str) -> str:
        """A header, "" if absent."""
        return self.head.headers.get(name, "")

    # --- the query

    def text(self, name: str, default: str = "") -> str:
        """A parameter."""
        return query.text(self.query, name, default)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A parameter that is true or false."""
        return query.flag(self.query, name, default=default)

    def number(self, name: str) -> int | None:
        """A whole number."""
        return query.number(self.query, name)

    def filters(self) -> dict[str, Any]:
        """Filters."""
        return query.filters(self.query)

    # --- the body

    async def json(self, kind: type[_T]) -> _T:
        """The body as a value of `kind`."""
        data = await self.connection.body(MAX_BODY)
        if data.strip():
            self._check_kind()
        return lenient.decode(data, kind)

    async def json_object(self) -> dict[str, Any]:
        """The body as any object."""
        data = await self.connection.body(MAX_BODY)
        if not data.strip():
            return {}
        self._check_kind()
        value = lenient.parse(data)
        if not isinstance(value, dict):
            raise Invalid("invalid JSON: expected an object")
        return value

    def _check_kind(self) -> None:
        kind = self.header("content-type").partition(";")[0].strip().lower()
        if kind and kind != "application/json":
            raise Invalid(f"unsupported Content-Type header ({kind}): must be 'application/json'")

    # --- the engine

    async def call(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        fds: Sequence[OwnedFd] = (),
        item: Item | None = None,
    ) -> Any:
        """What the engine's method answers; `fds` are its own from now on, items go to `item`."""
        method = self.methods[name]
        call = Call(_Relay(self, item), 0, name, b"", list(fds))
        try:
            return await method.handler(self.engine, method.decoder.type(**(params or {})), call)
        finally:
            for fd in call.fds:
                fd.close()

    # --- answers

    def send(self, reply: answers.Reply) -> None:
        """A whole answer."""
        head, connection = self.head, self.connection
        headers = common(self.version) | reply.headers
        body = reply.body
        if body:
            headers["Content-Type"] = reply.kind
        if reply.status not in {204, 304}:
            headers["Content-Length"] = str(len(body))
        if not head.keep_alive or connection.ended:
            headers["Connection"] = "close"
        connection.began = True
        data = message.head(reply.status, headers)
        connection.write(data if head.method == "HEAD" else data + body)

    def begin(
        self, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> "Stream":
        """The head of an answer whose body follows in pieces; sent at once."""
        given = common(self.version) | {"Content-Type": kind} | dict(headers or {})
        chunked = self.head.minor > 0
        if chunked:
            given["Transfer-Encoding"] = "chunked"
        if not chunked or not self.head.keep_alive:
            given["Connection"] = "close"
            self.head.keep_alive = False
        self.connection.began = True
        self.connection.write(message.head(200, given))
        self.stream = Stream(self.connection, chunked=chunked)
        return self.stream

    def hijack(self, kind: str, protocol: str = "tcp") -> "Stream":
        """Take the connection out of HTTP: 101, or 200 if no upgrade was asked for."""
        connection = self.connection
        headers = {"Content-Type": kind}
        status = 200
        if self.head.upgrade:
            status = 101
            headers |= {"Connection": "Upgrade", "Upgrade": protocol}
        connection.began = connection.hijacked = True
        connection.write(message.head(status, common(self.version) | headers))
        self.stream = Stream(connection, chunked=False)
        return self.stream


def common(version: tuple[int, int]) -> dict[str, str]:
    """The headers of every answer."""
    return {
        "Api-Version": "{}.{}".format(*version),
        "Docker-Experimental": "false",
        "Ostype": "linux",
        "Server": "Bulkhead (linux)",
    }


class _Relay:
    """What the engine's `Call` sends through."""

    def __init__(self, exchange: Exchange, item: Item | None) -> None:
        self._exchange = exchange
        self._item = item

    @property
    def uid(self) -> int:
        """The client's user; over TCP, which only certificates open, root."""
        sock = self._exchange.connection.extra("socket")
        if sock is None or sock.family != socket.AF_UNIX:
            return 0
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(data)[1])

    def send_item(self, identity: int, value: object) -> None:
        if self._item is not None:
            self._item(value)

    async def drained(self) -> None:
        stream = self._exchange.stream
        if stream is not None:
            await stream.drained()


class Stream:
    """A body in pieces."""

    def __init__(self, connection: Connection, *, chunked: bool) -> None:
        self._connection = connection
        self._chunked = chunked
        self._pending: list[bytes] = []
        self._size = 0
        self._scheduled = False
        self._loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not data:
            return
        self._pending.append(data)
        self._size += len(data)
        if self._size >= _GATHER:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def line(self, value: object) -> None:
        """Send a JSON value and a line end, as Docker's progress streams have it."""
        self.write(answers.json_line(value)[:-1] + b"\r\n")

    def _turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Send now."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        self._pending.clear()
        self._size = 0
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.write(data)

    async def drained(self) -> None:
        """Wait while the client is slow."""
        await self._connection.drained()

    def end(self) -> None:
        """The body is complete."""
        self.flush()
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")

    def fail(self) -> None:
        """The body cannot be completed: the client sees that it is cut off."""
        self.flush()
        self._connection.transport.close()


# --- descriptors


def pipe(size: int = 1 << 20) -> tuple[OwnedFd, OwnedFd]:
    """(read end, write end), with room for `size` bytes if the kernel grants it."""
    import fcntl

    reading, writing = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, size)
    return OwnedFd(reading), OwnedFd(writing)


async def pieces(fd: OwnedFd, size: int = 256 << 10) -> AsyncIterator[bytes]:
    """What comes out of a pipe until its end; the descriptor is closed at the end."""
    loop = asyncio.get_running_loop()
    number = int(fd)
    os.set_blocking(number, False)
    try:
        while True:
            try:
                data = os.read(number, size)
            except BlockingIOError:
                await _ready(loop.add_reader, loop.remove_reader, number)
                continue
            if not data:
                return
            yield data
    finally:
        fd.close()


async def _ready(add: Callable[..., Any], remove: Callable[[int], Any], number: int) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    add(number, ready)
    try:
        await future
    finally:
        remove(number)


async def feed(source: AsyncIterator[bytes], fd: OwnedFd) -> None:
    """Write what comes from `source` into a pipe, then close it; a reader that left is no error."""
    loop = asyncio.get_running_loop()
    number = int(fd)
    os.set_blocking(number, False)
    try:
        async for data in source:
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(number, view) :]
                except BlockingIOError:
                    await _ready(loop.add_writer, loop.remove_writer, number)
                except BrokenPipeError:
                    return
    finally:
        fd.close()


async def with_upload(exchange: Exchange, work: Callable[[OwnedFd], Awaitable[_T]]) -> _T:
    """`work(read end)` while the request's body flows into the pipe."""
    reading, writing = pipe()
    feeding = asyncio.ensure_future(feed(exchange.connection.chunks(), writing))
    try:
        result = await work(reading)
    except BulkheadError:
        if feeding.done() and not feeding.cancelled() and feeding.exception() is not None:
            await feeding  # the body was at fault
        raise
    else:
        if feeding.done() and not feeding.cancelled():
            await feeding  # what was taken for the body's end may have been a fault in it
        return result
    finally:
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError, Gone, BulkheadError):
            await feeding
        writing.close()  # a task that never ran has not
        reading.close()


async def with_download(
    exchange: Exchange,
    work: Callable[[OwnedFd], Awaitable[Any]],
    kind: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send what `work(write end)` writes; its error is the answer while nothing was sent."""
    reading, writing = pipe()
    working = asyncio.ensure_future(work(writing))
    working.add_done_callback(lambda _: writing.close())
    stream: Stream | None = None
    try:
        async with contextlib.aclosing(pieces(reading)) as data:  # type: ignore[type-var]
            async for piece in data:
                if stream is None:
                    stream = exchange.begin(kind, headers)
                stream.write(piece)
                await stream.drained()
        await working
    except BaseException as error:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, BulkheadError):
            await working
        if stream is not None and isinstance(error, BulkheadError):
            stream.fail()
            return
        raise
    if stream is None:
        stream = exchange.begin(kind, headers)
    stream.end()
