"""Inside a guest, as its own kernel sees it: files, processes, usage, limits.

Everything here blocks and is for threads. What comes from the guest is hostile: bounded, checked
(tree.py), and waited for with a deadline.
"""

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from bulkhead.boundaries.guest import frames, link, tree
from bulkhead.boundaries.guest.plan import GROUP, VIEW
from bulkhead.errors import BulkheadError, Unavailable
from bulkhead.linux.fds import OwnedFd

_T = TypeVar("_T")
_SILENT_S = 120.0
"""How long a guest may be silent while its files are read."""
_CONNECT_S = 20.0
_NUMBERS_MAX = 1 << 62


class Sink(Protocol):
    """Where the entries that are put go."""

    def __call__(self, data: bytes, /) -> None:
        """Send it all."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """Where in a guest a workload is: its first process's id, its group, its places."""

    process: int = frames.MAIN
    group: str = GROUP
    base: str = ""

    def environment(self) -> list[str]:
        """For the tool."""
        return [f"BULKHEAD_GROUP={self.group}", f"BULKHEAD_BASE={self.base}"] if self.base else []


class Interior:
    """What is behind the monitor that is process `pid`; `shown`: a guest of files alone."""

    def __init__(
        self, pid: int, *, shown: bool = False, place: str = link.PLACE, seat: Seat | None = None
    ) -> None:
        self._pid = pid
        self._place = place
        self._seat = seat or Seat()
        self._main = not shown
        self._root = VIEW if shown else "main"

    def _link(self, timeout_s: float = link.ANSWER_S) -> link.Link:
        return link.Link(self._pid, timeout_s, self._place)

    # --- files -------------------------------------------------------------------------------

    def stat(self, directory: str, name: str) -> tree.Entry:
        """The file `name` of `directory`, a link not followed; NotFound. `name` "" for itself."""
        found = self._receive(["stat", self._root, directory, name], list)
        if len(found) != 1:
            raise Unavailable("the guest sent files that make no sense")
        return found[0]

    def get(self, directory: str, name: str, handle: Callable[[tree.Reader], _T]) -> _T:
        """That file and everything below it, first itself; `handle` reads them."""
        return self._receive(["get", self._root, directory, name], handle)

    def upper(
        self, handle: Callable[[tree.Reader], _T], *, contents: bool, freeze: bool = False
    ) -> _T:
        """The writable layer; `freeze`: the workload's processes stand still meanwhile."""
        return self._receive(["upper", str(int(contents)), str(int(freeze))], handle)

    def export(self, layers: int, handle: Callable[[tree.Reader], _T]) -> _T:
        """Image and writable layer as one tree, without what is mounted in it."""
        base = self._seat.base
        places = (f"{base}/layers/{n}" for n in range(layers))
        lowers = ":".join([f"{base}/upper/upper", *places])
        return self._receive(["export", f"lowerdir={lowers}"], handle)

    def put(self, directory: str, write: Callable[[Sink], None], *, keep_kinds: bool) -> None:
        """Write below `directory` what `write` encodes (tree.encode), up to tree.END."""
        arguments = ["put", self._root, directory, str(int(keep_kinds))]
        reading, writing = link.pipe()
        failures: list[BaseException] = []

        def feed() -> None:
            with writing:
                try:
                    write(lambda data: _write_all(int(writing), data))
                except BrokenPipeError:
                    return  # the tool has said why, or has ended
                except BaseException as error:
                    failures.append(error)

        feeder = threading.Thread(target=feed, name="put", daemon=True)
        try:
            with reading:
                self._receive(
                    arguments, list, stdin=reading, begun=feeder.start, excused=feeder.is_alive
                )
        except BulkheadError:
            if failures:
                raise failures[0] from None
            raise
        finally:
            if feeder.ident is None:
                writing.close()
            else:
                feeder.join(_SILENT_S)
        if failures:
            raise failures[0]

    def _receive(
        self,
        arguments: list[str],
        handle: Callable[[tree.Reader], _T],
        *,
        stdin: OwnedFd | None = None,
        begun: Callable[[], None] = lambda: None,
        excused: Callable[[], bool] = lambda: False,
    ) -> _T:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(self._link(_SILENT_S))
            reading, writing = (undo.enter_context(fd) for fd in link.pipe())
            if stdin is None:
                stdin = undo.enter_context(OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
            seat = self._seat
            context = seat.process if self._main else 0
            out, known = int(writing), seat.environment()
            connection.tool(arguments, int(stdin), out, context=context, environment=known)
            stdin.close()
            writing.close()
            begun()
            source = cast(BinaryIO, link.Patient(int(reading), _SILENT_S, excused))
            return handle(tree.Reader(source))

    # --- processes ---------------------------------------------------------------------------

    def processes(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        """(/proc/PID/stat, command line, uid, gid) of each, pids as the guest's init sees them."""
        for entry in self._receive(["ps"], list):
            yield entry.link, entry.path, entry.uid, entry.gid

    def uptime_s(self) -> float:
        """Seconds since the guest was booted."""
        return float(self._read("/proc/uptime").split()[0])

    def connect(self, address: str, port: int) -> socket.socket:
        """A TCP connection from the guest's network to `address`, an IP address; OSError.

        What carries it lives on until it is closed.
        """
        ours, theirs = socket.socketpair()
        connection: link.Link | None = None
        try:
            with theirs:
                connection = self._link(_CONNECT_S)
                arguments = ["connect", address, str(port)]
                connection.tool(arguments, theirs.fileno(), theirs.fileno(), context=0)
            ours.settimeout(_CONNECT_S)
            answer = ours.recv(4, socket.MSG_WAITALL)
            number = struct.unpack("<i", answer)[0] if len(answer) == 4 else errno.ECONNABORTED
            if number:
                raise OSError(number, os.strerror(number))
            ours.setblocking(False)
        except BaseException:
            ours.close()
            if connection is not None:
                connection.close()
            raise
        return _Carried(ours, connection)

    # --- usage and limits --------------------------------------------------------------------

    def processors(self) -> int:
        """How many it has."""
        text = self._read("/sys/devices/system/cpu/online").decode("ascii", "replace")
        last = text.strip().rpartition(",")[2].rpartition("-")[2]
        return int(last) + 1 if last.isdecimal() else 1

    def usage(self) -> dict[str, Any]:
        """What the workload uses in its guest, in the shape of Docker's statistics."""
        with self._link() as connection:
            memory = _numbers(connection.read(f"{self._seat.group}/memory.stat"))
            used = _number(connection.read(f"{self._seat.group}/memory.current"))
            limit = _number(connection.read(f"{self._seat.group}/memory.max"))
            total = _numbers(connection.read("/proc/meminfo")).get("MemTotal:", 0) << 10
            tasks = _number(connection.read(f"{self._seat.group}/pids.current"))
            cpu = _numbers(connection.read(f"{self._seat.group}/cpu.stat"))
            events = _numbers(connection.read("/proc/vmstat"))
        return {
            "memory_stats": {"usage": used, "limit": min(limit, total) or total, "stats": memory},
            "cpu_stats": {"cpu_usage": {"total_usage": cpu.get("usage_usec", 0) * 1000}},
            "pids_stats": {"current": tasks},
            "oom_kills": events.get("oom_kill", 0),
        }

    def limit(self, *, memory: int | None, tasks: int | None, cpu: str = "") -> None:
        """Limits of the workload's control group in bytes and tasks; None: as it is, 0 or less: no
        limit. `cpu` is what cpu.max is to hold. LaunchFailed if the guest's kernel refuses.
        """
        values = []
        if memory is not None:
            values.append((f"{self._seat.group}/memory.max", str(memory) if memory > 0 else "max"))
        if tasks is not None:
            values.append((f"{self._seat.group}/pids.max", str(tasks) if tasks > 0 else "max"))
        if cpu:
            values.append((f"{self._seat.group}/cpu.max", cpu))
        self.set(values)

    def set(self, values: list[tuple[str, str]]) -> None:
        """Write these values to these files of the guest's kernel; LaunchFailed."""
        if values:
            with self._link() as connection:
                connection.set_up(link.settings(values))

    def _read(self, path: str) -> bytes:
        with self._link() as connection:
            try:
                return connection.read(path)
            except OSError as error:
                raise Unavailable(f"the guest's {path}: {error.strerror}") from error


class _Carried(socket.socket):
    """A socket at whose end the connection to the monitor ends too."""

    def __init__(self, ours: socket.socket, connection: link.Link) -> None:
        super().__init__(ours.family, ours.type, ours.proto, ours.detach())
        self.setblocking(False)
        self._connection = connection

    def close(self) -> None:
        """Close both."""
        super().close()
        self._connection.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _number(data: bytes) -> int:
    text = data.strip()
    return min(int(text), _NUMBERS_MAX) if text.isdigit() and len(text) < 20 else _NUMBERS_MAX


def _numbers(data: bytes) -> dict[str, int]:
    """Lines of a name and a number."""
    found = {}
    for line in data.splitlines()[:1000]:
        words = line.split()
        if len(words) >= 2 and words[1].isdigit() and len(words[1]) < 20:
            found[words[0].decode("ascii", "replace")] = int(words[1])
    return found


def chunks(pieces: Iterable[bytes], out: int) -> None:
    """Write the pieces to descriptor `out`."""
    for piece in pieces:
        _write_all(out, piece)
