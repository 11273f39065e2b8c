"""The keeper's log files and the journal that makes its death lose and double nothing.

Imported by the keeper process: few imports. Four descriptors outlive any one keeper, for the holder
passes the same to each (`keeper/client.py` makes them):

    3  journal   a memfd, mapped: what step is under way for which workload, and who was attached
    4  staging   a memfd: output that left the workload's pipe and is not yet in the log
    5, 6         a pipe, between a terminal's master and staging (splice(2) wants a pipe)

One portion of output goes through these phases:

    MOVED    set before splice(2) moves it from the workload's pipe to staging. The kernel moves
             bytes, it does not copy them: whoever dies, they are in one of the two places.
    PLANNED  the log's size before and after is noted; then the records are appended to the log,
             then the unfinished line is written to its own file (PATH.partial-1, -2).
    LOGGED   then it is forwarded to attachments, then staging is emptied.
    IDLE

A new keeper finds MOVED: it goes on as if it had just moved the bytes. PLANNED with the log as long
as planned: the log has it, only the unfinished line is written again. PLANNED otherwise: the log is
cut back to its size before, then as MOVED. LOGGED with staging not empty: only the forwarding is
in doubt, and is done again. (PLANNED with staging empty: the end of a stream was flushed, whose
unfinished line became a record.)

Log files are json-file's: {"log": text, "stream": name, "time": RFC 3339} per line; lines above
16 KiB are cut into records without a newline. Bytes that are not UTF-8 are written as lone
surrogates (surrogateescape), which other readers show as U+FFFD and ours turns back into the bytes.
"""

import errno
import fcntl
import mmap
import os
import sys
import time
from _json import encode_basestring, encode_basestring_ascii
from struct import Struct

JOURNAL_FD, STAGING_FD, TRANSIT_OUT_FD, TRANSIT_IN_FD = 3, 4, 5, 6
JOURNAL_SIZE = 64 << 10
IDLE, MOVED, PLANNED, LOGGED = range(4)
PORTION = 64 << 10
MAX_RECORD = 16 << 10
STREAMS = ("", "stdout", "stderr")

_PHASE = Struct("=I")
_HEAD = Struct("=IQQIII")
_HEAD_AT = 8
_ID_AT = 64
_ATTACHED_AT = 1024
_LENGTH = Struct("=I")


def complain(message: str) -> None:
    """One line to the holder's log."""
    sys.stderr.write(f"keeper: {message}\n")


class Journal:
    """The mapped journal and the staging file."""

    def __init__(self) -> None:
        os.ftruncate(JOURNAL_FD, JOURNAL_SIZE)
        self._map = mmap.mmap(JOURNAL_FD, JOURNAL_SIZE)
        os.set_blocking(TRANSIT_OUT_FD, False)
        os.set_blocking(TRANSIT_IN_FD, False)

    @property
    def phase(self) -> int:
        """Where the last keeper stopped."""
        return int(_PHASE.unpack_from(self._map, 0)[0])

    @phase.setter
    def phase(self, value: int) -> None:
        _PHASE.pack_into(self._map, 0, value)

    def begin(self, identity: bytes, stream: int) -> None:
        """Enter MOVED for one stream."""
        self._map[_ID_AT : _ID_AT + len(identity)] = identity
        _HEAD.pack_into(self._map, _HEAD_AT, stream, 0, 0, len(identity), 0, 0)
        self.phase = MOVED

    def plan(self, before: int, after: int, old_partial: int, new_partial: int) -> None:
        """Enter PLANNED: the log's sizes, the lengths of the unfinished line."""
        stream, _, _, size, _, _ = _HEAD.unpack_from(self._map, _HEAD_AT)
        _HEAD.pack_into(self._map, _HEAD_AT, stream, before, after, size, old_partial, new_partial)
        self.phase = PLANNED

    def found(self) -> tuple[bytes, int, int, int, int, int]:
        """(id, stream, log size before, after, old and new length of the unfinished line)."""
        stream, before, after, size, old, new = _HEAD.unpack_from(self._map, _HEAD_AT)
        return self._map[_ID_AT : _ID_AT + size], stream, before, after, old, new

    def finish(self) -> None:
        """Empty staging, then IDLE."""
        os.ftruncate(STAGING_FD, 0)
        self.phase = IDLE

    def attached(self) -> list[bytes]:
        """The workload of every attachment, when this was last noted."""
        (size,) = _LENGTH.unpack_from(self._map, _ATTACHED_AT)
        at = _ATTACHED_AT + _LENGTH.size
        return [i for i in self._map[at : at + size].split(b"\n") if i]

    def note_attached(self, identities: list[bytes]) -> None:
        """Note the workload of every attachment; those that do not fit are left out."""
        raw = b"\n".join(identities)
        at = _ATTACHED_AT + _LENGTH.size
        if len(raw) > JOURNAL_SIZE - at:
            raw = raw[: JOURNAL_SIZE - at].rpartition(b"\n")[0]
        _LENGTH.pack_into(self._map, _ATTACHED_AT, 0)
        self._map[at : at + len(raw)] = raw
        _LENGTH.pack_into(self._map, _ATTACHED_AT, len(raw))


def move(source: int, terminal: bool) -> int:
    """Move a portion from `source` to staging; its bytes, 0 at the end of the stream.

    BlockingIOError when there is nothing yet. A terminal whose other side is closed raises EIO.
    """
    if not terminal:
        return os.splice(source, STAGING_FD, PORTION, offset_dst=0, flags=os.SPLICE_F_NONBLOCK)
    flags = os.SPLICE_F_NONBLOCK
    if os.splice(source, TRANSIT_IN_FD, PORTION, flags=flags) == 0:
        return 0
    settle()
    return os.fstat(STAGING_FD).st_size


def settle() -> None:
    """Move what is in transit to the end of staging."""
    while True:
        try:
            size = os.fstat(STAGING_FD).st_size
            os.splice(
                TRANSIT_OUT_FD,
                STAGING_FD,
                PORTION,
                offset_dst=size,
                flags=os.SPLICE_F_NONBLOCK,
            )
        except BlockingIOError:
            return


def staged() -> bytes:
    """What is in staging."""
    return os.pread(STAGING_FD, os.fstat(STAGING_FD).st_size, 0)


_stamp: tuple[int, str] = (0, "")


def timestamp(now_ns: int) -> str:
    """RFC 3339 with nanoseconds, UTC."""
    global _stamp
    seconds, rest = divmod(now_ns, 1_000_000_000)
    if _stamp[0] != seconds:
        t = time.gmtime(seconds)
        _stamp = (
            seconds,
            f"{t[0]:04}-{t[1]:02}-{t[2]:02}T{t[3]:02}:{t[4]:02}:{t[5]:02}",
        )
    return f"{_stamp[1]}.{rest:09}Z"


def cut(buffer: bytes, old: int = 0) -> tuple[list[bytes], bytes]:
    """(finished records, unfinished line): at newlines, and every 16 KiB of a longer line.

    Such a cut does not divide a UTF-8 character, except to leave nothing of the first `old` bytes
    (the unfinished line so far): what is left is new, or all is, so that the journal can tell.
    """
    records: list[bytes] = []
    start = 0
    while True:
        end = buffer.find(b"\n", start) + 1
        stop = end or len(buffer)
        while stop - start > MAX_RECORD:
            at = start + MAX_RECORD
            back = 0
            while back < 3 and buffer[at - back] & 0xC0 == 0x80:
                back += 1
            if buffer[at - back] >= 0xC0 and at - back >= old:
                at -= back
            records.append(buffer[start:at])
            start = at
        if not end:
            return records, buffer[start:]
        records.append(buffer[start:end])
        start = end


def encode_records(records: list[bytes], stream: int, now_ns: int) -> bytes:
    """The log's lines for `records`."""
    tail = f',"stream":"{STREAMS[stream]}","time":"{timestamp(now_ns)}"}}\n'
    out: list[str] = []
    for record in records:
        try:
            text = encode_basestring(record.decode())
        except UnicodeDecodeError:
            text = encode_basestring_ascii(record.decode("utf-8", "surrogateescape"))
        out.append(f'{{"log":{text}{tail}')
    return "".join(out).encode()


class LogFile:
    """One workload's log and its unfinished lines. An empty `path` keeps nothing.

    When the file has reached `max_size` bytes (0: never) the next portion goes to a new one; the
    old are PATH.1 (youngest) to PATH.(max_file - 1).
    """

    def __init__(self, path: str, max_size: int, max_file: int) -> None:
        self.path = path
        self._max_size = max_size
        self._max_file = max(1, max_file)
        self._fd = -1
        self.size = 0
        self.partial = [b"", b"", b""]
        self._partial_fds = [-1, -1, -1]
        if path:
            self._open()
            for stream in (1, 2):
                self.partial[stream] = self._read_partial(stream)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o640)
        self.size = os.fstat(self._fd).st_size

    def _partial_path(self, stream: int) -> str:
        return f"{self.path}.partial-{stream}"

    def _read_partial(self, stream: int) -> bytes:
        try:
            fd = os.open(self._partial_path(stream), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        self._partial_fds[stream] = fd
        return os.pread(fd, MAX_RECORD * 2, 0)

    def set_partial(self, stream: int, data: bytes, old: int) -> None:
        """Store the unfinished line; what follows its first `old` bytes if it begins with them."""
        before = self.partial[stream]
        self.partial[stream] = data
        if not self.path or (not data and not before and self._partial_fds[stream] < 0):
            return
        fd = self._partial_fds[stream]
        if fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = self._partial_fds[stream] = os.open(self._partial_path(stream), flags, 0o640)
        append = old and len(data) >= old and data.startswith(before[:old])
        start = old if append else 0
        if os.pwrite(fd, data[start:], start) != len(data) - start:
            raise OSError(errno.ENOSPC, "short write of an unfinished line")
        os.ftruncate(fd, len(data))

    def rotate_if_full(self) -> None:
        """Begin a new file if this one is full."""
        if not self._max_size or self.size < self._max_size or self._fd < 0:
            return
        if self._max_file == 1:
            os.ftruncate(self._fd, 0)
            self.size = 0
            return
        for n in range(self._max_file - 2, 0, -1):
            try:
                os.rename(f"{self.path}.{n}", f"{self.path}.{n + 1}")
            except FileNotFoundError:
                continue
        os.rename(self.path, f"{self.path}.1")
        os.close(self._fd)
        self._open()

    def append(self, lines: bytes) -> None:
        """Append whole lines; when the disk is full they are given up, never cut."""
        if self._fd < 0 or not lines:
            return
        try:
            written = os.write(self._fd, lines)
        except OSError as error:
            self._complain(error)
            return
        if written != len(lines):
            self._complain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            os.ftruncate(self._fd, self.size)
            return
        self.size += written

    def _complain(self, error: OSError) -> None:
        complain(f"log {self.path}: {error.strerror}: output is not logged")

    def cut_back(self, size: int) -> None:
        """Cut the file to `size` if it is longer."""
        if self._fd >= 0 and self.size > size:
            os.ftruncate(self._fd, size)
            self.size = size

    def close(self) -> None:
        """Close, and remove the files of unfinished lines, which are empty by now."""
        for fd in (self._fd, *self._partial_fds):
            if fd >= 0:
                os.close(fd)
        if self.path:
            for stream in (1, 2):
                if self._partial_fds[stream] >= 0 and not self.partial[stream]:
                    try:
                        os.unlink(self._partial_path(stream))
                    except FileNotFoundError:
                        continue
        self._fd = -1
        self._partial_fds = [-1, -1, -1]


def lock_alone(path: str) -> int:
    """Wait until no other keeper of this run directory lives; the descriptor with the lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd
