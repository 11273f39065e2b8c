"""The client half of the command server in Python, for hosts without the native one.

Only `posix`-level imports here: this runs before anything else of the program is loaded, and in the
best case nothing else is. The protocol is drawn in `cli/server.py`; `native/client.c` is its twin.
"""

import os
import sys

TYPE_CHECKING = False  # typing would cost more than all the rest here
if TYPE_CHECKING:
    from typing import Any

_FORWARDED = ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM", "CONT", "WINCH")
MAGIC = 0x31434842  # "BHC1", little-endian
PROTOCOL = 1
LOG_LIMIT = 256 << 10
"""Bytes of command.log above which the next server begins it anew."""
_ABOUT = "bulkhead.cli.server"


def _package() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_directory(argv: list[str]) -> str:
    """The runtime directory that this command line means; `home.default` in few imports."""
    run = ""
    at = 1
    while at < len(argv) and argv[at].startswith("-"):
        name, equals, value = argv[at].partition("=")
        if not equals and name in ("--root", "--run-root", "--config", "-H", "--host"):
            at += 1
            value = argv[at] if at < len(argv) else ""
        if name == "--run-root":
            run = value
        elif name in ("-H", "--host") and value.startswith("unix://"):
            run = run or value.removeprefix("unix://").removesuffix("/engine.sock")
        at += 1
    run = run or os.environ.get("BULKHEAD_RUN", "")
    if not run:
        uid = os.geteuid()
        if uid == 0:
            return "/run/bulkhead"
        run = (os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") + "/bulkhead"
    return os.path.abspath(run)


def hand_over(argv: list[str]) -> "int | None":
    """Have the native client, or a worker of the command server, run `argv`.

    The exit code; None when this process must run the command itself. Does not return if the native
    client could be executed.
    """
    environ = os.environ
    if environ.get("BULKHEAD_COMMAND_SERVER") == "0":
        return None
    if "BULKHEAD_CLIENT" not in environ:
        client = f"{_package()}/_native/bulkhead-client"
        try:  # noqa: SIM105 - contextlib would cost 2 ms of import
            os.execve(
                client,
                argv,
                {**environ, "BULKHEAD_PYTHON": sys.executable, "BULKHEAD_CLIENT": "python"},
            )
        except OSError:
            pass  # not built: this twin does the same, slower
    code = _ask_server(argv)
    if code is None:
        start_server(argv)
    return code


def _connect(path: str) -> "object | None":
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return None
    credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    if int.from_bytes(credentials[4:8], sys.byteorder) != os.geteuid():
        sock.close()
        return None
    return sock


def request(argv: list[str], environ: "dict[bytes, bytes]", umask: int) -> bytes:
    """The first message: header, then NUL-terminated identity, arguments and environment."""
    parts = [
        f"{_package()}/_native/bulkhead-client".encode(),
        *(os.fsencode(word) for word in argv),
    ]
    variables = [key + b"=" + value for key, value in environ.items()]
    body = b"".join(part + b"\0" for part in (*parts, *variables))
    numbers = (MAGIC, PROTOCOL, len(body), len(argv), len(variables), umask)
    return b"".join(number.to_bytes(4, "little") for number in numbers) + body


def _ask_server(argv: list[str]) -> int | None:
    import _socket

    sock = _connect(run_directory(argv) + "/command.sock")
    if sock is None:
        return None
    umask = os.umask(0o77)
    os.umask(umask)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2, here))
    data = request(argv, os.environb._data, umask)  # type: ignore[attr-defined]
    signal = __import__("_signal")  # the wrapper module imports enum
    numbers = [getattr(signal, f"SIG{name}") for name in _FORWARDED]
    last: list[int] = []

    def forward(number: int, frame: object) -> None:
        last.append(number)
        try:  # noqa: SIM105 - contextlib would cost 2 ms of import
            sock.send(bytes((number,)))  # type: ignore[attr-defined]
        except OSError:
            pass  # it ended in this moment; the end is read below

    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # not in the middle of the request
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup(1)
            signal.signal(number, forward)
    code = None
    try:
        sent = sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])  # type: ignore[attr-defined]
        if sent < len(data):
            sock.sendall(data[sent:])  # type: ignore[attr-defined]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        code = _follow(sock, signal, last)
    except OSError:
        code = None  # it ends: the command is run here
    finally:
        os.close(here)
        if code is None:
            _default_signals(signal)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return code


def _follow(sock: "object", signal: "Any", last: list[int]) -> "int | None":
    """Wait for the exit code; None if the worker refused the command."""
    taken = False
    while True:
        try:
            answer = sock.recv(2)  # type: ignore[attr-defined]
        except OSError:
            answer = b""
        if answer[:1] == b"S":
            taken = True
            answer = answer[1:]
            if not answer:
                continue
        if answer[:1] == b"X":
            rest = answer[1:] or sock.recv(1)  # type: ignore[attr-defined]
            if rest:
                return int(rest[0])
        if not taken:
            return None
        fatal = [number for number in last if number not in (signal.SIGCONT, signal.SIGWINCH)]
        if fatal:
            _default_signals(signal)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), fatal[-1])
        sys.stderr.write(
            "bulkhead: the process that ran this command ended unexpectedly; "
            "see command.log in the run directory\n"
        )
        return 125


def _default_signals(signal: "Any") -> None:
    for name in _FORWARDED:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_server(argv: list[str]) -> None:
    """Start the command server for the next command, unless told not to; does not wait for it."""
    if os.environ.get("BULKHEAD_COMMAND_SERVER") == "0":
        return
    run = run_directory(argv)
    try:
        os.makedirs(run, mode=0o711, exist_ok=True)
        log = os.open(f"{run}/command.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if os.fstat(log).st_size > LOG_LIMIT:
            os.ftruncate(log, 0)
    except OSError:
        return  # the command itself will say what is wrong with the directory
    environ = dict(os.environ)
    source = os.path.dirname(_package())
    paths = [p for p in environ.get("PYTHONPATH", "").split(":") if p and p != source]
    environ["PYTHONPATH"] = ":".join([source, *paths])
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", _ABOUT, run],
            environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(null)
        os.close(log)


def stop_server(run: str) -> None:
    """Ask the command server of `run`, if there is one, to end."""
    import _socket

    sock = _connect(f"{run}/command.sock")
    if sock is None:
        return
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2, here))
    try:
        sock.sendmsg(  # type: ignore[attr-defined]
            [request(["bulkhead:stop-server"], {}, 0o77)],
            [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)],
        )
        sock.recv(1)  # type: ignore[attr-defined]
    except OSError:
        pass  # it was ending already
    finally:
        os.close(here)
        sock.close()  # type: ignore[attr-defined]
