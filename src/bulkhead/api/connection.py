"""One client's connection: requests one after the other, bounded in size and time.

A task per connection reads a head, has it handled, and sees that the body is consumed. When the
client goes away while a request is handled, the handling is cancelled. An end of file on a Unix
socket says only that the client sends no more; that it is gone shows as a hang-up (epoll(7)).
"""

import asyncio
import contextlib
import fcntl
import logging
import select
import socket
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from bulkhead.api import message
from bulkhead.api.message import BadRequest, Body, Head

log = logging.getLogger("bulkhead.api")

HEAD_WITHIN_S = 30.0
"""How long a client may take for a head that it has begun."""
BODY_WITHIN_S = 120.0
"""How long a client may be silent within a body."""
HIGH_WATER = 1 << 20
"""Received bytes that may wait before no more are read."""
_DRAIN_LIMIT = 256 << 10
"""A body that nobody read is read to its end up to this size, else the connection ends."""
_HEAD_TAKEN_WITHIN_S = 2.0

Handle = Callable[["Connection", Head], Awaitable[None]]


class Gone(Exception):
    """The client closed the connection."""


def _unread(number: int) -> bool:
    """Whether the peer of a Unix socket has not read all of what was sent (unix(7), SIOCOUTQ)."""
    if number < 0:
        return False
    left: int = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return left > 0


def _late(news: "asyncio.Future[bool]") -> None:
    if not news.done():
        news.set_result(False)


class Connection(asyncio.Protocol):
    """The transport's protocol; `handle` answers each request."""

    def __init__(self, handle: Handle, connections: "set[Connection]") -> None:
        self._handle = handle
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.buffer = bytearray()
        self.ended = False
        """Whether the client sends no more."""
        self.lost = False
        self.hijacked = False
        self.handling = False
        self._paused = False
        self._news: asyncio.Future[bool] | None = None
        self._room: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._hangup: select.epoll | None = None
        self._body: Body | None = None
        self._head: Head | None = None
        self._continued = False
        self.began = False
        """Whether the response has begun."""

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=512 << 10, low=64 << 10)
        self._connections.add(self)
        self._task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        """Keep it for whoever reads next."""
        self.buffer += data
        if len(self.buffer) > HIGH_WATER and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """The client sends no more; True keeps the way to it open."""
        self.ended = True
        self._wake()
        if self.handling:
            self._watch_hangup()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone."""
        self.lost = self.ended = True
        self._connections.discard(self)
        self._wake()
        self._make_room()
        self._unwatch_hangup()
        self._cancel()

    def pause_writing(self) -> None:
        """The client does not take what we send."""
        if self._room is None:
            self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """It takes it again."""
        self._make_room()

    def _make_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def _wake(self) -> None:
        news, self._news = self._news, None
        if news is not None and not news.done():
            news.set_result(True)

    def _cancel(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _watch_hangup(self) -> None:
        """After its end of file, notice when the client closes the other direction too."""
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is None or self._hangup is not None or sock.fileno() < 0:
            return
        self._hangup = select.epoll()
        self._hangup.register(sock.fileno(), 0)  # EPOLLHUP and EPOLLERR come unasked
        self._loop.add_reader(self._hangup.fileno(), self._hung_up)

    def _hung_up(self) -> None:
        self._unwatch_hangup()
        self.transport.abort()

    def _unwatch_hangup(self) -> None:
        watch, self._hangup = self._hangup, None
        if watch is not None:
            self._loop.remove_reader(watch.fileno())
            watch.close()

    # --- requests

    async def _serve(self) -> None:
        try:
            while (self.buffer or not self.ended) and not self.transport.is_closing():
                head = await self._read_head()
                if head is None:
                    break
                await self._one(head)
                if not head.keep_alive or self.hijacked or not await self._finish_body():
                    break
        except (asyncio.CancelledError, Gone):
            pass  # by the client, which is gone
        except Exception:
            log.exception("unexpected failure on a connection")
        finally:
            self.buffer.clear()
            self.transport.close()

    async def _one(self, head: Head) -> None:
        self._head, self._body = head, Body(head.length)
        self._continued = not head.expects
        self.began = False
        self.handling = True
        if self.ended:
            self._watch_hangup()
        try:
            await self._handle(self, head)
            await self.drained()
        finally:
            self.handling = False

    async def _read_head(self) -> Head | None:
        """The next request; None when there is none any more."""
        self.began = False
        limit: float | None = None
        while True:
            while self.buffer[:2] == b"\r\n":
                del self.buffer[:2]
            end = self.buffer.find(b"\r\n\r\n", 0, message.MAX_HEAD + 4)
            try:
                if end < 0 and len(self.buffer) > message.MAX_HEAD:
                    raise BadRequest("the request's head is too long", 431)
                if end >= 0:
                    data = bytes(self.buffer[:end])
                    del self.buffer[: end + 4]
                    return message.parse_head(data)
                if end < 0 and b"\n\n" in self.buffer:
                    raise BadRequest("lines of a head end with CR LF")
                if self.buffer and limit is None:
                    limit = self._loop.time() + HEAD_WITHIN_S
                if self.ended:
                    return None
                if not await self._more(limit):
                    raise BadRequest("the request's head took too long", 408)
            except BadRequest as error:
                self._refuse(error)
                return None

    def _refuse(self, error: BadRequest) -> None:
        from bulkhead.api import answers

        body = answers.error_body(error.message)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        if not self.began:
            self.write(message.head(error.status, headers) + body)

    async def _more(self, until: float | None = None) -> bool:
        """Wait for more received bytes or the end; False when `until` (loop time) has passed."""
        if self._paused and len(self.buffer) <= HIGH_WATER // 2:
            self._paused = False
            self.transport.resume_reading()
        self._news = news = self._loop.create_future()
        timer = None if until is None else self._loop.call_at(until, _late, news)
        try:
            found: bool = await news
            return found
        finally:
            if timer is not None:
                timer.cancel()

    # --- for handlers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it comes; Gone if the client leaves within it."""
        body = self._body
        assert body is not None
        if not self._continued:
            self._continued = True
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not body.done:
            part = body.take(self.buffer)
            if part:
                yield part
            elif not body.done:
                if self.ended:
                    raise Gone
                if not await self._more(self._loop.time() + BODY_WITHIN_S):
                    raise BadRequest("the request's body took too long", 408)

    async def body(self, limit: int) -> bytes:
        """The whole body; BadRequest (413) if it is longer than `limit` bytes."""
        found = bytearray()
        if self._body is None or self._body.done:
            return b""
        async for part in self.chunks():
            found += part
            if len(found) > limit:
                raise BadRequest("request body too large", 413)
        return bytes(found)

    async def _finish_body(self) -> bool:
        """Skip what no handler read; False if that is too much, or the client waits to be asked."""
        body = self._body
        if body is None or body.done:
            return True
        if not self._continued:
            return False
        skipped = 0
        with contextlib.suppress(BadRequest, Gone):
            async for part in self.chunks():
                skipped += len(part)
                if skipped > _DRAIN_LIMIT:
                    return False
            return True
        return False

    def write(self, data: bytes) -> None:
        """Send; nothing happens when the client is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    async def drained(self) -> None:
        """Wait until the client has taken most of what was sent; Gone if it left."""
        if self._room is not None:
            await asyncio.shield(self._room)
        if self.lost:
            raise Gone

    async def head_taken(self) -> None:
        """After a hijack: wait until the client has read the head, as far as the kernel says.

        docker-py (to 7.2 at least) loses output that it receives together with the head: it reads
        the head through a buffer and what follows from the socket itself.
        """
        sock: socket.socket | None = self.extra("socket")
        if sock is None or sock.family != socket.AF_UNIX:
            return
        deadline = self._loop.time() + _HEAD_TAKEN_WITHIN_S
        while not self.lost and self._loop.time() < deadline and _unread(sock.fileno()):
            await asyncio.sleep(0.0005)

    async def received(self) -> bytes:
        """After a hijack: the next bytes from the client, b"" at their end."""
        while not self.buffer and not self.ended:
            await self._more()
        data = bytes(self.buffer)
        self.buffer.clear()
        return data

    def extra(self, name: str) -> Any:
        """What the transport knows of the peer."""
        return self.transport.get_extra_info(name)

    async def finish(self) -> None:
        """End it and wait for that."""
        task = self._task
        self.transport.abort()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
