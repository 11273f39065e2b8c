"""One request being served, and the table of handlers.

Handlers live in `engine/rpc_*.py`. Each is `async def handler(engine, params, call) -> result`,
registered under its method name with the msgspec Struct its parameters must decode to; unknown
keys are refused, so a mistyped option is an error and never ignored.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from bulkhead.errors import Invalid
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine


class Params(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Base of every method's parameters."""


class Nothing(Params, frozen=True):
    """For methods without parameters."""


class Peer(Protocol):
    """Who asked: a connection of ours, or another door's."""

    @property
    def uid(self) -> int:
        """The user id."""

    def send_item(self, identity: int, value: object) -> None:
        """Queue one item of request `identity`."""

    async def drained(self) -> None:
        """Return when there is room for more, or the client is gone."""


class Call:
    """What a handler may do besides returning its result: take descriptors, send items."""

    __slots__ = ("_connection", "fds", "id", "method", "raw")

    def __init__(
        self, connection: Peer, identity: int, method: str, raw: bytes, fds: list[OwnedFd]
    ) -> None:
        self._connection = connection
        self.id = identity
        self.method = method
        self.raw = raw
        self.fds = fds

    @property
    def uid(self) -> int:
        """The caller's user id, by SO_PEERCRED (unix(7))."""
        return self._connection.uid

    def take_fd(self, what: str) -> OwnedFd:
        """The next descriptor sent with the request; Invalid if there is none."""
        if not self.fds:
            raise Invalid(f"{self.method}: the file descriptor for {what} is missing")
        return self.fds.pop(0)

    def send(self, value: object) -> None:
        """Send one item without waiting; for the few small ones of a call."""
        self._connection.send_item(self.id, value)

    async def item(self, value: object) -> None:
        """Send one item; waits while the client is slow (bounded memory)."""
        self._connection.send_item(self.id, value)
        await self._connection.drained()


Handler = Callable[["Engine", Any, Call], Awaitable[object]]
_F = TypeVar("_F", bound=Callable[..., Awaitable[object]])


@dataclass(frozen=True, slots=True)
class Method:
    """A handler with the decoder of its parameters."""

    name: str
    handler: Handler
    decoder: msgspec.msgpack.Decoder[Any]

    def decode(self, raw: bytes) -> object:
        """The parameters; Invalid with the path of what is wrong."""
        try:
            return self.decoder.decode(raw or b"\x80")
        except msgspec.MsgspecError as error:
            raise Invalid(f"{self.name}: {error}") from None


class Table(dict[str, Method]):
    """Methods by name; `@table.method("area.verb", ParamsType)` adds one."""

    def method(self, name: str, params: type[Params]) -> Callable[[_F], _F]:
        """Register the decorated coroutine function."""

        def register(handler: _F) -> _F:
            self[name] = Method(name, handler, msgspec.msgpack.Decoder(params))
            return handler

        return register
