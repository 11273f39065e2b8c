"""The agent inside a machine: runs bulkhead's commands for the engine outside (link.py).

`python -m bulkhead.machines.agent`, as root, by a systemd unit (payload.py). It trusts the host.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
import termios

from bulkhead.errors import Invalid
from bulkhead.machines import link
from bulkhead.machines.link import Kind

_DEVICE = f"/dev/virtio-ports/{link.PORT}"
_AGAIN_S = 0.2
_PIECE = 32 << 10


class Command:
    """One command and its streams."""

    def __init__(self, agent: "Agent", channel: int) -> None:
        self._agent = agent
        self._channel = channel
        self._process: asyncio.subprocess.Process | None = None
        self._room = {Kind.OUTPUT: link.WINDOW, Kind.ERROR: link.WINDOW}
        self._more = asyncio.Event()
        self._input: asyncio.Queue[bytes] = asyncio.Queue()

    async def run(self, wanted: dict[str, object]) -> None:
        """Run it to its end."""
        argv = [str(word) for word in wanted["argv"]]  # type: ignore[attr-defined]
        words = [sys.executable, "-m", "bulkhead", *argv]
        master = slave = -1
        if wanted.get("tty"):
            master, slave = os.openpty()
            size = struct.pack("HHHH", wanted.get("rows") or 24, wanted.get("columns") or 80, 0, 0)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        pipe = asyncio.subprocess.PIPE
        given = (slave, slave, slave) if slave >= 0 else (pipe, pipe, pipe)
        self._process = process = await asyncio.create_subprocess_exec(
            *words, stdin=given[0], stdout=given[1], stderr=given[2], start_new_session=True
        )
        if slave >= 0:
            os.close(slave)
        await self._streams(process, master)
        code = await process.wait()
        self._agent.send(Kind.EXIT, self._channel, link.number(code if code >= 0 else 128 - code))

    async def _streams(self, process: asyncio.subprocess.Process, master: int) -> None:
        if master >= 0:
            feeding = asyncio.create_task(self._feed_terminal(master))
            await asyncio.to_thread(lambda: None)
            await self._terminal(master)
        else:
            assert process.stdout is not None
            assert process.stderr is not None
            feeding = asyncio.create_task(self._feed(process))
            await asyncio.gather(
                self._copy(process.stdout, Kind.OUTPUT), self._copy(process.stderr, Kind.ERROR)
            )
        feeding.cancel()
        if master >= 0:
            os.close(master)

    async def _terminal(self, master: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.run_in_executor(None, os.read, master, _PIECE)
            except OSError:  # EIO: nobody has the other end any more
                return
            if not data:
                return
            await self._say(Kind.OUTPUT, data)

    async def _copy(self, reader: asyncio.StreamReader, kind: Kind) -> None:
        while data := await reader.read(_PIECE):
            await self._say(kind, data)

    async def _say(self, kind: Kind, data: bytes) -> None:
        while self._room[kind] < len(data):
            self._more.clear()
            await self._more.wait()
        self._room[kind] -= len(data)
        self._agent.send(kind, self._channel, data)

    async def _feed(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            while data := await self._input.get():
                process.stdin.write(data)
                await process.stdin.drain()
                self._agent.send(Kind.TAKEN, self._channel, link.number(len(data)))
        process.stdin.close()

    async def _feed_terminal(self, master: int) -> None:
        while data := await self._input.get():
            await asyncio.to_thread(os.write, master, data)
            self._agent.send(Kind.TAKEN, self._channel, link.number(len(data)))

    def take(self, frame: link.Frame) -> None:
        """A frame for it."""
        if frame.kind == Kind.INPUT and frame.payload:
            self._input.put_nowait(frame.payload)
        elif frame.kind == Kind.INPUT_END:
            self._input.put_nowait(b"")
        elif frame.kind == Kind.SIGNAL and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(link.number_in(frame.payload))
        elif frame.kind == Kind.TAKEN and len(frame.payload) == 5:
            self._room[Kind(frame.payload[4])] += link.number_in(frame.payload[:4])
            self._more.set()

    def end(self) -> None:
        """The host has forgotten it."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)


class Agent:
    """Everything on one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._commands: dict[int, Command] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._splitter = link.Splitter()

    def send(self, kind: Kind, channel: int, payload: bytes = b"") -> None:
        """Put one frame in the queue; commands are held back by their windows."""
        self._out.put_nowait(link.frame(kind, channel, payload))

    async def serve(self) -> None:
        """Until the machine ends."""
        writing = asyncio.create_task(self._write())
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        while not writing.done():
            try:
                data = os.read(self._port, _PIECE)
            except BlockingIOError:
                readable.clear()
                loop.add_reader(self._port, readable.set)
                await readable.wait()
                loop.remove_reader(self._port)
                continue
            if not data:  # nobody is at the other end
                await asyncio.sleep(_AGAIN_S)
                continue
            self._take(data)

    def _take(self, data: bytes) -> None:
        before = self._splitter.greeting
        try:
            frames = self._splitter.feed(data)
        except Invalid:
            self._splitter = link.Splitter()
            return
        if self._splitter.greeting != before:
            for command in self._commands.values():
                command.end()
            self._commands.clear()
            while not self._out.empty():
                self._out.get_nowait()
            self._out.put_nowait(link.MARK + self._splitter.greeting)
        for frame in frames:
            if frame.kind == Kind.RUN:
                command = self._commands[frame.channel] = Command(self, frame.channel)
                task = asyncio.create_task(self._run(command, frame))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif frame.channel in self._commands:
                self._commands[frame.channel].take(frame)

    async def _run(self, command: Command, frame: link.Frame) -> None:
        try:
            await command.run(json.loads(frame.payload))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.send(Kind.ERROR, frame.channel, f"agent: {error}\n".encode()[:1000])
            self.send(Kind.EXIT, frame.channel, link.number(125))
        finally:
            if self._commands.get(frame.channel) is command:
                del self._commands[frame.channel]

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        while True:
            view = memoryview(await self._out.get())
            while view:
                try:
                    view = view[os.write(self._port, view) :]
                except BlockingIOError:
                    writable.clear()
                    loop.add_writer(self._port, writable.set)
                    await writable.wait()
                    loop.remove_writer(self._port)


def main() -> None:
    """Serve the port."""
    port = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    asyncio.run(Agent(port).serve())


if __name__ == "__main__":
    main()
