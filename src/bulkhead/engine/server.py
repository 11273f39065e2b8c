"""The engine's RPC server: frames of `rpc.wire` on Unix stream sockets, on the asyncio loop.

Written on bare non-blocking sockets since asyncio's streams do not carry SCM_RIGHTS. One task per
request; a `cancel` frame or the client's disconnect cancels it. Output is bounded: a handler that
streams waits in `Call.item` while more than HIGH_WATER bytes are unsent.
"""

import array
import asyncio
import contextlib
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bulkhead.engine.calls import Call, Method
from bulkhead.engine.listening import Listeners
from bulkhead.errors import BulkheadError, Internal, Invalid
from bulkhead.linux.fds import OwnedFd
from bulkhead.rpc import wire

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

HIGH_WATER = 1 << 20
_READ = 1 << 16
_CREDENTIALS = struct.Struct("3i")
_FD_SPACE = socket.CMSG_SPACE(wire.MAX_FDS * 4)


class Connection:
    """One client: its socket, its requests in flight, its unsent output."""

    def __init__(self, server: "Server", sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._loop = server.loop
        self._splitter = wire.Splitter()
        self._fds: deque[OwnedFd] = deque()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._out = bytearray()
        self._writing = False
        self._room: asyncio.Event = asyncio.Event()
        self._room.set()
        self.closed = False
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        numbers: tuple[int, int, int] = _CREDENTIALS.unpack(credentials)
        self.pid, self.uid, self.gid = numbers
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _READ, _FD_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._fds.extend(OwnedFd(fd) for fd in numbers)
        if not data or flags & socket.MSG_CTRUNC or len(self._fds) > 4 * wire.MAX_FDS:
            self.close()
            return
        try:
            for message in self._splitter.feed(data):
                self._dispatch(message)
        except ValueError as error:
            log.warning("client %d: %s", self.pid, error)
            self.close()

    def _dispatch(self, message: wire.Message) -> None:
        if message.method == "cancel":
            task = self._tasks.get(message.id)
            if task is not None:
                task.cancel()
            return
        if message.fds > min(len(self._fds), wire.MAX_FDS) or message.fds < 0:
            raise ValueError(f"request announces {message.fds} descriptors and brings fewer")
        if message.id in self._tasks:
            raise ValueError(f"request number {message.id} is already in use")
        fds = [self._fds.popleft() for _ in range(message.fds)]
        call = Call(self, message.id, message.method, bytes(message.params), fds)
        self._tasks[message.id] = self._loop.create_task(self._serve(call))

    async def _serve(self, call: Call) -> None:
        answer = wire.Message(id=call.id, done=True)
        try:
            method = self._server.methods.get(call.method)
            if method is None:
                raise Invalid(f"unknown method {call.method!r}")
            params = method.decode(call.raw)
            answer.result = wire.pack(await method.handler(self._server.engine, params, call))
        except BulkheadError as error:
            answer.error = wire.Failure(error.category, error.message, dict(error.details))
        except asyncio.CancelledError:
            answer.error = wire.Failure("unavailable", f"{call.method}: canceled")
        except Exception as error:
            log.exception("%s failed unexpectedly", call.method)
            text = f"{call.method}: unexpected {type(error).__name__}: {error}"
            answer.error = wire.Failure(Internal.category, text)
        finally:
            for fd in call.fds:
                fd.close()
            self._tasks.pop(call.id, None)
        self._send(answer)

    def send_item(self, identity: int, value: object) -> None:
        """Queue one item of request `identity`."""
        self._send(wire.Message(id=identity, item=wire.pack(value)))

    def _send(self, message: wire.Message) -> None:
        if self.closed:
            return
        try:
            data = wire.frame(message)
        except (ValueError, TypeError) as error:
            failure = wire.Failure(Internal.category, f"answer cannot be sent: {error}")
            data = wire.frame(wire.Message(id=message.id, error=failure, done=True))
        if not self._writing:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.close()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._writable)
        self._out += data
        if len(self._out) > HIGH_WATER:
            self._room.clear()

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        del self._out[:sent]
        if len(self._out) <= HIGH_WATER // 2:
            self._room.set()
        if not self._out:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())

    async def drained(self) -> None:
        """Return when there is room for more output, or the client is gone."""
        if not self._room.is_set():
            await self._room.wait()

    def close(self) -> None:
        """Hang up and cancel what this client asked for."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for fd in self._fds:
            fd.close()
        self._fds.clear()
        self._room.set()
        for task in list(self._tasks.values()):
            task.cancel()
        self._server.connections.discard(self)

    async def finish(self) -> None:
        """Hang up and wait for the cancelled requests to end."""
        tasks = [task for task in self._tasks.values() if task is not asyncio.current_task()]
        self.close()
        if tasks:
            await asyncio.wait(tasks)


class Server:
    """Accepts clients on the listening sockets and serves `methods` to them."""

    def __init__(self, engine: "Engine", methods: Mapping[str, Method]) -> None:
        self.engine = engine
        self.methods = methods
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.on_idle: Callable[[], None] | None = None
        self._listening = Listeners(self.loop)

    def listen(self, sock: socket.socket) -> None:
        """Serve a socket that is bound and listening; it belongs to the server from now on."""
        self._listening.add(sock, self._came)

    def _came(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            self.connections.add(Connection(self, sock))

    async def close(self) -> None:
        """Stop listening and end every connection."""
        self._listening.close()
        for connection in list(self.connections):
            await connection.finish()
