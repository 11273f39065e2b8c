"""Leading connections from a port of the loopback interface to a unix socket, until ^C."""

import contextlib
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from bulkhead.cli.options import UsageError
from bulkhead.errors import Unavailable

if TYPE_CHECKING:
    from bulkhead.cli.command import Context

_PIECE = 1 << 16


def forward(context: "Context", place: str, path: str) -> None:
    """Listen on `place` ([ADDRESS:]PORT) for as long as the process lives."""
    address, _, port = place.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{place!r} is no [ADDRESS:]PORT")
    try:
        listening = socket.create_server((address or "127.0.0.1", int(port)))
    except OSError as error:
        raise Unavailable(f"cannot listen on {place}: {error.strerror}") from error
    with listening:
        bound, number = listening.getsockname()[:2]
        context.out(f"{bound}:{number}")
        sys.stdout.flush()
        while True:
            near, _ = listening.accept()
            threading.Thread(target=_lead, args=(near, path), daemon=True).start()


def _lead(near: socket.socket, path: str) -> None:
    with near, socket.socket(socket.AF_UNIX) as far, contextlib.suppress(OSError):
        _connect(far, path)
        back = threading.Thread(target=_copy, args=(far, near), daemon=True)
        back.start()
        _copy(near, far)
        back.join()


def _connect(sock: socket.socket, path: str) -> None:
    """By way of its directory: the path itself may be longer than a socket's may be (unix(7))."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
