"""Terminals: handing a master to a console socket, or carrying bytes between it and our own."""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from types import FrameType

from bulkhead.errors import Invalid
from bulkhead.linux.fds import OwnedFd

_BYTES = 65536


def send(path: str, master: int) -> None:
    """Hand `master` to whoever listens at `path` (--console-socket); Invalid if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        try:
            client.connect(path)
            socket.send_fds(client, [b"/dev/ptmx"], [master])
        except OSError as error:
            raise Invalid(f"--console-socket {path}: {error.strerror}") from None


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """The terminal `fd` in raw mode; nothing if it is none."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def copy_size(master: int) -> None:
    """Give the container's terminal the size of ours, if standard input is one."""
    with contextlib.suppress(OSError):
        rows, columns = termios.tcgetwinsize(0)
        termios.tcsetwinsize(master, (rows, columns))


def relay(master: OwnedFd) -> None:
    """Carry bytes between our standard streams and `master` until its other side has closed."""

    def resized(_number: int, _frame: FrameType | None) -> None:
        copy_size(int(master))

    before = signal.signal(signal.SIGWINCH, resized)
    copy_size(int(master))
    try:
        with _raw(0):
            _pump(int(master))
    finally:
        signal.signal(signal.SIGWINCH, before)


def _pump(master: int) -> None:
    poller = select.poll()
    poller.register(master, select.POLLIN)
    poller.register(0, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            data = _read(fd)
            if fd == master:
                if not data:
                    return
                _write(1, data)
            elif data:
                _write(master, data)
            else:
                poller.unregister(0)
                _write(master, _end_of_file(master))


def _end_of_file(master: int) -> bytes:
    """What a terminal takes for the end of its input (VEOF, usually control-D)."""
    character = termios.tcgetattr(master)[6][termios.VEOF]
    return character if isinstance(character, bytes) else struct.pack("B", character)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _BYTES)
    except OSError as error:
        if error.errno == errno.EIO:  # the slave's last descriptor was closed
            return b""
        raise


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
