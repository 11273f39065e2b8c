"""The command server: one per user and run directory, so that no command pays for an interpreter.

It forks *workers* in advance: everything is imported and rehearsed, a connection to the engine is
open, and each waits in accept(2) on the one socket. A client's connection is a command. A worker
that ends a short command cleanly waits for the next; after a failure, a long command or
MAX_COMMANDS it exits and another is forked.

    <run>/command.sock   stream socket, 0600; peers of another user are refused (SO_PEERCRED)
    <run>/command.lock   flock(2)ed by the server
    <run>/command.log    its stderr and its workers' last words

The protocol. Client: u32 magic, protocol, length, argc, envc, umask (little-endian), then `length`
bytes: the client's own path, argv, KEY=VALUE…, each NUL-terminated; with the first byte the
descriptors 0, 1, 2 and the working directory (O_PATH). Later bytes are signal numbers; a closed
connection ends the command. Worker: `S` when it takes the command (before that, the client may run
it itself without harm), then `X` and the exit code. A closed connection after `S` is a crash.

A worker refuses a client of another installation, and everything once a file of the program has
changed (inotify(7); not with BULKHEAD_COMMAND_SERVER_WATCH=0): the server then ends and the next
client starts a new one. Without work for IDLE_S it ends too. If it is killed, its workers end:
those that wait at once (PR_SET_PDEATHSIG), the others after their command.
"""

import contextlib
import fcntl
import gc
import mmap
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
from bulkhead.linux import prctl

IDLE_S = float(os.environ.get("BULKHEAD_COMMAND_SERVER_IDLE_S", "900"))
WATCH = os.environ.get("BULKHEAD_COMMAND_SERVER_WATCH") != "0"
PARKED = 2
QUIET_S = 3.0
"""Without a command for so long one worker is enough: each has some 3 MB of its own."""
REFILL_DELAY_MS = 30.0
"""How long a fork for the next command waits while this one uses the processor."""
MAX_COMMANDS = 256
LONG_S = 2.0
"""A worker whose command took longer is not used again: it has been replaced by then."""
_ORPHANED = signal.SIGRTMAX
"""What the kernel sends a worker when the server dies: fatal while it waits, else ignored."""
_HEADER = 24
_MAX_REQUEST = 8 << 20
_STOP = b"bulkhead:stop-server"


class Refused(Exception):
    """This worker must not run what was asked."""


def _receive(sock: socket.socket, fds: list[int]) -> tuple[list[bytes], list[bytes], int]:
    """(argv, environment lines, umask) of a request, its descriptors into `fds`.

    Refused if it is not for us.
    """
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
    return words[1 : 1 + argc], words[1 + argc : 1 + argc + envc], umask


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
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]


class HungUp(KeyboardInterrupt):
    """The client is gone: the command ends here, the workload does not hear of it."""


class _Signals:
    """Makes real signals of the bytes that the client sends: SIGIO tells that there are some."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    def attach(self, sock: socket.socket) -> None:
        """Begin with a client's connection, with what it has sent already."""
        self._sock = sock
        signal.signal(signal.SIGIO, self._arrived)
        fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sock, fcntl.F_SETFL, os.O_RDWR | os.O_ASYNC)
        self._arrived(0, None)

    def detach(self) -> None:
        """What comes from now on is for nobody."""
        self._sock = None

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._sock is None:
            return
        try:
            data = self._sock.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._sock = None
            raise HungUp
        for wanted in data:
            if 0 < wanted < signal.NSIG:
                os.kill(os.getpid(), wanted)


class Worker:
    """One forked process: waits for clients and runs their commands, one at a time."""

    def __init__(
        self, listener: socket.socket, changes: int, events: int, run: str, parked: mmap.mmap
    ) -> None:
        self._listener = listener
        self._changes = changes
        self._events = events
        self._run = run
        self._counter = parked
        self._signals = _Signals()
        self._connections: list[Connection] = []
        self._pid = 0
        self._server = os.getpid()

    def serve(self) -> int:
        """Until there is a reason to be replaced; the process's exit status."""
        self._pid = os.getpid()
        prctl.prctl(prctl.SET_PDEATHSIG, _ORPHANED)
        gc.disable()
        warm.rehearse()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for _ in range(MAX_COMMANDS):
            self._park()
            signal.signal(_ORPHANED, signal.SIG_DFL)
            if os.getppid() != self._server:
                return 0
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return 0
            signal.signal(_ORPHANED, signal.SIG_IGN)
            with sock:
                self._tell(b"b")
                if not self._one(sock):
                    return 0
            for target in (0, 1, 2):
                os.dup2(null, target)
            os.chdir("/")
            if self._counter[0] > PARKED:
                return 0  # others wait already
            self._tell(b"p")
        return 0

    def _tell(self, kind: bytes) -> None:
        os.write(self._events, kind + self._pid.to_bytes(4, "little"))

    def _park(self) -> None:
        if self._connections and not self._connections[0].alive():
            self._connections.pop().close()
        if not self._connections:
            with contextlib.suppress(OSError):  # not running yet: the command starts it
                self._connections.append(Connection.open(f"{self._run}/engine.sock"))

    def _one(self, sock: socket.socket) -> bool:
        """Serve one client; whether this process may serve another."""
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.geteuid():
            return True
        if select.select([self._changes], [], [], 0)[0]:
            self._tell(b"q")
            return False
        fds: list[int] = []
        try:
            argv, environment, umask = _receive(sock, fds)
        except (Refused, OSError):
            for fd in fds:
                os.close(fd)
            return True
        if argv == [_STOP]:
            self._tell(b"q")
            return False
        sock.send(b"S")
        _adopt(environment, umask, fds)
        begun = time.monotonic()
        self._signals.attach(sock)
        code, clean = self._command(argv)
        self._signals.detach()
        with contextlib.suppress(OSError):  # the client may be gone
            sock.send(bytes((ord("X"), code & 0xFF)))
        return clean and time.monotonic() - begun < LONG_S

    def _command(self, argv: list[bytes]) -> tuple[int, bool]:
        from bulkhead.cli.main import run_argv

        words = [os.fsdecode(word) for word in argv]
        try:
            code = run_argv(words[1:], os.environ, self._connections)
        except KeyboardInterrupt:
            return 130, False
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return code or 1, False
        return code, True


class Server:
    """Keeps PARKED workers waiting, one when it is quiet."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._path = f"{run}/command.sock"
        self._parked: dict[int, bool] = {}
        """Workers by pid, and whether each waits."""
        self._counter = mmap.mmap(-1, mmap.PAGESIZE)

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
            changes = warm.watch(_HERE if WATCH else "")
            stack.callback(os.close, changes)
            warm.load()
            warm.rehearse()
            listener = self._listen()
            stack.callback(listener.close)
            identity = _identity(self._path)
            stack.callback(self._remove_socket, identity)
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            gc.collect()
            gc.freeze()
            self._loop(Worker(listener, changes, write, self._run, self._counter), listener,
                       changes, read, identity)  # fmt: skip

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
        self, worker: Worker, listener: socket.socket, changes: int, read: int,
        identity: tuple[int, int],
    ) -> None:  # fmt: skip
        poll = select.poll()
        poll.register(read, select.POLLIN)
        poll.register(changes, select.POLLIN)
        last, timeout = time.monotonic(), 0.0
        while True:
            ready = {fd for fd, _ in poll.poll(timeout)}
            self._reap()
            said = os.read(read, 4095) if read in ready else b""
            if changes in ready or not self._note(said):
                break
            waiting = self._waiting()
            wanted = PARKED if time.monotonic() - last < QUIET_S else 1
            left_alone = listener.fileno() in ready and not waiting
            if not self._parked or left_alone or (waiting < wanted and not said):
                self._fork(worker, read)
                waiting += 1
                timeout = 0.0
            elif waiting < wanted:
                # A worker that was taken is often back soon: not worth a fork before that.
                timeout = REFILL_DELAY_MS
            else:
                timeout = 1e3 * (QUIET_S if waiting > 1 else 5.0)
                if waiting > wanted and not said:
                    self._retire()
                    timeout = REFILL_DELAY_MS
            if waiting:
                with contextlib.suppress(KeyError):
                    poll.unregister(listener)
            else:
                poll.register(listener, select.POLLIN)  # a client that no worker takes
            if said or len(self._parked) > waiting:
                last = time.monotonic()
            elif time.monotonic() - last > IDLE_S:
                break
            if _identity(self._path) != identity:
                break  # somebody removed or replaced the run directory
        self._remove_socket(identity)
        listener.shutdown(socket.SHUT_RDWR)  # accept(2) fails in those who wait; others finish

    def _note(self, said: bytes) -> bool:
        """Take in workers' messages; False for one that asks to end."""
        for at in range(0, len(said), 5):
            kind, pid = said[at : at + 1], int.from_bytes(said[at + 1 : at + 5], "little")
            if kind == b"q":
                return False
            if pid in self._parked:
                self._parked[pid] = kind == b"p"
        return True

    def _waiting(self) -> int:
        count = sum(self._parked.values())
        self._counter[0] = min(count, 255)
        return count

    def _fork(self, worker: Worker, read: int) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                status = worker.serve()
            except Exception:
                import traceback

                log = os.open(f"{self._run}/command.log", os.O_WRONLY | os.O_APPEND)
                os.write(log, traceback.format_exc().encode())
            finally:
                os._exit(status)
        self._parked[pid] = True
        self._waiting()

    def _retire(self) -> None:
        """End a worker that waits; one that has just been taken ignores this."""
        pid = next(pid for pid, waits in reversed(self._parked.items()) if waits)
        os.kill(pid, _ORPHANED)

    def _reap(self) -> None:
        while self._parked:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._parked.pop(pid, None)


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
