"""Streams of clients connected to a workload's, through the keeper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.engine.calls import Call
from bulkhead.errors import Invalid
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_NAMES = ("stdin", "stdout", "stderr")
DEFAULT_KEYS = b"\x10\x11"
_CONTROL = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31}


def detach_keys(text: str) -> bytes:
    """The bytes of "ctrl-p,ctrl-q"; Invalid for what is no key."""
    if not text:
        return DEFAULT_KEYS
    found = bytearray()
    for word in text.split(","):
        key = word.removeprefix("ctrl-")
        if len(key) != 1:
            raise Invalid(f"Unknown character: '{word}'")
        if key == word:
            found.append(ord(key))
        elif key.isascii() and key.isalpha():
            found.append(ord(key.lower()) - ord("a") + 1)
        elif key in _CONTROL:
            found.append(_CONTROL[key])
        else:
            raise Invalid(f"Unknown character: '{word}'")
    return bytes(found)


class Streams:
    """The descriptors a client sent for the streams it wants."""

    def __init__(self, call: Call, wanted: Sequence[bool]) -> None:
        self._fds: list[OwnedFd | None] = []
        for name, asked in zip(_NAMES, wanted, strict=True):
            self._fds.append(call.take_fd(name) if asked else None)

    @property
    def any(self) -> bool:
        """Whether there is a stream at all."""
        return any(fd is not None for fd in self._fds)

    def lend(self) -> tuple[int | None, int | None, int | None]:
        """Their numbers; this object keeps them open until `close`."""
        stdin, stdout, stderr = (None if fd is None else int(fd) for fd in self._fds)
        return stdin, stdout, stderr

    async def attach(
        self, engine: "Engine", identity: str, keys: bytes, *, wait: bool = True
    ) -> str:
        """Connect them; "exited", "detached" or "gone"; `wait`: also to the next run."""
        stdin, stdout, stderr = self.lend()
        try:
            return await engine.processes.keeper.attach(
                identity, stdin=stdin, stdout=stdout, stderr=stderr, detach_keys=keys, wait=wait
            )
        finally:
            self.close()

    def close(self) -> None:
        """Let go of them."""
        for fd in self._fds:
            if fd is not None:
                fd.close()
