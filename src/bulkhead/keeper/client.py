"""The engine's side of the keeper (`keeper/main.py`): stdio of workloads, attachments.

The keeper may die at any time; the holder starts the next, which takes over. Requests are then sent
again by the client, so callers do not notice. An attachment that comes back continues where it was;
what the old keeper had taken for a client that does not read (at most 64 KiB) is in the log only.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec

from bulkhead.boundary.seam import Stdio
from bulkhead.errors import Conflict, NotFound, Unavailable
from bulkhead.home import Home
from bulkhead.keeper.holder import HolderClient
from bulkhead.keeper.main import Wire

_Asked = tuple[socket.socket, int, "asyncio.Future[str]"]
"""A request under way: on which connection, its number, its answer."""
_CONNECT_WITHIN_S = 60.0
_RETRY_S = 0.01
_MAX_PACKET = 128 << 10


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where output is logged: driver "json-file" or "none"; sizes in bytes, 0 is unlimited."""

    driver: str = "json-file"
    path: str = ""
    max_size: int = 0
    max_file: int = 1


class StdioMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper must know of a process; `encode()` is LaunchRequest.meta / Stdio.meta."""

    tty: bool = False
    stdin_open: bool = False
    stdin_once: bool = False
    log: LogOptions = LogOptions(driver="none")

    def encode(self) -> bytes:
        """As `keeper.main.parse_options` reads it."""
        stdin = "i" if self.stdin_open else ""
        fields = {
            "tty": str(int(self.tty)),
            "stdin_once": str(int(self.stdin_once)),
            "roles": "t" if self.tty else stdin + "oe",
            "driver": self.log.driver,
            "max_size": str(self.log.max_size),
            "max_file": str(self.log.max_file),
            "path": self.log.path,
        }
        return "\n".join(f"{k}={v}" for k, v in fields.items()).encode("utf-8", "surrogateescape")


@contextmanager
def make_stdio(meta: StdioMeta, *, rows: int = 0, columns: int = 0) -> Iterator[Stdio]:
    """The standard streams of a process to be launched, closed here when the block ends.

    Without terminal: pipes (stdin /dev/null unless `stdin_open`); the launcher duplicates what it
    keeps. With one: the program opens it and hands the master to the holder (`send_fd`).
    """
    with contextlib.ExitStack() as undo:
        if meta.tty:
            yield Stdio(terminal=True, meta=meta.encode(), rows=rows, columns=columns)
            return
        keep: list[int] = []

        def pipe() -> tuple[int, int]:
            ends = os.pipe()
            for end in ends:
                undo.callback(os.close, end)
            return ends

        if meta.stdin_open:
            stdin, kept = pipe()
            keep.append(kept)
        else:
            stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, stdin)
        kept_out, stdout = pipe()
        kept_err, stderr = pipe()
        keep += (kept_out, kept_err)
        yield Stdio(stdin=stdin, stdout=stdout, stderr=stderr, keep=tuple(keep), meta=meta.encode())


async def supervise_keeper(holder: HolderClient) -> None:
    """Have the holder keep a keeper running; nothing to do if it does already."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
    with contextlib.ExitStack() as undo:
        fds = [os.memfd_create("keeper-journal"), os.memfd_create("keeper-staging"), *os.pipe()]
        for fd in fds:
            undo.callback(os.close, fd)
        argv = [sys.executable, "-I", "-S", program, holder.home.run]
        env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        with contextlib.suppress(Conflict):
            await holder.supervise("keeper", argv, env, fds)


class KeeperClient:
    """A connection to the keeper of `home`, made when first needed and again when it breaks."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._sock: socket.socket | None = None
        self._number = 0
        self._pending: dict[int, asyncio.Future[str]] = {}
        self._connecting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._final = False

    # --- requests ----------------------------------------------------------------------------

    async def attach(
        self,
        identity: str,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        detach_keys: bytes = b"\x10\x11",
        wait: bool = True,
        returns: bool = True,
    ) -> str:
        """Connect descriptors (lent) to a process until it ends: "exited", "detached", or "gone".

        "gone": the client's outputs are closed, or the process was released. With `wait` the
        process need not exist yet: attach before the launch and no output is missed; cancel it if
        the launch fails. Detach keys are looked for if there is a stdin and they are not empty.
        `returns`: whether the client will be attached again should this engine be killed; output
        waits for it then.
        """
        async with self.attaching(
            identity,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            detach_keys=detach_keys,
            wait=wait,
            returns=returns,
        ) as ended:
            return await ended

    @asynccontextmanager
    async def attaching(
        self,
        identity: str,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        detach_keys: bytes = b"\x10\x11",
        wait: bool = True,
        returns: bool = True,
    ) -> AsyncIterator["asyncio.Future[str]"]:
        """`attach` as a block: inside, the keeper has been asked; leaving cancels the attachment.

        The future gives what `attach` returns.
        """
        bits = ((stdin, Wire.STDIN), (stdout, Wire.STDOUT), (stderr, Wire.STDERR))
        lent = [(fd, bit) for fd, bit in bits if fd is not None]
        flags = sum(bit for _, bit in lent) | (Wire.WAIT if wait else 0)
        flags |= 0 if returns else Wire.ENGINES
        keys = detach_keys if stdin is not None else b""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body, fds = keys + identity.encode(), [fd for fd, _ in lent]
        begun = self._begin(Wire.ATTACH, flags, len(keys), body, fds)
        request = self._request(
            Wire.ATTACH,
            flags,
            len(keys),
            body,
            fds,
            on_sent=lambda: _resolve(sent),
            begun=begun,
        )
        task = asyncio.get_running_loop().create_task(request)
        try:
            if begun is None:
                task.add_done_callback(lambda _: _resolve(sent))
                await sent
            yield task
        finally:
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Unavailable):
                await task
            if begun is not None and self._pending.pop(begun[1], None) is not None:
                self._withdraw(begun[0], begun[1])  # the task was cancelled before it began

    async def resize(self, identity: str, rows: int, columns: int) -> None:
        """Set the size of a process's terminal; NotFound if the keeper does not know it."""
        if await self._request(Wire.RESIZE, rows, columns, identity.encode()):
            raise NotFound(f"process {identity} is not running")

    async def drained(self, identity: str) -> None:
        """Return when all output of the ended process is in the log and with its clients."""
        await self._request(Wire.DRAINED, 0, 0, identity.encode())

    async def release(self, identity: str) -> None:
        """Have the keeper forget a process, whatever its state."""
        await self._request(Wire.RELEASE, 0, 0, identity.encode())

    async def close(self) -> None:
        """Disconnect; attachments end as "gone"."""
        self._final = True
        if self._sock is not None:
            self._lost(self._sock)

    # --- connection --------------------------------------------------------------------------

    async def _request(
        self,
        kind: int,
        a: int,
        b: int,
        body: bytes,
        fds: list[int] | None = None,
        on_sent: Callable[[], object] = lambda: None,
        begun: "_Asked | None" = None,
    ) -> str:
        """Ask until an answer has come, over as many keepers as it takes.

        `begun` is the same request, if `_begin` has sent it already.
        """
        while True:
            if begun is not None:
                (sock, number, future), begun = begun, None
            else:
                sock = self._sock or await self._connect()
                self._number = number = (self._number + 1) & 0xFFFFFFFF
                packet = Wire.HEAD.pack(kind, number, a, b) + body
                future = asyncio.get_running_loop().create_future()
                if not (self._try_send(sock, packet, fds) or await self._send(sock, packet, fds)):
                    continue
                self._pending[number] = future
            try:
                on_sent()
                return await future
            except _Lost:
                continue
            except asyncio.CancelledError:
                if kind == Wire.ATTACH and future.cancelled():
                    self._withdraw(sock, number)
                raise
            finally:
                self._pending.pop(number, None)

    def _begin(self, kind: int, a: int, b: int, body: bytes, fds: list[int]) -> "_Asked | None":
        """Send a request now, if that needs no waiting; None if it does."""
        sock = self._sock
        if sock is None:
            return None
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        if not self._try_send(sock, Wire.HEAD.pack(kind, number, a, b) + body, fds):
            return None
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        return sock, number, future

    def _withdraw(self, sock: socket.socket, number: int) -> None:
        """Cancel an attachment that was asked for."""
        if self._sock is sock:
            with contextlib.suppress(OSError):
                sock.send(Wire.HEAD.pack(Wire.CANCEL, 0, number, 0), socket.MSG_NOSIGNAL)

    async def _connect(self) -> socket.socket:
        async with self._connecting:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + _CONNECT_WITHIN_S
            while self._sock is None:
                if self._final:
                    raise Unavailable("the connection to the keeper was closed")
                sock = self._dial()
                if sock is not None:
                    self._sock = sock
                    loop.add_reader(sock.fileno(), self._readable, sock)
                    break
                if loop.time() > deadline:
                    raise Unavailable(
                        f"the keeper does not answer; see {self._home.in_run('holder.log')}"
                    )
                await asyncio.sleep(_RETRY_S)
            return self._sock

    def _dial(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            folder = os.open(self._home.run, os.O_PATH | os.O_DIRECTORY)
            try:
                sock.connect(f"/proc/self/fd/{folder}/keeper.sock")
            finally:
                os.close(folder)
            sock.setblocking(False)
        except OSError:
            sock.close()
            return None
        return sock

    def _try_send(self, sock: socket.socket, packet: bytes, fds: list[int] | None) -> bool:
        """Send at once if nobody waits for room; False if that did not work."""
        if self._sending.locked() or self._sock is not sock:
            return False
        try:
            if fds:
                socket.send_fds(sock, [packet], fds, socket.MSG_NOSIGNAL)
            else:
                sock.send(packet, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    async def _send(self, sock: socket.socket, packet: bytes, fds: list[int] | None) -> bool:
        async with self._sending:
            while self._sock is sock:
                try:
                    if fds:
                        socket.send_fds(sock, [packet], fds, socket.MSG_NOSIGNAL)
                    else:
                        sock.send(packet, socket.MSG_NOSIGNAL)
                except (BlockingIOError, InterruptedError):
                    await asyncio.sleep(_RETRY_S)
                except ConnectionError:
                    self._lost(sock)
                else:
                    return True
        return False

    def _readable(self, sock: socket.socket) -> None:
        while self._sock is sock:
            try:
                data = sock.recv(_MAX_PACKET)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if len(data) < Wire.HEAD.size:
                self._lost(sock)
                return
            _, number, _, _ = Wire.HEAD.unpack_from(data)
            future = self._pending.pop(number, None)
            if future is not None and not future.done():
                future.set_result(data[Wire.HEAD.size :].decode())

    def _lost(self, sock: socket.socket) -> None:
        if self._sock is not sock:
            return
        asyncio.get_running_loop().remove_reader(sock.fileno())
        sock.close()
        self._sock = None
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(_Lost())


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class _Lost(Exception):
    """The keeper died before it answered."""
