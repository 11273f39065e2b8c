"""QMP, QEMU's control protocol: JSON objects on a socket; docs/interop/qmp-spec.rst of QEMU.

    async with Qmp(sock) as control:
        await control.execute("query-status")

One command at a time. What QEMU says is bounded: a longer line ends the conversation.
"""

import asyncio
import json
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from bulkhead.errors import Internal, Unavailable

MAX_LINE = 1 << 20
"""Bytes of one message."""


class Qmp:
    """A conversation on `sock`, which stays the caller's; entering it agrees on capabilities."""

    def __init__(self, sock: socket.socket, *, timeout_s: float = 60.0) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._timeout_s = timeout_s
        self._data = bytearray()

    async def __aenter__(self) -> Self:
        greeting = await self._message()
        if "QMP" not in greeting:
            raise Unavailable("QEMU did not greet")
        await self.execute("qmp_capabilities")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    async def execute(self, command: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """The answer to `command`; descriptors go with it (SCM_RIGHTS).

        Internal with QEMU's words if it refuses, Unavailable if it ends or does not answer in time.
        """
        line = encode(command, **arguments)
        try:
            async with asyncio.timeout(self._timeout_s):
                if fds:
                    # Small and the first in the queue: it fits, or the socket is not one of ours.
                    socket.send_fds(self._socket, [line], list(fds))
                else:
                    await asyncio.get_running_loop().sock_sendall(self._socket, line)
                while True:
                    message = await self._message()
                    if "error" in message:
                        raise Internal(f"QEMU: {command}: {_description(message['error'])}")
                    if "return" in message:
                        return message["return"]
        except TimeoutError:
            raise Unavailable(f"QEMU does not answer {command}") from None
        except OSError as error:
            raise Unavailable(f"QEMU: {command}: {error.strerror}") from error

    async def _message(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._data:
            if len(self._data) > MAX_LINE:
                raise Unavailable("QEMU's message is too long")
            received = await loop.sock_recv(self._socket, 65536)
            if not received:
                raise Unavailable("QEMU has ended")
            self._data += received
        line, _, rest = bytes(self._data).partition(b"\n")
        self._data = bytearray(rest)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unavailable(f"QEMU's message is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise Unavailable("QEMU's message is not an object")
        return message


def encode(command: str, **arguments: Any) -> bytes:
    """The command as QEMU reads it."""
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"


def _description(error: Any) -> str:
    return str(error.get("desc", error)) if isinstance(error, dict) else str(error)
