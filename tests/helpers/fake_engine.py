"""An engine that answers with what a test tells it: the other end of `rpc.wire`, in a thread."""

import array
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import msgspec

from bulkhead.errors import BulkheadError
from bulkhead.rpc import wire

Handler = Callable[[dict[str, Any], list[int]], Any]
"""Gets (params, descriptors). Returns the result, or a generator of items whose return is it."""


class FakeEngine:
    """Listens on `path`; `calls` lists every (method, params) that came."""

    def __init__(self, path: str, handlers: dict[str, Handler]) -> None:
        self.path = path
        self.handlers = handlers
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.concurrent = False
        """Whether requests of one connection are served at once, each on a thread of its own."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._listener.bind(self.path)
        self._listener.listen(16)
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[:1]:
            thread.join()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # the client was first
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._sockets:
            sock.close()
        os.unlink(self.path)

    def methods(self) -> list[str]:
        """Names of what was called, in order."""
        return [name for name, _ in self.calls]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        splitter = wire.Splitter()
        fds: list[int] = []
        while True:
            try:
                data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(64))
            except OSError:
                return
            for _, _, payload in ancillary:
                fds.extend(array.array("i", payload[: len(payload) & ~3]))
            if not data:
                return
            for message in splitter.feed(data):
                given, fds = fds[: message.fds], fds[message.fds :]
                if not self.concurrent:
                    self._answer(sock, message, given)
                    continue
                thread = threading.Thread(target=self._answer, args=(sock, message, given))
                self._threads.append(thread)
                thread.start()

    def _answer(self, sock: socket.socket, message: wire.Message, given: list[int]) -> None:
        if message.method == "cancel":
            return
        params = msgspec.msgpack.decode(message.params)
        self.calls.append((message.method, params))
        try:
            handler = self.handlers[message.method]
            outcome = handler(params, given)
            result = outcome
            if isinstance(outcome, Iterator):
                result = self._items(sock, message.id, outcome)
            reply = wire.Message(message.id, result=wire.pack(result), done=True)
        except BulkheadError as error:
            failure = wire.Failure(error.category, error.message)
            reply = wire.Message(message.id, error=failure, done=True)
        except KeyError:
            failure = wire.Failure("not-found", f"fake engine: no handler for {message.method}")
            reply = wire.Message(message.id, error=failure, done=True)
        finally:
            for fd in given:
                os.close(fd)
        with contextlib.suppress(OSError):  # the client left
            sock.sendall(wire.frame(reply))

    def _items(self, sock: socket.socket, number: int, items: Iterator[Any]) -> Any:
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                return end.value
            try:
                sock.sendall(wire.frame(wire.Message(number, item=wire.pack(item))))
            except OSError:
                return None
