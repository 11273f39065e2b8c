"""The keeper's workloads: output to log and attachments, input from attachments.

Imported by the keeper process: few imports. Nothing here blocks: every descriptor is non-blocking,
or a regular file. A workload is read only while none of its attachments has output pending, so a
slow client slows its own workload (as the pipe it stands for would) and no other.
"""

import _socket
import errno
import os
import select
import stat
import time
from collections.abc import Callable

from bulkhead.keeper import journal
from bulkhead.keeper.journal import IDLE, LOGGED, MOVED, PLANNED, Journal, LogFile
from bulkhead.keeper.loop import ENDED, READ, WRITE, Loop

INPUT_PORTION = 32 << 10
RETRY_S = 0.1
"""How often a terminal without an open other side is looked at again."""
LINGER_S = 2.0
"""How long a process's output is awaited after its end if others hold it open; as Docker does."""
REATTACH_S = 5.0
"""How long output waits for attachments that a dead keeper had."""
ORPHAN_S = 30.0
"""How long it waits for those of a dead engine, which somebody must start again first."""


def private(fd: int, flags: int) -> int:
    """A non-blocking descriptor for what `fd` is, without touching the one that the client shares.

    Pipes and terminals are opened anew; regular files keep their shared offset; sockets are used
    as they are, with MSG_DONTWAIT's effect from waiting for readiness first. Takes `fd` over.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        try:
            fresh = os.open(
                f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
        except OSError:
            return fd  # e.g. /dev/tty, which is nothing here: readiness is all we have
        os.close(fd)
        return fresh
    return fd


class Attachment:
    """A client's standard streams, connected to a workload's."""

    def __init__(self, fds: tuple[int, int, int], keys: bytes, done: Callable[[str], None]) -> None:
        flags = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)
        self.fds = [
            private(fd, flag) if fd >= 0 else -1 for fd, flag in zip(fds, flags, strict=True)
        ]
        self.keys = keys
        self.matched = 0
        self.pending = [b"", b"", b""]
        self.input_ready = False
        self.ended = False
        self.returns = True
        """Whether it outlives its engine: its client connects again through the next one."""
        self._done = done

    def blocked(self) -> bool:
        """Whether output waits for the client."""
        return bool(self.pending[1] or self.pending[2])

    def finish(self, loop: Loop, why: str) -> None:
        """Close everything and tell the client `why`; once."""
        if self.ended:
            return
        self.ended = True
        for fd in self.fds:
            if fd >= 0:
                loop.unwatch(fd)
                os.close(fd)
        self.fds = [-1, -1, -1]
        self.pending = [b"", b"", b""]
        self._done(why)


class Workload:
    """One process with kept descriptors.

    `roles` says what each kept descriptor is: i (its stdin), o, e (its stdout, stderr), t (the
    master of its terminal).
    """

    def __init__(
        self,
        loop: Loop,
        book: Journal,
        identity: bytes,
        options: dict[str, str],
        fds: dict[int, int],
        close_kept: Callable[[bytes, int], None],
    ) -> None:
        self.loop = loop
        self.book = book
        self.id = identity
        self.stdin_once = options.get("stdin_once") == "1"
        self.terminal = options.get("tty") == "1"
        self.log = LogFile(
            options.get("path", "") if options.get("driver") == "json-file" else "",
            int(options.get("max_size", "0")),
            int(options.get("max_file", "1")),
        )
        self.attachments: list[Attachment] = []
        self.waiters: list[Callable[[], None]] = []
        self.exited = False
        self.lost_holder = False
        self.finished = False
        self.held = 0
        """Output waits for so many attachments, of a dead keeper or engine, to come back."""
        self._holds = 0
        self._close_kept = close_kept
        self._out: dict[int, int] = {}
        self._in = -1
        self._in_index = -1
        self._input = b""
        self._backlog = [b"", b"", b""]
        self._last_read = time.monotonic()
        self._retrying = False
        roles = options.get("roles", "t" if self.terminal else "")
        for index, fd in fds.items():
            self._place(roles[index] if index < len(roles) else "", index, fd)

    def _place(self, role: str, index: int, fd: int) -> None:
        if role not in tuple("ioet"):
            os.close(fd)
            return
        os.set_blocking(fd, False)
        if role == "i":
            self._in, self._in_index = fd, index
        elif role == "o":
            self._out[1] = fd
        elif role == "e":
            self._out[2] = fd
        else:
            self._in = self._out[1] = fd

    # --- output --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to read; output that was there is read at once."""
        self.refresh()
        self._finish_if_done()

    def recover(self) -> None:
        """Finish what the last keeper had begun with this workload's output; see journal.py."""
        _, stream, before, after, old, new = self.book.found()
        phase = self.book.phase
        journal.settle()
        data = journal.staged()
        log = self.log
        if phase == PLANNED and not data:
            # The end of the stream was flushed: its unfinished line became a record.
            if log.size == after:
                log.set_partial(stream, b"", 0)
            else:
                log.cut_back(before)
            self.book.finish()
        elif phase == PLANNED and log.size == after:
            rest = data[len(data) - new :] if new <= len(data) else log.partial[stream][:old] + data
            log.set_partial(stream, rest, 0)
            self.forward(stream, data)
            self.book.finish()
        elif phase == LOGGED:
            self.forward(stream, data)
            self.book.finish()
        elif phase in (MOVED, PLANNED):
            if phase == PLANNED:
                log.cut_back(before)
            self._portion(stream, data)

    def _portion(self, stream: int, data: bytes) -> None:
        """Log and forward what is in staging, which is `data`."""
        log = self.log
        if log.path and data:
            log.rotate_if_full()
            old = log.partial[stream]
            records, rest = journal.cut(old + data, len(old))
            lines = journal.encode_records(records, stream, time.time_ns()) if records else b""
            self.book.plan(log.size, log.size + len(lines), len(old), len(rest))
            log.append(lines)
            if rest or old:
                self._keep_partial(stream, rest, 0 if records else len(old))
        self.book.phase = LOGGED
        self.forward(stream, data)
        self.book.finish()

    def _keep_partial(self, stream: int, rest: bytes, old: int) -> None:
        try:
            self.log.set_partial(stream, rest, old)
        except OSError as error:
            journal.complain(f"log {self.log.path}: unfinished line: {error.strerror}")

    def forward(self, stream: int, data: bytes) -> None:
        """Send output to the attachments; what they do not take is pending."""
        if self.held:
            self._backlog[stream] += data
            return
        for attachment in list(self.attachments):
            fd = attachment.fds[stream]
            if fd < 0 or not data:
                continue
            attachment.pending[stream] += data
            self._flush(attachment, stream)

    def _flush(self, attachment: Attachment, stream: int) -> None:
        fd, data = attachment.fds[stream], attachment.pending[stream]
        while data and fd >= 0:
            try:
                data = data[_write(fd, data) :]
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.drop_output(attachment, stream)
                return
        attachment.pending[stream] = data
        if data:
            watched = self.loop.watch(
                fd, WRITE, lambda events: self._flushable(attachment, stream, events)
            )
            if not watched:  # a regular file that cannot take it: its disk is full
                self.drop_output(attachment, stream)
        else:
            self.loop.unwatch(fd)
            self._watch_death(attachment, stream)

    def _watch_death(self, attachment: Attachment, stream: int) -> None:
        """Notice a client that goes away while there is no output; EPOLLERR comes unasked."""
        fd = attachment.fds[stream]
        if fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode):
            self.loop.watch(fd, ENDED, lambda _: self.drop_output(attachment, stream))

    def drop_output(self, attachment: Attachment, stream: int) -> None:
        """One of the client's outputs is dead; the others go on."""
        fd = attachment.fds[stream]
        if fd >= 0:
            self.loop.unwatch(fd)
            os.close(fd)
        attachment.fds[stream] = -1
        attachment.pending[stream] = b""
        if attachment.fds[1] < 0 and attachment.fds[2] < 0:
            self.detach(attachment, "gone")
            return
        self.refresh()
        self._finish_if_done()

    def _flushable(self, attachment: Attachment, stream: int, events: int) -> None:
        if events & select.EPOLLERR:
            self.drop_output(attachment, stream)
            return
        self._flush(attachment, stream)
        if not attachment.blocked():
            self.refresh()
            self._finish_if_done()

    def blocked(self) -> bool:
        """Whether output must not be read now."""
        return self.held > 0 or any(a.blocked() for a in self.attachments)

    def refresh(self) -> None:
        """Watch what is to be watched now."""
        blocked = self.blocked()
        for stream, fd in list(self._out.items()):
            mask = 0 if blocked or (self.terminal and self._retrying) else READ
            if fd == self._in and self._input:
                mask |= WRITE
            self.loop.watch(fd, mask, lambda events, stream=stream: self._ready(stream, events))  # type: ignore[misc]
        if self._in >= 0 and self._in not in self._out.values():
            self.loop.watch(self._in, WRITE if self._input else ENDED, self._input_event)
        for attachment in self.attachments:
            self._watch_input(attachment)

    def _ready(self, stream: int, events: int) -> None:
        if events & WRITE and self._input:
            self._write_input()
        if events & (READ | ENDED) and not self.blocked():
            self._read(stream)
            self._finish_if_done()

    def _read(self, stream: int) -> bool:
        """Read one portion; whether there was one."""
        fd = self._out.get(stream, -1)
        if fd < 0:
            return False
        self.book.begin(self.id, stream)
        try:
            moved = journal.move(fd, self.terminal)
        except (BlockingIOError, InterruptedError):
            self.book.phase = IDLE
            return False
        except OSError as error:
            self.book.phase = IDLE
            if error.errno != errno.EIO:
                journal.complain(f"output of {self.id.decode()}: {error}")
            self._hung_up(stream)
            return False
        if not moved:
            self.book.phase = IDLE
            self._close_output(stream)
            return False
        self._last_read = time.monotonic()
        self._portion(stream, journal.staged())
        if self.blocked():
            self.refresh()
        return True

    def _hung_up(self, stream: int) -> None:
        """Nobody has the terminal's other side open: the end, if the process has ended."""
        if self.exited or self.lost_holder or not self.terminal:
            self._close_output(stream)
            return
        if not self._retrying:
            self._retrying = True
            self.refresh()
            self.loop.after(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        if self.finished:
            return
        self.refresh()
        if not self.blocked():
            self._read(1)
            self._finish_if_done()

    def _close_output(self, stream: int) -> None:
        fd = self._out.pop(stream)
        self.loop.unwatch(fd)
        if fd == self._in:
            self._in = -1
            self._input = b""
        os.close(fd)
        partial = self.log.partial[stream]
        if partial:
            self.book.begin(self.id, stream)
            lines = journal.encode_records([partial], stream, time.time_ns())
            self.book.plan(self.log.size, self.log.size + len(lines), len(partial), 0)
            self.log.append(lines)
            self._keep_partial(stream, b"", 0)
            self.book.finish()

    # --- the end -------------------------------------------------------------------------------

    def process_exited(self) -> None:
        """The process has ended: read what is left."""
        self.exited = True
        self._last_read = time.monotonic()
        if not self.blocked():
            for stream in list(self._out):
                while self._read(stream) and not self.blocked():
                    pass
            if self.terminal and not self.blocked() and 1 in self._out:
                self._close_output(1)
        self._finish_if_done()
        if not self.finished:
            self.loop.after(LINGER_S, self._linger)

    def _linger(self) -> None:
        if self.finished:
            return
        idle_s = time.monotonic() - self._last_read
        if not self.blocked() and (self.terminal or idle_s >= LINGER_S):
            for stream in list(self._out):
                if not self._read(stream) and stream in self._out:
                    self._close_output(stream)
            self._finish_if_done()
        if not self.finished:
            self.loop.after(LINGER_S / 4, self._linger)

    def _finish_if_done(self) -> None:
        if self.finished or self._out or not (self.exited or self.lost_holder):
            return
        if self.blocked():
            return
        self.finished = True
        if self._in >= 0:
            self.loop.unwatch(self._in)
            os.close(self._in)
            self._in = -1
        self.log.close()
        self._close_kept(self.id, -1)
        for attachment in self.attachments:
            attachment.finish(self.loop, "exited")
        self.attachments.clear()
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()

    def abandon(self) -> None:
        """Forget it whatever its state is: close everything."""
        for fd in {*self._out.values(), self._in} - {-1}:
            self.loop.unwatch(fd)
            os.close(fd)
        self._out.clear()
        self._in = -1
        self.log.close()
        self.finished = True
        for attachment in self.attachments:
            attachment.finish(self.loop, "gone")
        self.attachments.clear()
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()

    # --- input ---------------------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> None:
        """Connect a client."""
        if self.finished:
            attachment.finish(self.loop, "exited")
            return
        self.attachments.append(attachment)
        for stream in (1, 2):
            self._watch_death(attachment, stream)
        if self.held and len(self.attachments) >= self.held:
            self.release_hold()
        self.refresh()

    def hold(self, count: int, timeout_s: float) -> None:
        """Let output wait until there are `count` attachments, but no longer than that."""
        self.held = count
        self._holds += 1
        which = self._holds
        self.loop.after(timeout_s, lambda: self.release_hold() if which == self._holds else None)

    def orphan(self, attachment: Attachment) -> None:
        """Disconnect a client whose engine is gone; output waits for it to come back.

        What an only client has not taken yet is kept for it too.
        """
        if attachment in self.attachments and not self.finished:
            if len(self.attachments) == 1:
                for stream in (1, 2):
                    self._backlog[stream] = attachment.pending[stream] + self._backlog[stream]
            self.hold(max(self.held, len(self.attachments)), ORPHAN_S)
        self.detach(attachment, "gone")

    def release_hold(self) -> None:
        """The attachments that were lost are back, or late: go on."""
        if not self.held:
            return
        self.held = 0
        backlog, self._backlog = self._backlog, [b"", b"", b""]
        for stream in (1, 2):
            self.forward(stream, backlog[stream])
        if self.exited:
            self.process_exited()
        else:
            self.begin()

    def detach(self, attachment: Attachment, why: str) -> None:
        """Disconnect a client."""
        if attachment in self.attachments:
            self.attachments.remove(attachment)
        attachment.finish(self.loop, why)
        self.refresh()
        self._finish_if_done()

    def _watch_input(self, attachment: Attachment) -> None:
        fd = attachment.fds[0]
        if fd < 0:
            return
        if self._in < 0:
            self.loop.unwatch(fd)
            return
        mask = 0 if self._input else READ
        watched = self.loop.watch(fd, mask, lambda _: self._take_input(attachment))
        if not watched and not attachment.input_ready:
            # A regular file is always ready; a timer keeps the loop fair.
            attachment.input_ready = True
            self.loop.after(0.0, lambda: self._take_file(attachment))

    def _take_file(self, attachment: Attachment) -> None:
        attachment.input_ready = False
        if not attachment.ended and not self._input:
            self._take_input(attachment)

    def _take_input(self, attachment: Attachment) -> None:
        fd = attachment.fds[0]
        if fd < 0 or self._input or self._in < 0:
            return
        try:
            data = _read(fd)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # EIO: the client's terminal hung up
        if not data:
            self._input_ended(attachment)
            return
        if attachment.keys and self.terminal:  # other input may hold any bytes
            data, detached = filter_keys(attachment, data)
            if detached:
                self._input += data
                self._write_input()
                self.detach(attachment, "detached")
                return
        self._input += data
        self._write_input()

    def _input_ended(self, attachment: Attachment) -> None:
        self.loop.unwatch(attachment.fds[0])
        os.close(attachment.fds[0])
        attachment.fds[0] = -1
        if self.stdin_once and not self.terminal:
            self.close_input()

    def close_input(self) -> None:
        """The workload reads the end of its standard input."""
        if self._in >= 0 and not self.terminal:
            self.loop.unwatch(self._in)
            os.close(self._in)
            self._in = -1
            self._input = b""
            self._close_kept(self.id, self._in_index)

    def _input_event(self, events: int) -> None:
        if events & select.EPOLLERR:  # the workload has closed its standard input
            self.close_input()
            self.refresh()
        elif events & WRITE:
            self._write_input()

    def _write_input(self) -> None:
        while self._input and self._in >= 0:
            try:
                self._input = self._input[os.write(self._in, self._input) :]
            except (BlockingIOError, InterruptedError):
                break
            except BrokenPipeError:
                self.close_input()
            except OSError:
                self._input = b""  # EIO: the terminal has no other side
        self.refresh()

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size (TIOCSWINSZ), which sends SIGWINCH inside."""
        if self.terminal and 1 in self._out:
            import termios

            termios.tcsetwinsize(self._out[1], (rows, columns))


def _borrow(fd: int) -> _socket.socket:
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=fd)


def _write(fd: int, data: bytes) -> int:
    data = data[: journal.PORTION]
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return os.write(fd, data)
    sock = _borrow(fd)
    try:
        return sock.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    finally:
        sock.detach()


def _read(fd: int) -> bytes:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return os.read(fd, INPUT_PORTION)
    sock = _borrow(fd)
    try:
        return sock.recv(INPUT_PORTION, _socket.MSG_DONTWAIT)
    finally:
        sock.detach()


def filter_keys(attachment: Attachment, data: bytes) -> tuple[bytes, bool]:
    """(what to pass on, whether the detach keys were typed).

    As in Docker: the keys typed so far are held back; if another follows, they are passed on.
    """
    out = bytearray()
    keys = attachment.keys
    for value in data:
        if value == keys[attachment.matched]:
            attachment.matched += 1
            if attachment.matched == len(keys):
                return bytes(out), True
            continue
        if attachment.matched:
            out += keys[: attachment.matched]
            attachment.matched = 1 if value == keys[0] and len(keys) > 1 else 0
            if attachment.matched:
                continue
        out.append(value)
    return bytes(out), False
