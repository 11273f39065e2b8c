"""The command server: one per user and run directory, so that no command pays for an interpreter.

It forks *workers* in advance: everything is imported, a connection to the engine is open, and each
waits in accept(2) on the one socket. A client's connection is a command; its worker runs it and ends.

    <run>/command.sock   stream socket, 0600; peers of another user are refused (SO_PEERCRED)
    <run>/command.lock   flock(2)ed by the server
    <run>/command.log    its stderr and its workers' last words

The protocol. Client: u32 magic, protocol, length, argc, envc, umask (little-endian), then `length`
bytes: the client's own path, argv, KEY=VALUE…, each NUL-terminated; with the first byte the
descriptors 0, 1, 2 and the working directory (O_PATH). Later bytes are signal numbers; a closed
connection is a hang-up. Worker: `S` when it takes the command (before that, the client may run it
itself without harm), then `X` and the exit code. A closed connection after `S` is a crash.

A worker refuses a client of another installation, and everything once a file of the program has
changed (inotify(7)): the server then ends and the next client starts a new one. Without work for
IDLE_S it ends too.
"""

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import stat
import sys
import time
from types import FrameType

from bulkhead.cli import warm
from bulkhead.cli.pyclient import MAGIC, PROTOCOL
from bulkhead.client.connection import Connection

IDLE_S = float(os.environ.get("BULKHEAD_COMMAND_SERVER_IDLE_S", "900"))
PARKED = 2
REFILL_DELAY_S = 0.005
"""How long a fork for the next command waits while this one uses the processor."""
_HEADER = 24
_MAX_REQUEST = 8 << 20
_STOP = b"bulkhead:stop-server"


class Refused(Exception):
    """This worker must not run what was asked."""


def _receive(sock: socket.socket) -> tuple[list[bytes], list[bytes], int, list[int]]:
    """(argv, environment lines, umask, descriptors) of a request; Refused if it is not for us."""
    fds: list[int] = []
    data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_LEN(16), socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [
                int.from_bytes(payload[at : at + 4], sys.byteorder)
                for at in range(0, len(payload) & ~3, 4)
            ]
    if len(data) < _HEADER:
        raise Refused("short request")
    magic, protocol, length, argc, envc, umask = (
        int.from_bytes(data[at : at + 4], "little") for at in range(0, _HEADER, 4)
    )
    if magic != MAGIC or protocol != PROTOCOL or length > _MAX_REQUEST or len(fds) != 4:
        raise Refused("another protocol")
    parts = [data[_HEADER:]]
    have = len(parts[0])
    while have < length:
        more = sock.recv(min(length - have, 1 << 20))
        if not more:
            raise Refused("the client left")
        parts.append(more)
        have += len(more)
    words = b"".join(parts).split(b"\0")
    if len(words) != argc + envc + 2:
        raise Refused("wrong counts")
    if not _ours(os.fsdecode(words[0])):
        raise Refused("another installation")
    if b"serve" in words[1 : 1 + argc]:
        raise Refused("the engine in the foreground is to be the client's own process")
    return words[1 : 1 + argc], words[1 + argc : 1 + argc + envc], umask, fds


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PLACES = frozenset(
    (f"{_HERE}/_native", os.path.dirname(os.path.abspath(sys.executable)), f"{sys.prefix}/bin")
)


def _ours(client: str) -> bool:
    """Whether the client at that path belongs to this installation."""
    return os.path.dirname(client) in _PLACES


def _adopt(environment: list[bytes], umask: int, fds: list[int]) -> None:
    """Become the client's stand-in: descriptors, directory, umask, environment."""
    os.fchdir(fds[3])
    os.umask(umask)
    for target in (0, 1, 2):
        os.dup2(fds[target], target)
    for fd in fds:
        os.close(fd)
    wanted = dict(line.partition(b"=")[::2] for line in environment)
    present = os.environb
    for key in [key for key in present if key not in wanted]:
        del present[key]
    for key, value in wanted.items():
        if present.get(key) != value:
            present[key] = value
    if os.isatty(1):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _forward_signals(sock: socket.socket) -> None:
    """Make real signals of the bytes that the client sends: SIGIO tells that there are some."""

    def arrived(number: int, frame: FrameType | None) -> None:
        try:
            data = sock.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            fcntl.fcntl(sock, fcntl.F_SETFL, 0)
            os.kill(os.getpid(), signal.SIGHUP)
        for wanted in data:
            if 0 < wanted < signal.NSIG:
                os.kill(os.getpid(), wanted)

    signal.signal(signal.SIGIO, arrived)
    fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)
    arrived(0, None)  # what came before the flag was set


class Worker:
    """One forked process: waits for one client, runs one command."""

    def __init__(self, listener: socket.socket, changes: int, busy: int, run: str) -> None:
        self._listener = listener
        self._changes = changes
        self._busy = busy
        self._run = run

    def serve(self) -> int:
        """Accept one client and run its command; the process's exit status."""
        parked = self._park()
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return 0
        os.write(self._busy, b"b")
        self._listener.close()
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.geteuid():
            return 0
        if select.select([self._changes], [], [], 0)[0]:
            os.write(self._busy, b"q")
            return 0
        try:
            argv, environment, umask, fds = _receive(sock)
        except (Refused, OSError):
            return 0
        if argv == [_STOP]:
            os.write(self._busy, b"q")
            return 0
        sock.send(b"S")
        _adopt(environment, umask, fds)
        _forward_signals(sock)
        code = self._command(argv, parked)
        with contextlib.suppress(OSError):  # the client may be gone
            sock.send(bytes((ord("X"), code & 0xFF)))
        return 0

    def _command(self, argv: list[bytes], parked: Connection | None) -> int:
        from bulkhead.cli.main import run_argv

        words = [os.fsdecode(word) for word in argv]
        code = run_argv(words[1:], os.environ, parked)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = code or 1
        return code

    def _park(self) -> Connection | None:
        try:
            return Connection.open(f"{self._run}/engine.sock")
        except OSError:
            return None  # not running yet: the command starts it


class Server:
    """Keeps PARKED workers waiting."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._path = f"{run}/command.sock"
        self._waiting = 0
        self._children: set[int] = set()

    def serve(self) -> None:
        """Until idle for IDLE_S, told to stop, or the program's files change."""
        with contextlib.ExitStack() as stack:
            lock = os.open(
                f"{self._run}/command.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another one serves already
            changes = warm.watch(_HERE)
            stack.callback(os.close, changes)
            warm.load()
            listener = self._listen()
            stack.callback(listener.close)
            identity = _identity(self._path)
            stack.callback(self._remove_socket, identity)
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            gc.collect()
            gc.freeze()
            self._loop(listener, changes, read, write, identity)

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # ours by the lock: left by one that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listener.bind(self._path)
        finally:
            os.umask(before)
        listener.listen(128)
        return listener

    def _remove_socket(self, identity: tuple[int, int]) -> None:
        if _identity(self._path) == identity:
            os.unlink(self._path)

    def _loop(
        self, listener: socket.socket, changes: int, read: int, write: int,
        identity: tuple[int, int],
    ) -> None:  # fmt: skip
        worker = Worker(listener, changes, write, self._run)
        poll = select.poll()
        poll.register(read, select.POLLIN)
        poll.register(changes, select.POLLIN)
        last = time.monotonic()
        while True:
            while self._waiting < PARKED:
                self._fork(worker, read)
            events = poll.poll(5000)
            self._reap()
            if any(fd == changes for fd, _ in events):
                break
            said = os.read(read, 4096) if any(fd == read for fd, _ in events) else b""
            if b"q" in said:
                break
            if said:
                last = time.monotonic()
                self._waiting -= said.count(b"b")
                if self._waiting > 0:
                    poll_pause(REFILL_DELAY_S)
            elif time.monotonic() - last > IDLE_S and not self._busy():
                break
            if _identity(self._path) != identity:
                break  # somebody removed or replaced the run directory
        self._stop_waiting(listener)

    def _busy(self) -> bool:
        return len(self._children) > self._waiting

    def _fork(self, worker: Worker, read: int) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                status = worker.serve()
            finally:
                os._exit(status)
        self._children.add(pid)
        self._waiting += 1

    def _reap(self) -> None:
        while self._children:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._children.discard(pid)

    def _stop_waiting(self, listener: socket.socket) -> None:
        """Let parked workers end; busy ones finish by themselves."""
        self._remove_socket(_identity(self._path))
        listener.shutdown(socket.SHUT_RDWR)  # accept(2) returns EINVAL in those who wait


def poll_pause(seconds: float) -> None:
    """Give the processor to the command that has just begun."""
    time.sleep(seconds)


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else (0, 0)


def main() -> None:
    """`python -m bulkhead.cli.server RUN`."""
    os.chdir("/")
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Server(sys.argv[1]).serve()


if __name__ == "__main__":
    main()
