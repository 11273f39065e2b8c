"""The planner: a warm interpreter that runs the commands of `native/runtime.c`.

One per user, root directory of the runtime, and mount namespace; started by the first command
that finds none, ends when idle, when its files change, or when its directory goes. It forks
*workers* in advance, and a client's connection is one command. A worker reads the configuration,
plans, makes the control group and the records; what it launches is cloned, reaped and waited for by
the client (`Client`), so that the container is the caller's as if no planner were there.

    <root>/.planner/     0700, of this user
        NUMBER           seqpacket socket; NUMBER is the inode of the mount namespace
        NUMBER.lock      flock(2)ed by the planner
        log              its standard error

A client must be as we are: same user, capabilities, namespaces, root, security label
(`_is_like_us`); any other runs its command itself.

The protocol, in the machine's byte order. Client: u32 magic, protocol, argc, envc, umask, then its
own path, argv and KEY=VALUE…, NUL-terminated, with descriptors 0, 1, 2 and the working directory.
Worker, then: orders (`_ORDER`: kind, mapped, subreaper, cgroup, value, 0, flags):

    REFUSED   run it yourself; so does a connection that closes before any other order
    LAUNCH    clone a child; with the descriptors of struct birth (native/child.h) and its program's
    REAP      wait for the child `value`
    FOLLOW    the last one: wait for the child `value`, passing on signals, then run the command
              behind the order (argv, NUL-terminated), if any
    EXIT      the last one: the exit code is `value`

LAUNCH and REAP are answered (`_ANSWER`: the pid, the wait status, -errno, or 0 with a text).
"""

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Sequence

from bulkhead.boundary.seam import LaunchRequest
from bulkhead.errors import Internal
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.linux import inotify, pidfd, prctl
from bulkhead.linux.fds import OwnedFd
from bulkhead.runtime import parent
from bulkhead.runtime.main import main as run_command
from bulkhead.runtime.main import preload

MAGIC, PROTOCOL = 0x31524842, 1
"""BHR1"""
IDLE_S = float(os.environ.get("BULKHEAD_RUNTIME_PLANNER_IDLE_S", "300"))
WATCH = os.environ.get("BULKHEAD_RUNTIME_PLANNER_WATCH") != "0"
PARKED = 2
REFILL_DELAY_MS = 30.0
MAX_COMMANDS = 512
_HEADER = struct.Struct("=5I")
_ORDER = struct.Struct("=4IiIQ")
_ANSWER = struct.Struct("=i124s")
_MAX_MESSAGE = 64 << 10
_REFUSED, _LAUNCH, _REAP, _FOLLOW, _EXIT = range(1, 6)
_NAMESPACES = ("mnt", "net", "user", "pid", "pid_for_children", "ipc", "uts", "cgroup", "time",
               "time_for_children")  # fmt: skip
_ALIKE = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
          "Seccomp")  # fmt: skip
_OURS = (b"BULKHEAD_", b"XDG_", b"HOME=")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SO_PEERPIDFD = 77


class Refused(Exception):
    """The client is to run its command itself; nothing has been done yet."""


class Handed(Exception):
    """The rest is the client's: wait for `pid`, then run the command `after`."""

    def __init__(self, pid: int, after: Sequence[str]) -> None:
        super().__init__(pid, after)
        self.pid, self.after = pid, after


class Client:
    """A connected client as the parent of what is launched; see parent.Parent."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self._sock = sock
        self._subreaper = False

    def order(self, kind: int, value: int = 0, text: bytes = b"") -> None:
        """Send an order without descriptors; nothing if the client is gone."""
        with contextlib.suppress(OSError):
            self._sock.send(_ORDER.pack(kind, 0, 0, 0, value, 0, 0) + text, socket.MSG_NOSIGNAL)

    def clone(self, request: LaunchRequest, program: int, shared: int, channel: int) -> None:
        """Have the client clone the child."""
        born = [request.cgroup_fd] if request.cgroup_fd >= 0 else []
        mapped = bool(request.uid_map or request.gid_map)
        numbers = (_LAUNCH, mapped, self._subreaper, len(born), 0, 0, request.clone_flags)
        fds = [program, shared, channel, *born, *request.fds]
        try:
            socket.send_fds(self._sock, [_ORDER.pack(*numbers)], fds, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Internal(f"the caller has ended: {error.strerror}") from None
        value, text = self._answer()
        if text or value <= 0:
            raise Internal(text or f"clone: {os.strerror(-value)}")

    def reap(self, pid: int) -> int:
        """Have the client wait for its child."""
        self.order(_REAP, pid)
        value, _ = self._answer()
        if value < 0:
            raise Internal(f"waitpid {pid}: {os.strerror(-value)}")
        return value

    def _answer(self) -> tuple[int, str]:
        data = self._sock.recv(_ANSWER.size)
        if len(data) != _ANSWER.size:
            raise Internal("the caller has ended")
        value, text = _ANSWER.unpack(data)
        return value, text.split(b"\0")[0].decode(errors="replace")

    def adopt_orphans(self) -> None:
        """The client does, before its next launch."""
        self._subreaper = True

    def follow(self, pid: int, after: Sequence[str]) -> int:
        """Leave that to the client."""
        raise Handed(pid, after)

    def require_caller(self, why: str) -> None:
        """We are not."""
        raise Refused(why)


def _is_like_us(sock: socket.socket) -> int:
    """The client's pid, if what it asks for is what it could do itself; Refused."""
    size = struct.calcsize("3i")
    pid: int
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid != os.geteuid() or pid <= 0:
        raise Refused("another user")
    with _process(sock, pid) as process:
        if _nature(str(pid)) != _nature("self"):
            raise Refused("other namespaces, capabilities or label")
        if pidfd.ended(process):  # what was read may be of another process with its number
            raise Refused("the caller has ended")
    return pid


def _process(sock: socket.socket, pid: int) -> OwnedFd:
    try:
        return OwnedFd(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))  # Linux 6.5
    except OSError:
        try:
            return pidfd.open_process(pid)
        except ProcessLookupError:
            raise Refused("the caller has ended") from None


def _nature(process: str) -> list[object]:
    """What decides over what a process may do and sees."""
    place = f"/proc/{process}"
    try:
        with open(f"{place}/status", "rb") as file:
            lines = dict(line.partition(b":")[::2] for line in file)
        root = os.stat(f"{place}/root")
        found: list[object] = [lines.get(name.encode()) for name in _ALIKE]
        found += [os.readlink(f"{place}/ns/{name}") for name in _NAMESPACES]
    except OSError as error:
        raise Refused(f"{place}: {error.strerror}") from None
    label = b""
    with contextlib.suppress(OSError), open(f"{place}/attr/current", "rb") as file:
        label = file.read()
    return [*found, root.st_dev, root.st_ino, label]


def _receive(sock: socket.socket, fds: list[int]) -> tuple[list[str], list[bytes], int]:
    """(argv, environment, umask) of a request, its descriptors into `fds`; Refused."""
    data, got, flags, _ = socket.recv_fds(sock, _MAX_MESSAGE, 4, socket.MSG_CMSG_CLOEXEC)
    fds += got
    if len(data) < _HEADER.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != 4:
        raise Refused("no request")
    magic, protocol, argc, envc, umask = _HEADER.unpack_from(data)
    words = data[_HEADER.size :].split(b"\0")
    if (magic, protocol) != (MAGIC, PROTOCOL) or len(words) != argc + envc + 2:
        raise Refused("another protocol")
    if not _is_ours(os.fsdecode(words[0])):
        raise Refused("another installation")
    argv = [os.fsdecode(word) for word in words[1 : 1 + argc]]
    return argv, words[1 + argc : 1 + argc + envc], umask


def _is_ours(client: str) -> bool:
    places = (f"{_PACKAGE}/_native", os.path.dirname(sys.executable), f"{sys.prefix}/bin")
    return os.path.dirname(client) in places


def _adopt(environment: list[bytes], umask: int, fds: list[int]) -> None:
    """Take the client's streams, directory, umask and what of its environment is for us."""
    os.fchdir(fds[3])
    os.umask(umask)
    for target in (0, 1, 2):
        os.dup2(fds[target], target)
    wanted = dict(line.partition(b"=")[::2] for line in environment)
    for key in [key for key in os.environb if (key + b"=").startswith(_OURS)]:
        if key not in wanted:
            del os.environb[key]
    os.environb.update(wanted)


class Worker:
    """One forked process: waits for clients and runs their commands, one at a time."""

    def __init__(self, listener: socket.socket, changes: int, events: int) -> None:
        self._listener, self._changes, self._events = listener, changes, events
        self._server = os.getpid()

    def serve(self) -> None:
        """Until there is a reason to be replaced."""
        prctl.prctl(prctl.SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._server:
            return
        gc.disable()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        moved = select.poll()
        moved.register(mounts, select.POLLPRI)
        moved.poll(0)
        for _ in range(MAX_COMMANDS):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if moved.poll(0):
                cgroups.detect.cache_clear()
            with sock:
                self._tell(b"b")
                usable = self._one(sock)
            for target in (0, 1, 2):
                os.dup2(null, target)
            os.chdir("/")
            cgroups.trim()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not usable or os.getppid() != self._server:
                return
            self._tell(b"p")

    def _tell(self, kind: bytes) -> None:
        os.write(self._events, kind + os.getpid().to_bytes(4, sys.byteorder))

    def _one(self, sock: socket.socket) -> bool:
        """Serve one client; whether this process may serve another."""
        fds: list[int] = []
        client = Client(sock, 0)
        try:
            if select.select([self._changes], [], [], 0)[0]:
                raise Refused("the program's files have changed")
            client.pid = _is_like_us(sock)
            argv, environment, umask = _receive(sock, fds)
            _adopt(environment, umask, fds)
        except Refused:
            client.order(_REFUSED)
            return True
        finally:
            for fd in fds:
                os.close(fd)
        parent.use(client)
        try:
            return self._command(client, argv[1:])
        finally:
            parent.use(None)

    def _command(self, client: Client, words: list[str]) -> bool:
        try:
            code = run_command(words)
            sys.stdout.flush()
            sys.stderr.flush()
        except Refused:
            client.order(_REFUSED)
        except Handed as handed:
            after = b"".join(os.fsencode(word) + b"\0" for word in handed.after)
            client.order(_FOLLOW, handed.pid, after and b"bulkhead-runtime\0" + after)
        except OSError:  # the caller's standard output
            client.order(_EXIT, 1)
            return False
        except BaseException:
            sys.excepthook(*sys.exc_info())
            client.order(_EXIT, 1)
            return False
        else:
            client.order(_EXIT, code & 0xFF)
        return True


class Planner:
    """Keeps PARKED workers waiting."""

    def __init__(self, folder: str) -> None:
        self._path = f"{folder}/{os.stat('/proc/self/ns/mnt').st_ino}"
        self._folder = folder
        self._parked: dict[int, bool] = {}

    def serve(self) -> None:
        """Until idle for IDLE_S, the program's files change, or the socket is removed."""
        with contextlib.ExitStack() as stack:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = stack.enter_context(OwnedFd(os.open(f"{self._path}.lock", flags, 0o600)))
            try:
                fcntl.flock(int(lock), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another one serves already
            changes = stack.enter_context(OwnedFd(_watch()))
            preload()
            listener = stack.enter_context(self._listen())
            identity = _identity(self._path)
            stack.callback(self._remove, identity)
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, read)
            stack.callback(os.close, write)
            gc.collect()
            gc.freeze()
            worker = Worker(listener, int(changes), write)
            self._loop(worker, int(changes), read, identity)
            listener.shutdown(socket.SHUT_RDWR)  # accept(2) fails in those who wait

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # ours by the lock: left by one that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with OwnedFd(folder):  # whatever the length of its path; unix(7)
            listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(self._path)}")
        listener.listen(128)
        return listener

    def _remove(self, identity: tuple[int, int]) -> None:
        if _identity(self._path) == identity:
            os.unlink(self._path)

    def _loop(self, worker: Worker, changes: int, read: int, identity: tuple[int, int]) -> None:
        poll = select.poll()
        poll.register(read, select.POLLIN)
        poll.register(changes, select.POLLIN)
        gone = inotify.create()
        with OwnedFd(gone):
            inotify.watch(gone, self._folder, inotify.DELETE | inotify.MOVED_FROM)
            poll.register(gone, select.POLLIN)
            last, timeout = time.monotonic(), 0.0
            while True:
                ready = {fd for fd, _ in poll.poll(timeout)}
                self._reap()
                said = os.read(read, 4095) if read in ready else b""
                self._note(said)
                waiting = sum(self._parked.values())
                if waiting == 0 or (waiting < PARKED and not said):
                    self._fork(worker, read)
                    timeout = 0.0
                else:
                    timeout = REFILL_DELAY_MS if waiting < PARKED else 5000.0
                if said or len(self._parked) > waiting:
                    last = time.monotonic()
                if changes in ready or time.monotonic() - last > IDLE_S:
                    break
                if _identity(self._path) != identity:
                    break

    def _note(self, said: bytes) -> None:
        for at in range(0, len(said), 5):
            kind, pid = said[at : at + 1], int.from_bytes(said[at + 1 : at + 5], sys.byteorder)
            if pid in self._parked:
                self._parked[pid] = kind == b"p"

    def _fork(self, worker: Worker, read: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                worker.serve()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        self._parked[pid] = True

    def _reap(self) -> None:
        while self._parked:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._parked.pop(pid, None)


def _watch() -> int:
    """An inotify descriptor, readable once a file of the program has changed."""
    fd = inotify.create()
    for directory, names, _ in os.walk(_PACKAGE) if WATCH else ():
        names[:] = [name for name in names if name != "__pycache__"]
        inotify.watch(fd, directory, inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.DELETE)
    return fd


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else (0, 0)


def _settle() -> None:
    """Let go of what came from who started us, except control groups: their limits are ours too."""
    os.chdir("/")
    os.closerange(3, 1 << 16)
    with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        if int(file.read()) < 0:
            file.write("0")


def main(folder: str) -> None:
    """Serve in `folder`, made for it."""
    _settle()
    Planner(folder).serve()
