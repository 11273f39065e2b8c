"""The transport of local clients: a connected socket between the loop and one protocol.

asyncio's own takes a task and several turns of the loop to begin, and a buffer of 256 KiB for each
read; some clients (docker-py) come with a new connection for nearly every request.
"""

import asyncio
import socket
from typing import Any

_READ = 64 << 10


class Plain(asyncio.Transport):
    """Serves `protocol` from now on; the socket is connected, non-blocking and now its own."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: asyncio.Protocol
    ) -> None:
        super().__init__({"socket": sock})
        self._loop = loop
        self._sock = sock
        self._number = sock.fileno()
        self._protocol = protocol
        self._unsent = bytearray()
        self._high, self._low = 64 << 10, 16 << 10
        self._full = False
        """Whether the protocol was told to pause."""
        self._reading = False
        self._ended = False
        self._closing = False
        protocol.connection_made(self)
        self.resume_reading()
        self._readable()  # most clients have sent their request by now

    # --- from the client

    def pause_reading(self) -> None:
        """Leave what comes with the kernel."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._number)

    def resume_reading(self) -> None:
        """Take it again."""
        if not self._reading and not self._ended and not self._closing:
            self._reading = True
            self._loop.add_reader(self._number, self._readable)

    def is_reading(self) -> bool:
        """Whether what comes is taken."""
        return self._reading

    def _readable(self) -> None:
        if not self._reading:
            return
        try:
            data = self._sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if data:
            self._protocol.data_received(data)
            return
        self.pause_reading()
        self._ended = True
        if not self._protocol.eof_received():
            self.close()

    # --- to the client

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Beyond `high` unsent bytes the protocol is to pause, until they are `low`."""
        self._high = high if high is not None else 64 << 10
        self._low = low if low is not None else self._high // 4

    def get_write_buffer_size(self) -> int:
        """How many bytes are unsent."""
        return len(self._unsent)

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        """Send, now as much as goes and the rest when there is room."""
        if self._closing or not data:
            return
        if not self._unsent:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._end(error)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
            self._loop.add_writer(self._number, self._writable)
        self._unsent += data
        if len(self._unsent) > self._high and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        del self._unsent[:sent]
        if self._full and len(self._unsent) <= self._low:
            self._full = False
            self._protocol.resume_writing()
        if not self._unsent:
            self._loop.remove_writer(self._number)
            if self._closing:
                self._end(None)

    # --- the end

    def is_closing(self) -> bool:
        """Whether no more is sent."""
        return self._closing

    def close(self) -> None:
        """Send what is left, then close."""
        if not self._closing:
            self._closing = True
            self.pause_reading()
            if not self._unsent:
                self._loop.call_soon(self._lost, None)

    def abort(self) -> None:
        """Close at once."""
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        self._closing = True
        self.pause_reading()
        if self._unsent:
            self._loop.remove_writer(self._number)
            self._unsent.clear()
        self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        if self._sock.fileno() >= 0:
            self._protocol.connection_lost(error)
            self._sock.close()
