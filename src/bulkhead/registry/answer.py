"""One HTTP answer: bounded reading, errors in our words, waking on cancellation."""

import contextlib
import socket
import ssl
import urllib.parse
from types import TracebackType
from typing import Self

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError

from bulkhead.errors import Invalid
from bulkhead.registry.waiting import Cancel, Cancelled, Interrupted

_PIECE = 64 << 10


def unreachable(url: str, error: Exception) -> Interrupted:
    """What a broken or impossible connection means to people."""
    host = urllib.parse.urlsplit(url).netloc
    text = str(error)
    if isinstance(error, SSLError | ssl.SSLError) and "CERTIFICATE" in text.upper():
        return Interrupted(
            f"{host} shows a certificate that is not trusted here ({_reason(text)}); put its "
            f"authority's certificate into /etc/bulkhead/certs.d/{host}/ca.crt",
            final=True,
        )
    if isinstance(error, NewConnectionError):
        return Interrupted(f"cannot connect to {host}: {text.rpartition(': ')[2]}")
    return Interrupted(f"the connection to {host} broke: {text[:300]}")


def _reason(text: str) -> str:
    return text.partition("failed: ")[2].partition(" (_ssl")[0] or text[:100]


class Answer:
    """A response whose body is still to be read; close it, or use it in a `with` block."""

    def __init__(self, url: str, response: urllib3.BaseHTTPResponse, cancel: Cancel) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._cancel = cancel
        self._undo = contextlib.ExitStack()
        self._undo.callback(response.close)
        try:
            self._undo.enter_context(cancel.waking(self._wake))
        except BaseException:
            self._undo.close()
            raise

    def _wake(self) -> None:
        """Shut the socket down: whoever reads from it wakes with an error."""
        sock = getattr(self._response.connection, "sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def length(self) -> int | None:
        """The Content-Length, None if not said or not a number."""
        value = self.headers.get("Content-Length", "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the body as they come, b"" at its end; Interrupted if it breaks."""
        try:
            return self._response.read1(size) if size else b""
        except (HTTPError, OSError, ValueError) as error:
            self._cancel.check()
            raise unreachable(self.url, error) from error

    def read_all(self, limit: int, what: str, *, cut: bool = False) -> bytes:
        """The whole body, which may have `limit` bytes; a longer one is Invalid, or `cut`."""
        pieces: list[bytes] = []
        room = limit + 1
        while room > 0 and (piece := self.read(min(room, _PIECE))):
            pieces.append(piece)
            room -= len(piece)
        if room <= 0 and not cut:
            raise Invalid(f"{what} is larger than {limit} bytes; refused")
        return b"".join(pieces)[:limit]

    def close(self) -> None:
        """Give the connection back if only a short rest is unread, else give it up."""
        rest = self.length
        if rest is not None and rest <= _PIECE and not self._cancel.requested:
            with contextlib.suppress(Interrupted, Cancelled):
                self.read_all(_PIECE, "the rest", cut=True)
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
