"""Starting the engine on demand.

<run>/engine.start   flock(2)ed by the client that starts the engine, so that many clients that
                     come at once start one; empty, stays.
<run>/engine.log     the engine's stderr, appended; its first lines are shown when it fails.
"""

import fcntl
import os
import sys
import time

from bulkhead import home as place
from bulkhead.client.connection import Connection
from bulkhead.errors import Unavailable
from bulkhead.home import Home

START_TIMEOUT_S = 60.0


def connect(home: Home, *, start: bool = True) -> Connection:
    """A connection to `home`'s engine, started first if nobody answers and `start` is true.

    Unavailable says why it does not answer, or the first line it printed when it ended at once.
    """
    path = home.in_run("engine.sock")
    try:
        return Connection.open(path)
    except (FileNotFoundError, ConnectionRefusedError):
        if not start:
            raise Unavailable(
                f"Cannot connect to the bulkhead engine at {path}: it does not run; "
                "start it with 'bulkhead serve'"
            ) from None
    except PermissionError:
        raise Unavailable(
            f"Cannot connect to the bulkhead engine at {path}: permission denied; "
            "run as root or join the group that owns the socket"
        ) from None
    return _start(home, path)


def _start(home: Home, path: str) -> Connection:
    os.makedirs(home.run, mode=0o711, exist_ok=True)
    lock = os.open(home.in_run("engine.start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Connection.open(path)  # another client was first
        except (FileNotFoundError, ConnectionRefusedError):
            return _spawn(home, path)
    finally:
        os.close(lock)


def engine_environment() -> dict[str, str]:
    """The environment a background process of ours gets: this one's, minus what leads elsewhere."""
    source = os.path.dirname(os.path.dirname(os.path.abspath(place.__file__)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BULKHEAD_CLIENT")}
    paths = [p for p in environment.get("PYTHONPATH", "").split(":") if p and p != source]
    environment["PYTHONPATH"] = ":".join([source, *paths])
    return environment


def _spawn(home: Home, path: str) -> Connection:
    log_path = home.in_run("engine.log")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    log = os.open(log_path, flags, 0o600)
    try:
        begin = os.fstat(log).st_size
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                sys.executable,
                [
                    sys.executable, "-m", "bulkhead.engine",
                    "--root", home.root, "--run-root", home.run,
                ],
                engine_environment(),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )  # fmt: skip
        finally:
            os.close(null)
    finally:
        os.close(log)
    return _await(path, pid, log_path, begin)


def _await(path: str, pid: int, log_path: str, begin: int) -> Connection:
    deadline = time.monotonic() + START_TIMEOUT_S
    ended = False
    while True:
        try:
            return Connection.open(path)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        if ended:
            raise Unavailable(f"the engine did not start: {_complaint(log_path, begin)}")
        if time.monotonic() > deadline:
            raise Unavailable(
                f"the engine (pid {pid}) did not answer at {path} within {START_TIMEOUT_S:g} s; "
                f"see {log_path}"
            )
        try:
            # Ended or handed over to a detached process: one more look at the socket, then give up.
            ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            ended = not _runs(pid)  # a parent that ignores SIGCHLD reaps by itself
        if not ended:
            time.sleep(0.002)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _complaint(log_path: str, begin: int) -> str:
    """The last telling line that the engine wrote since `begin`."""
    with open(log_path, "rb") as log:
        log.seek(begin)
        text = log.read(65536).decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return f"it ended without a word; see {log_path}"
    telling = [line for line in lines if line.startswith("bulkhead")]
    return (telling or lines[-1:])[0].removeprefix("bulkhead: ")
