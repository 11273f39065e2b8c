"""The caller's terminal: raw while attached, and as it was afterwards, whatever ends us.

`raw()` forks a guard that does nothing but wait; when this process dies without restoring
(SIGKILL), the guard restores. See termios(3), tty_ioctl(4).
"""

import contextlib
import errno
import os
import signal
import termios
from collections.abc import Iterator

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


def size(fd: int) -> tuple[int, int]:
    """(rows, columns) of the terminal at `fd`; (0, 0) if it has none to tell."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 0, 0
    return rows, columns


def width(fd: int = 1, fallback: int = 80) -> int:
    """Columns of the terminal at `fd`."""
    return size(fd)[1] or fallback


def _make_raw(old: "list[int | list[bytes | int]]") -> "list[int | list[bytes | int]]":
    """cfmakeraw(3)."""
    new = [value if isinstance(value, int) else list(value) for value in old]

    def clear(index: int, bits: int) -> None:
        flags = new[index]
        assert isinstance(flags, int)
        new[index] = flags & ~bits

    clear(
        _IFLAG,
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
        | termios.IGNCR | termios.ICRNL | termios.IXON,
    )  # fmt: skip
    clear(_OFLAG, termios.OPOST)
    clear(_LFLAG, termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    clear(_CFLAG, termios.CSIZE | termios.PARENB)
    flags = new[_CFLAG]
    assert isinstance(flags, int)
    new[_CFLAG] = flags | termios.CS8
    characters = new[_CC]
    assert isinstance(characters, list)
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    return new


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """The terminal at `fd` raw for the block's time; OSError if `fd` is no terminal."""
    try:
        old = termios.tcgetattr(fd)
    except termios.error as error:
        raise OSError(*error.args) from None
    release, guard = _guard(fd, old)
    try:
        _set(fd, _make_raw(old))
        yield
    finally:
        with _output_allowed(), contextlib.suppress(termios.error):  # the terminal may be gone
            _set(fd, old)
        with contextlib.suppress(OSError):
            os.write(release, b"x")
        os.close(release)
        os.waitpid(guard, 0)


def _set(fd: int, attributes: "list[int | list[bytes | int]]") -> None:
    """tcsetattr(3) once the output is written, which a signal may interrupt: then again."""
    while True:
        try:
            termios.tcsetattr(fd, termios.TCSADRAIN, attributes)
            return
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


@contextlib.contextmanager
def _output_allowed() -> Iterator[None]:
    """Without SIGTTOU, which would stop a background process that sets a terminal."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTTOU, before)


def _guard(fd: int, old: "list[int | list[bytes | int]]") -> tuple[int, int]:
    """(the end of a pipe to write to when all is restored, the guard's pid)."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(read)
        return write, pid
    try:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM,
                       signal.SIGTTOU, signal.SIGTSTP, signal.SIGIO):  # fmt: skip
            signal.signal(number, signal.SIG_IGN)
        keep = sorted((fd, read))
        for low, high in ((0, keep[0]), (keep[0] + 1, keep[1]), (keep[1] + 1, 65536)):
            if low < high:  # closerange(0, 0) would close everything (CPython 3.11)
                os.closerange(low, high)
        if not os.read(read, 1):
            termios.tcsetattr(fd, termios.TCSADRAIN, old)
    finally:
        os._exit(0)
