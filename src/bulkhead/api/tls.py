"""TLS below a connection, with half-close: a client that sends no more may still be answered.

asyncio's own TLS ends the connection when the peer says close_notify. Docker's clients say it when
the input of an attached container ends, and read on.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

HANDSHAKE_WITHIN_S = 30.0
_READ = 64 << 10


class Facade(asyncio.Transport):
    """What the inner protocol writes to."""

    def __init__(self, tls: "Tls") -> None:
        super().__init__()
        self._tls = tls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What the transport below knows."""
        return self._tls.raw.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As below."""
        self._tls.raw.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        """As below."""
        self._tls.raw.pause_reading()

    def resume_reading(self) -> None:
        """As below."""
        self._tls.raw.resume_reading()

    def is_closing(self) -> bool:
        """As below."""
        return self._tls.raw.is_closing()

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        """Send encrypted."""
        self._tls.send(bytes(data))

    def close(self) -> None:
        """Say that no more comes, send what is left, and close."""
        self._tls.close()

    def abort(self) -> None:
        """Close at once."""
        self._tls.raw.abort()


class Tls(asyncio.Protocol):
    """The protocol of the socket; `make` gives the one above once the peer is known."""

    def __init__(
        self,
        context: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        unknown: "set[Tls]",
    ) -> None:
        """`unknown`: it is in there until the handshake is done, or the connection lost."""
        self._make = make
        self._unknown = unknown
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._inner: asyncio.Protocol | None = None
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self.raw: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the handshake, but not for ever."""
        assert isinstance(transport, asyncio.Transport)
        self.raw = transport
        self._unknown.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HANDSHAKE_WITHIN_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Decrypt, and hand on; what comes after close_notify is nothing to us."""
        if self._ended:
            return
        self._incoming.write(data)
        try:
            if self._inner is None:
                self._object.do_handshake()
                self._begin()
            self._read()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError:
            self._flush()  # the alert that says why
            self.raw.close()
        else:
            self._flush()

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unknown.discard(self)
        self._inner = self._make()
        self._inner.connection_made(Facade(self))

    def _read(self) -> None:
        assert self._inner is not None
        while not self._ended:
            try:
                data = self._object.read(_READ)
            except ssl.SSLZeroReturnError:
                data = b""
            if not data:
                self._ended = True
                self._inner.eof_received()
                return
            self._inner.data_received(data)

    def send(self, data: bytes) -> None:
        """Encrypt and send."""
        if not self.raw.is_closing() and data:
            self._object.write(data)
            self._flush()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self.raw.is_closing():
            self.raw.write(data)

    def close(self) -> None:
        """Say close_notify and close."""
        if self.raw.is_closing():
            return
        with contextlib.suppress(ssl.SSLError):  # its own close_notify need not have come
            self._object.unwrap()
        self._flush()
        self.raw.close()

    def pause_writing(self) -> None:
        """As below."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """As below."""
        if self._inner is not None:
            self._inner.resume_writing()

    def eof_received(self) -> bool:
        """Without close_notify, or after it: the peer is gone."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Say so above."""
        if self._timer is not None:
            self._timer.cancel()
        self._unknown.discard(self)
        if self._inner is not None:
            self._inner.connection_lost(error)
