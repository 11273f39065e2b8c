"""How a monitor tells of a start: one packet on a socket, STARTED or FAILED.

    <workload run directory>/guest/NAME.sock     made for one start, removed after it

The directory is mounted read-only in the jail, as /run/host; whoever is in there can connect and
send one packet, and is believed no more than the guest is.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from bulkhead.boundaries.guest import frames
from bulkhead.errors import Unavailable
from bulkhead.linux.fds import OwnedFd

INSIDE = "/run/host"
_PACKET = frames.HEADER.size + frames.FRAME_MAX
_ID = struct.Struct("<I")


class Report:
    """A listening socket in `directory`, for user `uid`."""

    def __init__(self, directory: str, uid: int) -> None:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._directory = OwnedFd(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._name = f"{os.urandom(6).hex()}.sock"
        self.process = 0
        """What the monitor calls the process; of members."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            # By way of the descriptor: the path itself may be longer than a socket's may be.
            path = f"/proc/self/fd/{int(self._directory)}/{self._name}"
            self._socket.bind(path)
            os.chown(self._name, uid, uid, dir_fd=int(self._directory))
            self._socket.listen(1)
        except BaseException:
            self.close()
            raise

    @property
    def inside(self) -> str:
        """Its path in the jail."""
        return f"{INSIDE}/{self._name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it."""
        self._socket.close()
        if not self._directory.closed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=int(self._directory))
        self._directory.close()

    async def wait(self, pidfd: int, steps: Mapping[int, Sequence[str]], timeout_s: float) -> int:
        """The process id that the guest gave the process.

        Raises what its FAILED says (LaunchFailed and its kinds), or Unavailable if the process
        behind `pidfd` ends without a word, or says nothing in time.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def on_end() -> None:
            loop.remove_reader(pidfd)
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(pidfd, on_end)
        receiving = loop.create_task(self._receive())
        both: set[asyncio.Future[Any]] = {receiving, ended}
        try:
            await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and ended.done():
                # What it said before it ended is in the socket.
                await asyncio.wait({receiving}, timeout=0.2)
            if not receiving.done():
                what = "its monitor has ended" if ended.done() else f"silent for {timeout_s:.0f} s"
                raise Unavailable(f"the guest did not start: {what}")
            return self._started(receiving.result(), steps)
        finally:
            loop.remove_reader(pidfd)
            receiving.cancel()

    async def _receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._socket)
        with connection:
            return await loop.sock_recv(connection, _PACKET)

    def _started(self, packet: bytes, steps: Mapping[int, Sequence[str]]) -> int:
        found = frames.Decoder().feed(packet)
        if len(found) != 1:
            raise Unavailable("the guest did not start, and its monitor did not say why")
        (frame,) = found
        if frame.type == frames.Type.FAILED:
            raise frames.failure(frame, steps.get(frame.id, ()))
        if frame.type != frames.Type.STARTED:
            raise frames.GuestProtocolError(f"the monitor said {frame.type} instead of STARTED")
        if len(frame.payload) == _ID.size:
            (self.process,) = _ID.unpack(frame.payload)
        return frame.arg
