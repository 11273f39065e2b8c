"""Commands in machines: the engine's end of each machine's link (machines/link.py).

One connection per machine, made when it is first needed. The machine is not trusted: its frames
are bounded, only for channels of ours, and never more than a stream's window.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, Conflict, Invalid, NotFound, Unavailable
from bulkhead.linux.fds import OwnedFd, readable
from bulkhead.machines import link
from bulkhead.machines.link import Kind

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

SOCKET = "link.sock"
_GREETING_S = 20.0
_PIECE = 32 << 10
_SLICE = 4096
"""Bytes that a pipe takes at once when poll(2) says that it takes some."""


class _Channel:
    """One command that runs in a machine."""

    def __init__(self) -> None:
        self.out: asyncio.Queue[link.Frame] = asyncio.Queue()
        self.owed = {Kind.OUTPUT: 0, Kind.ERROR: 0}
        self.room = link.WINDOW
        self.more = asyncio.Event()
        self.ended = False


class Link:
    """The connection to one machine."""

    def __init__(self, sock: socket.socket, nonce: bytes) -> None:
        self._socket = sock
        self._splitter = link.Splitter(nonce)
        self._channels: dict[int, _Channel] = {}
        self._next = 1
        self._sending = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self.closed = False
        self._why = "the machine has ended, or its engine was lost"

    @classmethod
    async def open(cls, directory: str) -> "Link":
        """Greet the agent of the machine with this run directory; Unavailable if it is silent."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with OwnedFd(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
                await loop.sock_connect(sock, f"/proc/self/fd/{int(folder)}/{SOCKET}")
            made = cls(sock, os.urandom(link.NONCE))
            async with asyncio.timeout(_GREETING_S):
                await loop.sock_sendall(sock, made._splitter.opening)
                while not made._splitter.greeted:
                    data = await loop.sock_recv(sock, _PIECE)
                    if not data:
                        raise Unavailable("the machine has ended")
                    made._splitter.feed(data)
        except (TimeoutError, OSError) as error:
            sock.close()
            raise Unavailable(
                "the engine in the machine does not answer (yet): it may still be booting; "
                f"see vm logs ({str(error) or 'silent'})"
            ) from error
        except BaseException:
            sock.close()
            raise
        made._reading = loop.create_task(made._read())
        return made

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._socket, _PIECE):
                for frame in self._splitter.feed(data):
                    self._take(frame)
        except (OSError, BulkheadError) as error:
            self._why = f"the link to the machine has ended: {error}"
        finally:
            self.close()

    def _take(self, frame: link.Frame) -> None:
        channel = self._channels.get(frame.channel)
        # What takes no room in a window would otherwise be kept without end.
        if channel is None or channel.ended:
            return
        if frame.kind in channel.owed:
            if not frame.payload:
                return
            channel.owed[frame.kind] += len(frame.payload)
            if channel.owed[frame.kind] > link.WINDOW:
                raise Invalid("the machine sends more than it may")
            channel.out.put_nowait(frame)
        elif frame.kind == Kind.EXIT:
            channel.ended = True
            channel.out.put_nowait(frame)
        elif frame.kind == Kind.TAKEN:
            channel.room = min(channel.room + link.number_in(frame.payload), link.WINDOW)
            channel.more.set()

    def close(self) -> None:
        """Hang up; commands that are under way are lost."""
        self.closed = True
        for channel in self._channels.values():
            channel.out.put_nowait(link.Frame(Kind.EXIT, 0, b""))
            channel.more.set()
        if self._reading is not None:
            self._reading.cancel()
        self._socket.close()

    async def _send(self, kind: Kind, channel: int, payload: bytes = b"") -> None:
        async with self._sending:
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_sendall(self._socket, link.frame(kind, channel, payload))
            except OSError as error:
                raise Unavailable(f"the machine has ended: {error}") from error

    async def run(
        self, argv: Sequence[str], fds: Sequence[OwnedFd], *, tty: bool, rows: int, columns: int
    ) -> int:
        """Run a command of bulkhead's with these three streams; its exit code."""
        if len(self._channels) >= link.CHANNELS:
            raise Conflict(f"{link.CHANNELS} commands run in that machine already")
        wanted = {"argv": list(argv), "tty": tty, "rows": rows, "columns": columns}
        payload = json.dumps(wanted).encode()
        if len(payload) > link.MOST:
            raise Invalid("the command line is too long for a machine")
        number, channel = self._next, _Channel()
        self._next += 1
        self._channels[number] = channel
        feeding: asyncio.Task[None] | None = None
        try:
            await self._send(Kind.RUN, number, payload)
            feeding = asyncio.create_task(self._feed(number, channel, int(fds[0])))
            return await self._pass_on(number, channel, fds)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait([feeding])
            del self._channels[number]

    async def _pass_on(self, number: int, channel: _Channel, fds: Sequence[OwnedFd]) -> int:
        while True:
            frame = await channel.out.get()
            if frame.kind == Kind.EXIT:
                if self.closed:
                    raise Unavailable(self._why)
                return link.number_in(frame.payload)
            target = fds[1] if frame.kind == Kind.OUTPUT else fds[2]
            with contextlib.suppress(BrokenPipeError):
                await _write(int(target), frame.payload)
            channel.owed[frame.kind] -= len(frame.payload)
            taken = link.number(len(frame.payload)) + bytes([frame.kind])
            await self._send(Kind.TAKEN, number, taken)

    async def _feed(self, number: int, channel: _Channel, fd: int) -> None:
        with contextlib.suppress(Unavailable):
            while data := await _read(fd):
                while channel.room < len(data) and not self.closed:
                    channel.more.clear()
                    await channel.more.wait()
                channel.room -= len(data)
                await self._send(Kind.INPUT, number, data)
            await self._send(Kind.INPUT_END, number)


async def _ready(fd: int, *, write: bool) -> None:
    """Wait until a pipe or terminal can be read or written; files always can."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    # A descriptor of our own: the client's may be watched for another of its streams already.
    with OwnedFd(os.dup(fd)) as own:
        add, remove = (
            (loop.add_writer, loop.remove_writer)
            if write
            else (loop.add_reader, loop.remove_reader)
        )
        try:
            add(int(own), ready.set)
        except PermissionError:  # epoll(7) knows no files
            return
        try:
            await ready.wait()
        finally:
            remove(int(own))


async def _read(fd: int) -> bytes:
    while True:
        await _ready(fd, write=False)
        if readable(fd, 0):
            try:
                return os.read(fd, _PIECE)
            except BlockingIOError:
                continue
            except OSError:
                return b""


async def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        await _ready(fd, write=True)
        with contextlib.suppress(BlockingIOError):
            view = view[os.write(fd, view[:_SLICE]) :]


class Inside:
    """The links of this engine's machines."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._links: dict[str, Link] = {}
        self._opening: dict[str, asyncio.Lock] = {}

    async def run(
        self, workload: Workload, argv: Sequence[str], fds: Sequence[OwnedFd], *,
        tty: bool, rows: int, columns: int,
    ) -> int:  # fmt: skip
        """Run `bulkhead ARGV` in a machine; its exit code."""
        if workload.record.vm is None or not workload.record.vm.engine:
            raise NotFound(f"No such machine: {workload.record.name} has no engine inside")
        if not workload.running:
            raise Conflict(f"the machine {workload.record.name} is not running")
        found = await self._link(workload)
        return await found.run(argv, fds, tty=tty, rows=rows, columns=columns)

    async def _link(self, workload: Workload) -> Link:
        async with self._opening.setdefault(workload.id, asyncio.Lock()):
            found = self._links.get(workload.id)
            if found is None or found.closed:
                directory = self._engine.home.workload_run(workload.id)
                found = self._links[workload.id] = await Link.open(directory)
            return found

    def end(self, identity: str) -> None:
        """A machine has ended."""
        found = self._links.pop(identity, None)
        if found is not None:
            found.close()
        self._opening.pop(identity, None)

    def close(self) -> None:
        """The engine ends."""
        for identity in list(self._links):
            self.end(identity)
