"""From nothing to a serving engine: directories, locks, mount namespace, records, socket.

`prepare` runs before there is an event loop or a thread, since joining a mount namespace needs a
single-threaded process (setns(2)). `serve` does the rest and returns when told to stop.

Locks, held for the engine's life: flock on ROOT/lock and on RUN/lock, so that neither directory is
served twice. A killed engine's locks vanish with it.
"""

import contextlib
import fcntl
import gc
import grp
import logging
import os
import signal
import socket
import stat
import sys

from bulkhead.engine import hosts, rpc
from bulkhead.engine.core import Engine
from bulkhead.engine.doors import Door
from bulkhead.engine.server import Server
from bulkhead.errors import Conflict, Denied, Unavailable
from bulkhead.home import Home
from bulkhead.keeper.holder import holder_pid
from bulkhead.linux import syscall
from bulkhead.state.database import Database

log = logging.getLogger("bulkhead.engine")

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_BACKLOG = 512
GROUP = "bulkhead"
DOCKER = "docker.sock"
_locks: list[int] = []


def prepare(home: Home) -> None:
    """Make the directories, take the locks, enter the private mount namespace."""
    os.umask(0o022)
    for path, mode in ((home.root, 0o711), (home.run, 0o711)):
        try:
            os.makedirs(path, mode=mode, exist_ok=True)
        except OSError as error:
            raise Denied(f"cannot make the directory {path}: {error.strerror}") from error
    for path in (home.in_root("lock"), home.in_run("lock")):
        _locks.append(_lock(path, home))
    for path in (home.in_root("workloads"), home.in_run("workloads")):
        os.makedirs(path, mode=0o711, exist_ok=True)
    _enter_mount_namespace(home)


def _lock(path: str, home: Home) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise Conflict(
            f"another engine (process {owner}) already serves {os.path.dirname(path)}; "
            "stop it or choose other directories with --root and --run"
        ) from None
    except OSError:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def _enter_mount_namespace(home: Home) -> None:
    """Join the holder's mount namespace if it lives, else make one that receives the host's mounts.

    Layers are mounted there; they vanish with the last process of it, so nothing of ours shows on
    the host and nothing remains.
    """
    pid = holder_pid(home)
    if pid:
        try:
            fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log.warning("cannot join the mount namespace of the holder %d: %s", pid, error)
        else:
            try:
                syscall.call("setns", fd, _CLONE_NEWNS)
            finally:
                os.close(fd)
            return
    try:
        syscall.call("unshare", _CLONE_NEWNS)
        syscall.call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
    except OSError as error:
        raise Denied(f"cannot make a mount namespace ({error}); run the engine as root") from error


def activated() -> list[socket.socket]:
    """The listening sockets that systemd passed (sd_listen_fds(3)), each checked to be one."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        os.environ.pop("LISTEN_FDS", None)
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_FDNAMES", None)
    sockets = []
    for fd in range(3, 3 + count):
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise Unavailable(f"descriptor {fd} from the service manager is not a socket")
        sockets.append(socket.socket(fileno=fd))
    return sockets


def bind(path: str) -> socket.socket:
    """A listening socket at `path`, which replaces what a dead engine left there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    temporary = f"{path}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        old = os.umask(0o177)
        try:
            sock.bind(temporary)
        except OSError as error:
            raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from error
        finally:
            os.umask(old)
        if os.geteuid() == 0:
            with contextlib.suppress(KeyError):
                os.chown(temporary, 0, grp.getgrnam(GROUP).gr_gid)
                os.chmod(temporary, 0o660)
        sock.listen(_BACKLOG)
        os.rename(temporary, path)
    except BaseException:
        sock.close()
        raise
    return sock


def notify(text: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(text.encode(), address)


def _tune() -> None:
    """What has been loaded stays, so the collector need not look at it again; and the loop gets
    the interpreter back from the helping threads soon.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    sys.setswitchinterval(0.0005)


async def serve(home: Home, places: hosts.Places = hosts.NOWHERE) -> None:
    """Open the records, repair what an earlier engine left, serve until asked to stop."""
    async with contextlib.AsyncExitStack() as undo:
        database = Database(home.in_root("state.db"))
        undo.callback(database.close)
        engine = Engine(home, database)
        undo.push_async_callback(engine.close)
        await engine.open()
        methods = rpc.methods()
        server = Server(engine, methods)
        door = Door(engine, methods)
        _tune()
        undo.push_async_callback(server.close)
        undo.push_async_callback(door.close)
        _listen(home, places, server, door, undo)
        for number in (signal.SIGTERM, signal.SIGINT):
            engine.loop.add_signal_handler(number, engine.stopping.set)
        notify("READY=1")
        log.info("serving %s (process %d)", home.root, os.getpid())
        await engine.stopping.wait()
        notify("STOPPING=1")


def _listen(
    home: Home, places: hosts.Places, server: Server, door: Door, undo: contextlib.AsyncExitStack
) -> None:
    """Open our own socket and those of Docker's API, or take what the service manager passed."""
    passed = activated()
    others = [sock for sock in passed if _of_docker(sock)]
    ours = [sock for sock in passed if sock not in others]
    path = home.in_run("engine.sock")
    if not ours:
        ours = [bind(path)]
        undo.callback(_unlink, path)
    for sock in ours:
        server.listen(sock)
    for sock in others:
        door.listen(sock)
    wanted = places.addresses or (() if others else (f"unix://{home.run}/{DOCKER}",))
    for address in wanted:
        where = hosts.parse(address)
        if where.path:
            door.listen(bind(where.path))
            undo.callback(_unlink, where.path)
        else:
            door.listen(hosts.bind(where), hosts.context(places))
        log.info("serving the Docker Engine API on %s", address)


def _of_docker(sock: socket.socket) -> bool:
    """Whether a passed socket is one for Docker's API: by its name."""
    name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
    return isinstance(name, str) and os.path.basename(name).startswith("docker")


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
