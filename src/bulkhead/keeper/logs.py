"""Reading the keeper's logs (json-file format; `keeper/journal.py` writes them), for the engine.

    PATH            the youngest records; one JSON object per line
    PATH.1 … .n     older files, .1 the youngest of them
    PATH.partial-1  the unfinished line of stdout (-2: stderr), which is in no record yet

Memory is bounded by one block and one record. A follower crosses rotations by the inodes: it
finishes the file it has open, finds it again under its new name, and goes on with the next younger.
"""

import asyncio
import calendar
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache

import msgspec

_BLOCK = 64 << 10
_POLL_S = 0.05
_NS = 1_000_000_000
_STREAMS = {"stdout": 1, "stderr": 2}


class Record(msgspec.Struct, frozen=True):
    """One record: stream 1 or 2, the bytes with their newline if they had one, RFC 3339 time."""

    stream: int
    data: bytes
    time: str

    @property
    def time_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return parse_time(self.time)


@lru_cache(maxsize=256)
def _seconds(text: str) -> int:
    fields = (text[0:4], text[5:7], text[8:10], text[11:13], text[14:16], text[17:19])
    return calendar.timegm((*map(int, fields), 0, 0, 0))


def parse_time(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 UTC time; ValueError otherwise."""
    fraction = text[19:].rstrip("Z").lstrip(".")
    return _seconds(text[:19]) * _NS + int((fraction + "0" * 9)[:9])


class _Line(msgspec.Struct):
    """What the keeper writes; `log` may hold lone surrogates, which only the slow way reads."""

    log: str
    stream: str
    time: str


_line = msgspec.json.Decoder(_Line)


def decode(line: bytes) -> Record | None:
    """The record of a line, None if it is not one (a machine that lost power may leave such)."""
    try:
        quick = _line.decode(line)
        record = Record(_STREAMS[quick.stream], quick.log.encode(), quick.time)
        parse_time(record.time)
        return record
    except (msgspec.DecodeError, ValueError, KeyError):
        return _decode_slowly(line)


def _decode_slowly(line: bytes) -> Record | None:
    try:
        raw = json.loads(line)
        text = raw["log"]
        record = Record(_STREAMS[raw["stream"]], _to_bytes(text), raw["time"])
        parse_time(record.time)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _names(path: str) -> list[str]:
    """The files' names, youngest first; one may be missing in the midst of a rotation."""
    names = [path]
    while any(os.path.exists(f"{path}.{len(names) + more}") for more in (0, 1)):
        names.append(f"{path}.{len(names)}")
    return names


def _open_all(path: str) -> list[int]:
    """The files, oldest first. A rotation meanwhile is noticed and looked at again."""
    for _ in range(100):
        fds: list[int] = []
        for name in reversed(_names(path)):
            fd = _open(name)
            if fd is not None:
                fds.append(fd)
        inodes = [os.fstat(fd).st_ino for fd in fds]
        current = os.stat(path).st_ino if os.path.exists(path) else 0
        if len(set(inodes)) == len(inodes) and (not current or current == inodes[-1]):
            return fds
        for fd in fds:
            os.close(fd)
    return []


def _tail_position(fd: int, wanted: int, end: int) -> tuple[int, int]:
    """(offset where the last `wanted` lines before `end` begin, how many there are from it)."""
    position, found = end, 0
    while position > 0:
        start = max(0, position - _BLOCK)
        block = os.pread(fd, position - start, start)
        at = len(block)
        while True:
            at = block.rfind(b"\n", 0, at)
            if at < 0:
                break
            if found == wanted:
                return start + at + 1, found
            found += 1
        position = start
    return 0, found


class _Lines:
    """Whole lines of one file from an offset on; what is not finished yet is read again later."""

    def __init__(self, fd: int, offset: int = 0, end: int | None = None) -> None:
        self.fd = fd
        self.offset = offset
        self._end = end
        self._rest = b""

    def read(self) -> Iterator[bytes]:
        """The lines that are there now, up to `end` if there is one."""
        if os.fstat(self.fd).st_size < self.offset:
            self.offset, self._rest = 0, b""  # cut to begin again (max-file=1)
        while True:
            wanted = _BLOCK if self._end is None else min(_BLOCK, self._end - self.offset)
            block = os.pread(self.fd, max(0, wanted), self.offset)
            if not block:
                return
            self.offset += len(block)
            lines = (self._rest + block).split(b"\n")
            self._rest = lines.pop()
            yield from lines

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def _start(path: str, tail: int | None, *, follow: bool) -> list[_Lines]:
    """The files to read, oldest first, at the offsets where `tail` records begin.

    Without `follow` they end where they end now: what a busy workload writes meanwhile is neither
    one of the last `tail` nor ever all.
    """
    files: list[_Lines] = []
    left = tail
    for fd in reversed(_open_all(path)):
        end = os.fstat(fd).st_size
        offset = 0
        if left is not None:
            offset, found = _tail_position(fd, left, end)
            left -= found
        files.insert(0, _Lines(fd, offset, None if follow else end))
    return files


def _next_younger(path: str, inode: int) -> int | None:
    """Open the file after the one with `inode`; None if that is the youngest still."""
    names = _names(path)
    previous: str | None = None
    for name in names:
        try:
            found = os.stat(name).st_ino
        except FileNotFoundError:
            continue
        if found == inode:
            return _open(previous) if previous else None
        previous = name
    return _open(previous) if previous else None  # ours was deleted or is none: the oldest


async def read(
    path: str,
    *,
    since: int | None = None,
    until: int | None = None,
    tail: int | None = None,
    follow: bool = False,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[Record]:
    """The records of the log at `path`, oldest first; no log is an empty one.

    `since` and `until` are nanoseconds since the epoch, `tail` how many of the last records to
    begin with. With `follow` it goes on until `stop` is set, and then gives what is still there;
    or until a record is later than `until`.
    """
    async with contextlib.AsyncExitStack() as undo:
        files = _start(path, tail, follow=follow)
        for file in files:
            undo.callback(file.close)
        current: _Lines | None = None
        for current in files:
            for count, line in enumerate(current.read()):
                record = decode(line)
                if record is None or (since is not None and record.time_ns < since):
                    continue
                if until is not None and record.time_ns > until:
                    return
                yield record
                if count % 256 == 255:
                    await asyncio.sleep(0)  # others want the loop, too
        if not follow:
            return
        async for record in _follow(path, current, undo, stop or asyncio.Event()):
            if until is not None and record.time_ns > until:
                return
            if since is None or record.time_ns >= since:
                yield record


async def _follow(
    path: str,
    current: _Lines | None,
    undo: contextlib.AsyncExitStack,
    stop: asyncio.Event,
) -> AsyncIterator[Record]:
    while True:
        stopping = stop.is_set()  # before reading: what was written until then is given
        while True:
            younger = _next_younger(path, os.fstat(current.fd).st_ino if current else 0)
            # Looked for before reading on: when there is a younger one, ours gets no more lines.
            if current is not None:
                for line in current.read():
                    record = decode(line)
                    if record is not None:
                        yield record
            if younger is None:
                break
            current = _Lines(younger)
            undo.callback(current.close)
        if stopping:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _POLL_S)


def partial(path: str) -> dict[int, bytes]:
    """The unfinished lines by stream: a prompt, for instance, which is in no record yet."""
    found: dict[int, bytes] = {}
    for stream in (1, 2):
        with contextlib.suppress(FileNotFoundError), open(f"{path}.partial-{stream}", "rb") as file:
            data = file.read()
            if data:
                found[stream] = data
    return found


def size_on_disk(path: str) -> int:
    """Bytes of all files of the log."""
    total, n = 0, 0
    while True:
        try:
            total += os.stat(f"{path}.{n}" if n else path).st_size
        except FileNotFoundError:
            return total
        n += 1
