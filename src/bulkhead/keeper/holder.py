"""The engine's side of the holder (`native/holder.c`, `native/holder.h` for the messages).

    <run>/holder.sock   SOCK_SEQPACKET, 0600, created by whoever starts the holder
    <run>/holder.lock   flock'd while a holder is being started, so that there is one
    <run>/holder.log    what holder and helpers print

The holder outlives the engine. If it dies itself, its workloads go on, and what was asked of it
meanwhile fails at once with Unavailable; the client then starts another and says so (`on_restart`).
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bulkhead import _native
from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.errors import (
    BulkheadError,
    Conflict,
    Denied,
    Internal,
    Invalid,
    NotFound,
    Unavailable,
)
from bulkhead.home import Home
from bulkhead.keeper.launching import MESSAGE, decode_reply, encode_request
from bulkhead.linux import pidfd, unwritable
from bulkhead.linux.fds import OwnedFd

HELLO, LAUNCH, SIGNAL, FORGET, ENTRIES, SUPERVISE, DISMISS, SHUTDOWN, CLOSE_KEPT = range(1, 10)
REPLY, EXIT, ENTRY, ADOPT = range(64, 68)

_SUPERVISE = struct.Struct("=4I")
_EXITED = struct.Struct("=qiIQ")
_ENTRY = struct.Struct("=qiIQQII")
_MAX_PACKET = 128 << 10
_ANSWER_WITHIN_S = 60.0
_INT = struct.Struct("i")


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a process: its wait status as waitpid(2) gives it, CLOCK_REALTIME."""

    id: str
    pid: int
    wait_status: int
    finished_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What the holder remembers of a process it launched."""

    id: str
    pid: int
    running: bool
    wait_status: int
    started_ns: int
    finished_ns: int
    meta: bytes


def program_path(name: str, native: str | None = None) -> str:
    """The native program `name`, in folder `native` or beside the package; NotFound if unbuilt."""
    folder = native or os.path.dirname(os.path.abspath(str(_native.__file__)))
    path = f"{folder}/{name}"
    if not os.access(path, os.X_OK):
        raise NotFound(f"{path} is not there: build it with `make -C native`")
    return path


async def ensure_holder(
    home: Home, native: str | None = None, *, idle_s: int = 10
) -> "HolderClient":
    """Connect to the holder of `home`, starting it if there is none.

    A holder without entries and connections ends after `idle_s`. Unavailable if it does not answer.
    """
    client = HolderClient(home, native, idle_s=idle_s)
    try:
        await client.connect()
    except BaseException:
        await client.close()
        raise
    return client


def holder_pid(home: Home) -> int | None:
    """The pid of the living holder of `home`, None if there is none; for use before any loop."""
    sock = _dial(home)
    if sock is None:
        return None
    with sock:
        sock.settimeout(_ANSWER_WITHIN_S)
        try:
            sock.send(MESSAGE.pack(HELLO, 1, 0, 0))
            answer = sock.recv(_MAX_PACKET)
        except OSError:
            return None
    return int(answer[MESSAGE.size :]) if len(answer) > MESSAGE.size else None


def _dial(home: Home) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(home) as folder:
            sock.connect(f"{folder}/holder.sock")
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short(home: Home) -> Iterator[str]:
    """The run directory by a short name: sun_path holds 108 bytes; unix(7)."""
    fd = os.open(home.run, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _listen(home: Home) -> socket.socket:
    """A listening socket under its final name, which replaces a dead holder's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(home) as folder:
            fresh = f"{folder}/holder.sock.{os.getpid()}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            sock.bind(fresh)
            os.chmod(fresh, 0o600)
            sock.listen(64)
            os.rename(fresh, f"{folder}/holder.sock")
    except BaseException:
        sock.close()
        raise
    return sock


def _spawn(home: Home, native: str | None, idle_s: int) -> int:
    """Start a holder; its pid. The socket accepts connections before this returns."""
    path = program_path("bulkhead-holder", native)
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(_listen(home))
        null = os.open("/dev/null", os.O_RDWR)
        undo.callback(os.close, null)
        log = os.open(home.in_run("holder.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        undo.callback(os.close, log)
        # Sources are moved out of the way first: dup2 onto 0..3 must not hit one of them.
        program = undo.enter_context(unwritable.open_program(path))
        given = (null, log, listener.fileno(), program.fileno())
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in given]
        for fd in high:
            undo.callback(os.close, fd)
        targets = ((high[0], 0), (high[1], 1), (high[1], 2), (high[2], 3))
        return os.posix_spawn(
            f"/proc/self/fd/{high[3]}",
            [path, home.in_run("holder.sock"), str(idle_s)],
            {"PATH": os.environ.get("PATH", os.defpath)},
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in targets],
            setsid=True,
            setsigmask=(),
        )


class HolderClient:
    """A connection to the holder; implements `boundary.seam.Launcher`.

    When the holder dies the client starts another by itself and calls the `on_restart` callbacks;
    `closed` is set from the loss until then. After `close()` nothing works any more.
    """

    def __init__(self, home: Home, native: str | None = None, *, idle_s: int = 10) -> None:
        self.home = home
        self.pid = 0
        self.closed = asyncio.Event()
        self.closed.set()
        self._native = native
        self._idle_s = idle_s
        self._sock: socket.socket | None = None
        self._seq = 0
        self._pending: dict[int, asyncio.Future[tuple[bytes, list[int]]]] = {}
        self._listings: dict[int, list[Entry]] = {}
        self._exit_callbacks: list[Callable[[Exit], None]] = []
        self._restart_callbacks: list[Callable[[], None]] = []
        self._told: dict[tuple[str, int, int], Exit] = {}
        self._connecting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._recovery: asyncio.Task[None] | None = None
        self._children: dict[int, OwnedFd] = {}
        self._final = False

    # --- connecting --------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect, starting a holder if none answers; returns at once when connected already."""
        async with self._connecting:
            for _ in range(5):
                if self._final:
                    raise Unavailable("the connection to the holder was closed")
                if self._sock is not None:
                    return
                if await self._try_connect():
                    return
            raise Unavailable(
                f"the holder does not stay alive; see {self.home.in_run('holder.log')}"
            )

    async def _try_connect(self) -> bool:
        sock = _dial(self.home) or self._start()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._sock = sock
        loop = asyncio.get_running_loop()
        loop.add_reader(sock.fileno(), self._readable, sock)
        try:
            answer, _ = await self._ask(HELLO)
            self.pid = int(answer[MESSAGE.size :])
            entries = await self._list()
        except Unavailable:
            return False
        self.closed.clear()
        for entry in entries:
            if not entry.running:
                self._tell(Exit(entry.id, entry.pid, entry.wait_status, entry.finished_ns))
        return True

    def _start(self) -> socket.socket:
        """Start a holder under the lock, or find the one that another process has just started."""
        os.makedirs(self.home.run, exist_ok=True)
        lock = os.open(
            self.home.in_run("holder.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sock = _dial(self.home)
            if sock is None:
                self._adopt_child(_spawn(self.home, self._native, self._idle_s))
                sock = _dial(self.home)
        finally:
            os.close(lock)
        if sock is None:
            raise Unavailable(f"the holder ended at once; see {self.home.in_run('holder.log')}")
        return sock

    def _adopt_child(self, pid: int) -> None:
        """The holder is this process's child: reap it when it ends, so that no zombie remains."""
        handle = pidfd.open_process(pid)
        self._children[pid] = handle
        asyncio.get_running_loop().add_reader(handle.fileno(), self._reap_child, pid)

    def _reap_child(self, pid: int) -> None:
        with self._children.pop(pid) as handle:
            asyncio.get_running_loop().remove_reader(handle.fileno())
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _lost(self, sock: socket.socket) -> None:
        if self._sock is not sock:
            return
        asyncio.get_running_loop().remove_reader(sock.fileno())
        sock.close()
        self._sock = None
        was_up = not self.closed.is_set()
        self.closed.set()
        self._listings.clear()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(
                    Unavailable("the holder ended before it answered; it is being started again")
                )
        if was_up and not self._final:
            self._recovery = asyncio.get_running_loop().create_task(self._recover(self.pid))

    async def _recover(self, before: int) -> None:
        delay_s = 0.05
        while not self._final:
            try:
                await self.connect()
                break
            except (BulkheadError, OSError):
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 5.0)
        if not self._final and self.pid != before:
            for callback in list(self._restart_callbacks):
                callback()

    async def close(self) -> None:
        """Disconnect; the holder stays as long as it has entries."""
        self._final = True
        loop = asyncio.get_running_loop()
        if self._recovery is not None:
            self._recovery.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._recovery
        if self._sock is not None:
            self._lost(self._sock)
        for pid in list(self._children):
            if pidfd.ended(self._children[pid]):
                self._reap_child(pid)
                continue
            handle = self._children.pop(pid)
            loop.remove_reader(handle.fileno())
            handle.close()

    # --- messages ----------------------------------------------------------------------------

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(64):
            if self._sock is not sock:
                return
            try:
                data, fds, _, _ = socket.recv_fds(sock, _MAX_PACKET, 16, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionResetError:
                continue  # said once, before what the dead holder had sent
            except OSError:
                data, fds = b"", []
            if len(data) < MESSAGE.size:
                self._lost(sock)
                return
            self._take(data, fds)

    def _take(self, data: bytes, fds: list[int]) -> None:
        kind, seq, _, _ = MESSAGE.unpack_from(data)
        body = data[MESSAGE.size :]
        if kind == EXIT:
            pid, status, _, finished = _EXITED.unpack_from(body)
            self._tell(Exit(body[_EXITED.size :].decode(), pid, status, finished))
        elif kind == ENTRY:
            pid, status, running, started, finished, size, _ = _ENTRY.unpack_from(body)
            rest = body[_ENTRY.size :]
            self._listings.setdefault(seq, []).append(
                Entry(
                    rest[:size].decode(), pid, bool(running), status, started, finished, rest[size:]
                )
            )
        elif kind == REPLY:
            future = self._pending.pop(seq, None)
            if future is not None and not future.done():
                future.set_result((data, fds))
                return
        for fd in fds:
            os.close(fd)

    def _tell(self, event: Exit) -> None:
        key = (event.id, event.pid, event.finished_ns)
        if key in self._told:
            return
        self._told[key] = event
        for callback in list(self._exit_callbacks):
            callback(event)

    async def _send(self, parts: Sequence[bytes], fds: Sequence[int]) -> None:
        """Send one packet; Unavailable, with certainty that nothing was sent."""
        async with self._sending:
            while True:
                sock = self._sock
                if sock is None:
                    raise Unavailable("the holder is not running")
                try:
                    if fds:
                        socket.send_fds(sock, parts, fds, socket.MSG_NOSIGNAL)
                    else:
                        sock.sendmsg(parts, (), socket.MSG_NOSIGNAL)
                    return
                except (BlockingIOError, InterruptedError):
                    await self._writable(sock)
                except (BrokenPipeError, ConnectionError) as error:
                    self._lost(sock)
                    raise Unavailable("the holder has ended") from error

    async def _writable(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        loop.add_writer(sock.fileno(), _resolve, future)
        try:
            # The reader notices a holder that died; the wait then ends here by looking again.
            await asyncio.wait({future}, timeout=1.0)
        finally:
            if sock.fileno() >= 0:
                loop.remove_writer(sock.fileno())

    async def _ask(
        self, kind: int, status: int = 0, parts: Sequence[bytes] = (), fds: Sequence[int] = ()
    ) -> tuple[bytes, list[int]]:
        """Send a request and wait for its reply; Unavailable if the holder ends meanwhile."""
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        future: asyncio.Future[tuple[bytes, list[int]]] = asyncio.get_running_loop().create_future()
        try:
            await self._send((MESSAGE.pack(kind, seq, status, 0), *parts), fds)
            if self._sock is None:
                raise Unavailable("the holder ended before it answered")
            self._pending[seq] = future
            return await future
        finally:
            self._pending.pop(seq, None)

    async def _request(
        self, kind: int, status: int = 0, parts: Sequence[bytes] = (), fds: Sequence[int] = ()
    ) -> tuple[int, str]:
        """`_ask` on a connection that is made if need be; (errno or 0, text)."""
        if self._sock is None or self.closed.is_set():
            await self.connect()
        data, _ = await self._ask(kind, status, parts, fds)
        return MESSAGE.unpack_from(data)[2], data[MESSAGE.size :].decode(errors="replace")

    # --- launching ---------------------------------------------------------------------------

    async def launch(self, request: LaunchRequest) -> Launched:
        """Run the program up to its exec.

        LaunchFailed names the step that failed, Conflict that the id is taken, Unavailable that the
        holder died under it (a step that had not come to its exec dies with the holder). If the
        holder had died before it was asked, another is started and asked.
        """
        parts, fds, close = encode_request(request)
        try:
            for attempt in (1, 2):
                if self._sock is None or self.closed.is_set():
                    await self.connect()
                try:
                    data, got = await self._launch_once(parts, fds)
                    break
                except _NotSent as error:
                    if attempt == 2:
                        raise Unavailable("the holder ended twice while it was asked") from error
            else:  # pragma: no cover - the loop breaks or raises
                raise Unavailable("the holder is not running")
        finally:
            for fd in close:
                os.close(fd)
        return decode_reply(request, data, got)

    async def _launch_once(
        self, parts: Sequence[bytes], fds: Sequence[int]
    ) -> tuple[bytes, list[int]]:
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        future: asyncio.Future[tuple[bytes, list[int]]] = asyncio.get_running_loop().create_future()
        try:
            await self._send((MESSAGE.pack(LAUNCH, seq, 0, 0), *parts), fds)
        except Unavailable as error:
            raise _NotSent from error
        if self._sock is None:
            raise Unavailable("the holder ended before it answered")
        self._pending[seq] = future
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                for fd in future.result()[1]:
                    os.close(fd)
            raise
        finally:
            self._pending.pop(seq, None)

    async def signal(self, identity: str, signal: int) -> None:
        """Send `signal`; NotFound when the process is gone, Denied if its label forbids it."""
        error, text = await self._request(SIGNAL, signal, (identity.encode(),))
        if error in (errno.ENOENT, errno.ESRCH):
            raise NotFound(f"no process {identity} is running")
        if error in (errno.EPERM, errno.EACCES):
            raise Denied(
                f"signal {signal} to {identity}: a security module forbids it; an AppArmor profile"
                " of a workload must allow `signal (receive) peer=unconfined`"
            )
        _check(error, f"signal {signal} to {identity}: {text}")

    async def forget(self, identity: str) -> None:
        """Drop what is remembered of an ended process, if anything; Conflict while it runs."""
        error, text = await self._request(FORGET, 0, (identity.encode(),))
        if error == errno.EBUSY:
            raise Conflict(f"process {identity} is still running")
        if error != errno.ENOENT:
            _check(error, f"forget {identity}: {text}")
        for key in [key for key in self._told if key[0] == identity]:
            del self._told[key]

    async def close_kept(self, identity: str, index: int = -1) -> None:
        """Close the holder's copy of a kept descriptor, -1 for all; gone entries are fine."""
        error, text = await self._request(CLOSE_KEPT, index, (identity.encode(),))
        if error != errno.ENOENT:
            _check(error, f"close kept of {identity}: {text}")

    async def entries(self) -> list[Entry]:
        """Every process the holder knows, running or ended and not forgotten."""
        if self._sock is None or self.closed.is_set():
            await self.connect()
        return await self._list()

    async def _list(self) -> list[Entry]:
        seq = (self._seq + 1) & 0xFFFFFFFF
        self._listings[seq] = []
        try:
            await self._ask(ENTRIES)
            return self._listings.get(seq, [])
        finally:
            self._listings.pop(seq, None)

    def on_exit(self, callback: Callable[[Exit], None]) -> None:
        """Call `callback` on the loop for every end of a process, those before now included."""
        self._exit_callbacks.append(callback)
        for event in list(self._told.values()):
            asyncio.get_running_loop().call_soon(callback, event)

    def on_restart(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop once another holder has taken the place of a dead one.

        It knows nothing: supervise the helpers again, look after the workloads by their pids.
        """
        self._restart_callbacks.append(callback)

    # --- helpers and the end -----------------------------------------------------------------

    async def supervise(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int] = ()
    ) -> None:
        """Keep `argv` (an absolute path first) running, with `fds` as its descriptors 3, 4, ….

        Conflict if a helper of that name is supervised already.
        """
        strings = [os.fsencode(a) for a in argv]
        variables = [os.fsencode(f"{key}={value}") for key, value in env.items()]
        raw = name.encode()
        parts = (
            _SUPERVISE.pack(len(raw), len(strings), len(variables), 0),
            raw,
            b"".join(s + b"\0" for s in (*strings, *variables)),
        )
        error, text = await self._request(SUPERVISE, 0, parts, fds)
        if error == errno.EEXIST:
            raise Conflict(f"helper {name} is supervised already")
        _check(error, f"supervise {name}: {text}")

    async def dismiss(self, name: str) -> None:
        """End helper `name` (SIGTERM) and do not start it again; NotFound if there is none."""
        error, text = await self._request(DISMISS, 0, (name.encode(),))
        if error == errno.ENOENT:
            raise NotFound(f"no helper {name} is supervised")
        _check(error, f"dismiss {name}: {text}")

    async def shutdown(self, *, force: bool = False) -> None:
        """End the holder and its helpers; Conflict while workloads run, unless `force`."""
        self._final = True  # or the loss would start another
        if self._sock is None:
            return
        try:
            data, _ = await self._ask(SHUTDOWN, int(force))
        except Unavailable:
            return
        if MESSAGE.unpack_from(data)[2] == errno.EBUSY:
            self._final = False
            raise Conflict("workloads are running")
        for handle in list(self._children.values()):
            while not handle.closed and not pidfd.ended(handle):
                await asyncio.sleep(0.002)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class _NotSent(Exception):
    """The request provably did not reach the holder."""


def _check(error: int, message: str) -> None:
    if error == errno.EINVAL:
        raise Invalid(message)
    if error:
        raise Internal(message, errno=error)
