"""The keeper process: holds the workloads' stdio. `keeper/client.py` is its other side.

    python -I -S PATH/keeper/main.py RUN_DIRECTORY      descriptors 3 to 6: see journal.py

Started, and started again when it dies, by the holder, which gives it every entry with kept
descriptors. One thread, one epoll loop; it imports little because one of it is always there.

    <run>/keeper.sock   SOCK_SEQPACKET, 0600; messages: `Wire`
    <run>/keeper.lock   flock'd by the living keeper; a second one waits for it
"""

import _socket
import os
import signal
import struct
import sys
from collections.abc import Callable

if __name__ == "__main__":  # run by path, isolated: the package's folder is not known yet
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from bulkhead.keeper import journal
from bulkhead.keeper.journal import IDLE, Journal, complain
from bulkhead.keeper.loop import READ, WRITE, Loop
from bulkhead.keeper.pump import REATTACH_S, Attachment, Workload

# The holder's messages: native/holder.h.
_MESSAGE = struct.Struct("=IIiI")
_ADOPT = struct.Struct("=q4I16s")
_EXITED = struct.Struct("=qiIQ")
_ENTRY = struct.Struct("=qiIQQII")
_HELLO, _ENTRIES, _CLOSE_KEPT = 1, 5, 9
_REPLY, _EXIT, _ENTRY_MESSAGE, _ADOPT_MESSAGE = 64, 65, 66, 67
_MAX_PACKET = 128 << 10
_INT = struct.Struct("i")
_SYNC = 16
_RECONNECT_S = 0.2
_IDLE_S = 10.0


class Wire:
    """Messages of keeper.sock: u32 kind, u32 number, u32 a, u32 b, then bytes.

    ATTACH   a: 1 stdin | 2 stdout | 4 stderr (descriptors in this order) | 8 wait for an unknown
             id | 16 ends with the engine: no output waits for it; b: length of the detach keys;
             keys, id. Answered at the end: exited|detached|gone
    CANCEL   a: number of an ATTACH
    RESIZE   a: rows, b: columns; id
    DRAINED  id; answered when all output of the ended process is logged and forwarded
    RELEASE  id; forget it
    """

    HEAD = struct.Struct("=4I")
    ATTACH, CANCEL, RESIZE, DRAINED, RELEASE = range(1, 6)
    STDIN, STDOUT, STDERR, WAIT, ENGINES = 1, 2, 4, 8, 16
    ANSWER = 64


def parse_options(meta: bytes) -> dict[str, str]:
    """The meta of an entry: lines of name=value; `path` is the last and may contain anything."""
    options: dict[str, str] = {}
    text = meta.decode("utf-8", "surrogateescape")
    while text:
        name, _, rest = text.partition("=")
        if name == "path":
            options[name] = rest
            break
        value, _, text = rest.partition("\n")
        options[name] = value
    return options


def _fds_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for _, _, data in ancillary:
        fds += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
    return fds


def _receive(sock: _socket.socket) -> tuple[bytes, list[int]] | None:
    """A packet with its descriptors (close-on-exec), None if there is none yet, b"" at the end."""
    for _ in range(2):
        try:
            data, ancillary, _, _ = sock.recvmsg(
                _MAX_PACKET, _socket.CMSG_SPACE(16 * _INT.size), _socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            continue  # said once, before what the dead peer had sent
        except OSError:
            break
        return data, _fds_of(ancillary)
    return b"", []


class HolderLink:
    """The connection to the holder; made again when a new holder has taken over."""

    def __init__(self, keeper: "Keeper") -> None:
        self._keeper = keeper
        self._sock: _socket.socket | None = None
        self._syncing: list[Callable[[], None]] = []
        self._waiting: list[Callable[[], None]] = []

    def connect(self) -> bool:
        """Connect and take over what the holder keeps; False if there is no holder."""
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            sock.connect(f"{self._keeper.folder}/holder.sock")
            sock.send(_MESSAGE.pack(_HELLO, 1, 1, 0), _socket.MSG_NOSIGNAL)
            sock.send(_MESSAGE.pack(_ENTRIES, 2, 0, 0), _socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()
            return False
        self._sock = sock
        self._keeper.loop.watch(sock.fileno(), READ, lambda _: self._readable())
        return True

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._sock is not None

    def _readable(self) -> None:
        while self._sock is not None:
            packet = _receive(self._sock)
            if packet is None:
                return
            data, fds = packet
            if len(data) < _MESSAGE.size:
                self._lost()
                return
            self._take(data, fds)

    def _take(self, data: bytes, fds: list[int]) -> None:
        kind, number, _, _ = _MESSAGE.unpack_from(data)
        body = data[_MESSAGE.size :]
        keeper = self._keeper
        if kind == _ADOPT_MESSAGE:
            _, _, id_size, meta_size, count, indexes = _ADOPT.unpack_from(body)
            rest = body[_ADOPT.size :]
            keeper.adopt(
                rest[:id_size],
                rest[id_size : id_size + meta_size],
                dict(zip(indexes[:count], fds, strict=False)),
            )
        elif kind == _EXIT:
            keeper.exited(body[_EXITED.size :])
        elif kind == _ENTRY_MESSAGE:
            _, _, running, _, _, id_size, _ = _ENTRY.unpack_from(body)
            if not running:
                keeper.exited(body[_ENTRY.size : _ENTRY.size + id_size])
        elif kind == _REPLY and number == 2:
            keeper.taken_over()
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()
        elif kind == _REPLY and self._syncing and number >= _SYNC:
            self._syncing.pop(0)()

    def sync(self, callback: Callable[[], None]) -> None:
        """Call back once every entry launched before now is known here."""
        if self._sock is None:
            self._waiting.append(callback)  # for the next holder
            return
        self._syncing.append(callback)
        try:
            # Any request will do, its reply comes after what the holder had sent before.
            self._sock.send(_MESSAGE.pack(_CLOSE_KEPT, _SYNC, 0, 0), _socket.MSG_NOSIGNAL)
        except OSError as error:
            complain(f"holder: {error}")  # _lost() keeps it for the next

    def _lost(self) -> None:
        assert self._sock is not None
        self._keeper.loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._sock = None
        self._keeper.holder_lost()
        self._waiting += self._syncing
        self._syncing = []

    def close_kept(self, identity: bytes, index: int) -> None:
        """Have the holder close its copies."""
        if self._sock is None:
            return
        try:
            self._sock.send(
                _MESSAGE.pack(_CLOSE_KEPT, 3, index, 0) + identity, _socket.MSG_NOSIGNAL
            )
        except OSError as error:
            complain(f"holder: {error}")


class Client:
    """A connection of the engine's."""

    def __init__(self, keeper: "Keeper", sock: _socket.socket) -> None:
        self._keeper = keeper
        self._sock: _socket.socket | None = sock
        self._queue: list[bytes] = []
        self._attachments: dict[int, tuple[Workload | None, Attachment, bytes]] = {}
        keeper.loop.watch(sock.fileno(), READ, self._event)

    def _event(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE:
            self.hear()

    def hear(self) -> None:
        """Take every message that is there."""
        while self._sock is not None:
            packet = _receive(self._sock)
            if packet is None:
                return
            data, fds = packet
            if len(data) < Wire.HEAD.size:
                self.close()
                return
            self._take(data, fds)

    def close(self) -> None:
        """The engine is gone: its attachments end; output waits for them at the next engine."""
        if self._sock is None:
            return
        self._keeper.loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._sock = None
        # First those that cannot come back, so that nobody waits for them.
        for workload, attachment, _ in sorted(
            self._attachments.values(), key=lambda one: one[1].returns
        ):
            if workload is None:
                attachment.finish(self._keeper.loop, "gone")
            elif attachment.returns:
                workload.orphan(attachment)
            else:
                workload.detach(attachment, "gone")
        self._attachments.clear()
        self._keeper.note_attached()

    def _answer(self, number: int, text: str) -> None:
        self._queue.append(Wire.HEAD.pack(Wire.ANSWER, number, 0, 0) + text.encode())
        self._flush()

    def _flush(self) -> None:
        while self._queue and self._sock is not None:
            try:
                self._sock.send(self._queue[0], _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._keeper.loop.watch(self._sock.fileno(), READ | WRITE, self._event)
                return
            except OSError:
                return  # its end will be read
            del self._queue[0]
        if self._sock is not None:
            self._keeper.loop.watch(self._sock.fileno(), READ, self._event)

    def _take(self, data: bytes, fds: list[int]) -> None:
        kind, number, a, b = Wire.HEAD.unpack_from(data)
        body = data[Wire.HEAD.size :]
        keeper = self._keeper
        if kind == Wire.ATTACH:
            self._attach(number, a, body[:b], body[b:], fds)
            return
        for fd in fds:
            os.close(fd)
        workload = keeper.workloads.get(body)
        if kind == Wire.CANCEL:
            self._cancel(a)
            self._answer(number, "")
        elif kind == Wire.RESIZE:
            if workload is not None:
                workload.resize(a, b)
            self._answer(number, "" if workload is not None else "unknown")
        elif kind == Wire.DRAINED:
            if workload is None:
                keeper.holder.sync(lambda: self._drained(number, body))
            else:
                self._drained(number, body)
        elif kind == Wire.RELEASE:
            keeper.release(body)
            self._answer(number, "")
        else:
            self._answer(number, "unknown request")

    def _drained(self, number: int, identity: bytes) -> None:
        workload = self._keeper.workloads.get(identity)
        if workload is None or workload.finished:
            self._answer(number, "")
        else:
            workload.waiters.append(lambda: self._answer(number, ""))

    def _attach(
        self, number: int, flags: int, keys: bytes, identity: bytes, fds: list[int]
    ) -> None:
        streams = [-1, -1, -1]
        wanted = [i for i, bit in enumerate((Wire.STDIN, Wire.STDOUT, Wire.STDERR)) if flags & bit]
        if len(wanted) != len(fds):
            for fd in fds:
                os.close(fd)
            self._answer(number, "gone")
            return
        for place, fd in zip(wanted, fds, strict=True):
            streams[place] = fd

        def done(why: str) -> None:
            if self._attachments.pop(number, None) is not None:
                self._keeper.note_attached()
            self._answer(number, why)

        attachment = Attachment((streams[0], streams[1], streams[2]), keys, done)
        attachment.returns = not flags & Wire.ENGINES
        workload = self._keeper.workloads.get(identity)
        self._attachments[number] = (workload, attachment, identity)
        if workload is None and not flags & Wire.WAIT:
            self._keeper.holder.sync(lambda: self._give_up(number))
        if workload is not None:
            workload.attach(attachment)
        self._keeper.note_attached()

    def attached_to(self) -> list[bytes]:
        """The workload of each attachment, also of those that wait for theirs."""
        return [identity for _, _, identity in self._attachments.values()]

    def adopted(self, workload: Workload) -> None:
        """Connect the attachments that have waited for this workload."""
        for number, (known, attachment, identity) in list(self._attachments.items()):
            if known is None and identity == workload.id:
                self._attachments[number] = (workload, attachment, identity)
                workload.attach(attachment)

    def _give_up(self, number: int) -> None:
        """End an attachment that should not have had to wait, if it still does."""
        found = self._attachments.get(number)
        if found is not None and found[0] is None:
            found[1].finish(self._keeper.loop, "gone")

    def _cancel(self, number: int) -> None:
        found = self._attachments.get(number)
        if found is None:
            return
        workload, attachment, _ = found
        if workload is not None:
            workload.detach(attachment, "detached")
        else:
            attachment.finish(self._keeper.loop, "detached")

    @property
    def closed(self) -> bool:
        """Whether the engine has gone."""
        return self._sock is None


class Keeper:
    """All there is: the holder, the clients, the workloads."""

    def __init__(self, run: str) -> None:
        self.loop = Loop()
        self._lock = journal.lock_alone(f"{run}/keeper.lock")
        # sun_path holds 108 bytes; the descriptor gives the folder a short name.
        self._folder_fd = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.folder = f"/proc/self/fd/{self._folder_fd}"
        self.workloads: dict[bytes, Workload] = {}
        self._clients: list[Client] = []
        self._journal = Journal()
        self._interrupted = self._journal.phase != IDLE
        self._attached = self._journal.attached()
        self._early_exits: set[bytes] = set()
        self._takeover = True
        self._listener: _socket.socket | None = None
        self.holder = HolderLink(self)

    def run(self) -> None:
        """Serve until the holder is gone and nothing is left to do."""
        if not self.holder.connect():
            self.holder_lost()
        while True:
            self.loop.run_once()

    # --- the holder's side -----------------------------------------------------------------

    def adopt(self, identity: bytes, meta: bytes, fds: dict[int, int]) -> None:
        """A new entry, or one of before that this keeper may know already."""
        if not self._takeover:
            self._hear_clients()
        if identity in self.workloads:
            old = self.workloads[identity]
            if not old.finished and not old.lost_holder:
                for fd in fds.values():
                    os.close(fd)
                return
            old.abandon()
        try:
            workload = Workload(
                self.loop,
                self._journal,
                identity,
                parse_options(meta),
                fds,
                self.holder.close_kept,
            )
        except (OSError, ValueError) as error:
            # Its output cannot be kept, but it must not block the workload nor end the keeper.
            complain(f"{identity.decode()}: {error}: its output is not logged")
            options = {**parse_options(meta), "driver": "none", "max_size": "0", "max_file": "1"}
            workload = Workload(
                self.loop, self._journal, identity, options, fds, self.holder.close_kept
            )
        self.workloads[identity] = workload
        if self._takeover:
            workload.held = self._attached.count(identity)
            return  # taken_over() begins, once all are known
        for client in self._clients:
            client.adopted(workload)
        self.note_attached()
        workload.begin()

    def _hear_clients(self) -> None:
        """Take what clients have sent: whoever attached before the launch misses nothing."""
        self._accept()
        for client in list(self._clients):
            client.hear()

    def exited(self, identity: bytes) -> None:
        """A process has ended."""
        workload = self.workloads.get(identity)
        if self._takeover:
            self._early_exits.add(identity)
        elif workload is not None and not workload.finished and not workload.exited:
            workload.process_exited()

    def taken_over(self) -> None:
        """The holder has told all: finish what was interrupted, begin, let clients in."""
        if not self._takeover:
            return
        self._takeover = False
        if self._interrupted:
            workload = self.workloads.get(self._journal.found()[0])
            if workload is not None:
                workload.recover()
            else:
                self._journal.finish()
        for workload in list(self.workloads.values()):
            if workload.held:
                workload.hold(workload.held, REATTACH_S)
            else:
                workload.begin()
        for identity in self._early_exits:
            self.exited(identity)
        self._early_exits.clear()
        if self._listener is None:
            self._listen()

    def holder_lost(self) -> None:
        """The holder has died; its workloads go on. Look for the next one."""
        for workload in list(self.workloads.values()):
            workload.lost_holder = True
            if not workload.finished:
                workload.begin()
        if self._listener is None:
            self.taken_over()
        self.loop.after(_RECONNECT_S, self._reconnect)
        self.loop.after(_IDLE_S, self._end_if_useless)

    def _reconnect(self) -> None:
        if not self.holder.connected and not self.holder.connect():
            self.loop.after(_RECONNECT_S, self._reconnect)

    def _end_if_useless(self) -> None:
        if self.holder.connected:
            return
        if all(w.finished for w in self.workloads.values()):
            sys.exit(0)
        self.loop.after(_IDLE_S, self._end_if_useless)

    # --- the clients' side -----------------------------------------------------------------

    def _listen(self) -> None:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        fresh = f"{self.folder}/keeper.sock.{os.getpid()}"
        sock.bind(fresh)
        os.chmod(fresh, 0o600)
        sock.listen(16)
        sock.setblocking(False)
        os.rename(fresh, f"{self.folder}/keeper.sock")
        self._listener = sock
        self.loop.watch(sock.fileno(), READ, lambda _: self._accept())

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
            except OSError:
                return
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fileno=fd)
            self._clients = [c for c in self._clients if not c.closed]
            self._clients.append(Client(self, sock))

    def note_attached(self) -> None:
        """Tell the journal who is attached, so that the next keeper waits for them."""
        ids = [identity for client in self._clients for identity in client.attached_to()]
        for workload in self.workloads.values():
            # Those that a keeper before this one had, and that are not back yet.
            ids += [workload.id] * (workload.held - len(workload.attachments))
        self._journal.note_attached(ids)

    def release(self, identity: bytes) -> None:
        """Forget a workload, whatever its state."""
        workload = self.workloads.pop(identity, None)
        if workload is not None and not workload.finished:
            workload.abandon()


def main(argv: list[str]) -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o022)
    for fd in (
        journal.JOURNAL_FD,
        journal.STAGING_FD,
        journal.TRANSIT_OUT_FD,
        journal.TRANSIT_IN_FD,
    ):
        os.set_inheritable(fd, False)
    Keeper(argv[1]).run()


if __name__ == "__main__":
    main(sys.argv)
