"""One connection to the engine: frames of `rpc.wire` over a blocking Unix socket.

A `Connection` belongs to one thread at a time. Many requests may be under way on it (`send`
several, then `receive`); `call` and `stream` are the simple forms for one.
"""

import array
import os
import socket
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec

from bulkhead.errors import Unavailable, rebuild
from bulkhead.rpc import wire

_decode = msgspec.msgpack.Decoder().decode
_MAX_DESCRIPTORS = socket.CMSG_LEN(wire.MAX_FDS * 4)


def _gone(reason: str) -> Unavailable:
    return Unavailable(f"the engine closed the connection ({reason}); see its log, or run again")


class Connection:
    """A client's end. Closing it cancels, in the engine, what is still under way."""

    __slots__ = ("_next", "_open", "_ready", "_socket", "_splitter", "descriptors")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._splitter = wire.Splitter()
        self._ready: list[wire.Message] = []
        self._next = 0
        self._open = 0
        self.descriptors: list[int] = []
        """Descriptors that came with frames (rare), owned by whoever takes them out."""

    @classmethod
    def open(cls, path: str) -> "Connection":
        """Connect to the socket at `path`; OSError as connect(2) says."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        """The socket's descriptor, for poll(2)."""
        return self._socket.fileno()

    def alive(self) -> bool:
        """Whether an idle connection is still usable: nothing to read, peer not gone."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return not self._ready
        except OSError:
            return False
        return False  # an end of file, or bytes that nobody asked for

    def close(self) -> None:
        """Close; safe to repeat."""
        self._socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> int:
        """Send one request; its number. `fds` are lent: the engine gets copies."""
        self._next += 1
        message = wire.Message(self._next, method, wire.pack(params or {}), len(fds))
        self._open += 1
        self._write(wire.frame(message), fds)
        return self._next

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come, or has not been taken."""
        return self._open > 0 or bool(self._ready)

    def cancel(self, request: int) -> None:
        """Ask the engine to stop `request`; its final frame still comes."""
        self._write(wire.frame(wire.Message(request, "cancel")), ())

    def _write(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sent = self._socket.sendmsg([data], rights)
                if sent < len(data):
                    self._socket.sendall(data[sent:])
            else:
                self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _gone(error.strerror or "broken pipe") from error

    def receive(self) -> wire.Message:
        """The next frame of any request; Unavailable when the engine is gone."""
        while not self._ready:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    262144, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError as error:
                raise _gone("reset") from error
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self.descriptors.extend(array.array("i", payload[: len(payload) & ~3]))
            if not data:
                raise _gone("end of stream")
            try:
                self._ready = self._splitter.feed(data)
            except ValueError as error:
                raise Unavailable(f"the engine sent something that is no frame: {error}") from error
        message = self._ready.pop(0)
        if message.done:
            self._open -= 1
        return message

    def pending(self) -> bool:
        """Whether `receive` would return at once, from frames that were read already."""
        return bool(self._ready)

    def stream(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Generator[Any, None, Any]:
        """Every item of one request; the generator's return value is the result.

        Raises the engine's error as an exception of `errors`. A generator that is dropped early
        leaves the request running: close the connection to cancel it.
        """
        number = self.send(method, params, fds)
        while True:
            message = self.receive()
            if message.id != number:
                continue
            if message.error is not None:
                raise failure(message.error)
            if message.done:
                return value(message.result)
            yield value(message.item)

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """One request's result, its items dropped; raises like `stream`."""
        number = self.send(method, params, fds)
        while True:
            message = self.receive()
            if message.id != number or not message.done:
                continue
            if message.error is not None:
                raise failure(message.error)
            return value(message.result)

    def call_many(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any | Exception]:
        """Send all, then collect: results in the order of `requests`, errors as exceptions."""
        places = {self.send(method, params): at for at, (method, params) in enumerate(requests)}
        answers: list[Any] = [None] * len(places)
        while places:
            message = self.receive()
            if not message.done or message.id not in places:
                continue
            at = places.pop(message.id)
            answers[at] = failure(message.error) if message.error else value(message.result)
        return answers


def value(raw: msgspec.Raw) -> Any:
    """The Python value of a frame's item or result; None when absent."""
    return _decode(raw) if len(raw) else None


def failure(error: wire.Failure) -> Exception:
    """The exception for an error frame."""
    return rebuild(error.category, error.message, error.details)
