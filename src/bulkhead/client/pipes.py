"""Requests whose streams are pipes held in this process: everything through one poll loop."""

import os
import select
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from bulkhead.client.connection import Connection, failure, value

_CHUNK = 1 << 16


class Pipes:
    """stdin (if any), stdout and stderr of one request; `lent` are the engine's ends."""

    def __init__(self, stdin: bytes | None, *, stderr: bool) -> None:
        self._stdin = memoryview(stdin or b"")
        self._ours: dict[int, bytearray] = {}
        self._input = -1
        self.lent: list[int] = []
        self._out = bytearray()
        self._err = bytearray()
        if stdin is not None:
            read, self._input = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._input, False)
            self.lent.append(read)
        for buffer in (self._out, self._err) if stderr else (self._out,):
            read, write = os.pipe2(os.O_CLOEXEC)
            self._ours[read] = buffer
            self.lent.append(write)

    @property
    def stdout(self) -> bytes:
        """What came on it."""
        return bytes(self._out)

    @property
    def stderr(self) -> bytes:
        """What came on it."""
        return bytes(self._err)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.sent()
        self._close_input()
        for fd in self._ours:
            os.close(fd)
        self._ours.clear()

    def sent(self) -> None:
        """The engine has its copies: close what was lent, so that ends of file come through."""
        while self.lent:
            os.close(self.lent.pop())

    def _close_input(self) -> None:
        if self._input >= 0:
            fd, self._input = self._input, -1
            os.close(fd)

    def pump(self, connection: Connection, number: int) -> dict[str, Any]:
        """Carry bytes until request `number` has its result and every output has ended."""
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        for fd in self._ours:
            poll.register(fd, select.POLLIN)
        if self._input >= 0:
            poll.register(self._input, select.POLLOUT)
        found: dict[str, Any] | None = None
        while found is None or self._ours:
            for fd, _ in poll.poll():
                if fd == self._input:
                    self._write(poll)
                elif fd in self._ours:
                    self._read(poll, fd)
                elif found is None:
                    found = self._receive(connection, number)
                    if found is not None:
                        poll.unregister(connection.fileno())
        return found

    def _receive(self, connection: Connection, number: int) -> dict[str, Any] | None:
        while True:
            message = connection.receive()
            if message.id == number and message.error is not None:
                raise failure(message.error)
            if message.id == number and message.done:
                return value(message.result) or {}
            if not connection.pending():
                return None

    def _write(self, poll: select.poll) -> None:
        try:
            self._stdin = self._stdin[os.write(self._input, self._stdin[:_CHUNK]) :]
        except BrokenPipeError:
            self._stdin = self._stdin[:0]  # it does not read to the end: its right
        except BlockingIOError:
            return
        if not self._stdin:
            poll.unregister(self._input)
            self._close_input()

    def _read(self, poll: select.poll, fd: int) -> None:
        data = os.read(fd, _CHUNK)
        if data:
            self._ours[fd] += data
            return
        poll.unregister(fd)
        del self._ours[fd]
        os.close(fd)


def feed(connection: Connection, method: str, params: Mapping[str, Any], data: bytes) -> Any:
    """A request that reads `data` from a descriptor; its result."""
    with Pipes(data, stderr=False) as pipes:
        output = pipes.lent.pop()
        os.close(output)  # only input goes there
        number = connection.send(method, params, pipes.lent)
        pipes.sent()
        return pipes.pump(connection, number)


def drain(connection: Connection, method: str, params: Mapping[str, Any]) -> bytes:
    """A request that writes to a descriptor; all that it wrote."""
    with Pipes(None, stderr=False) as pipes:
        number = connection.send(method, params, pipes.lent)
        pipes.sent()
        pipes.pump(connection, number)
        return pipes.stdout
