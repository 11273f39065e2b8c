"""The engine's side of network/helper.py: hands it sockets and records, without waiting for it.

What was dropped is asked about once: as long as the helper has not said that it is done, it may
still hold ports, and must not be dismissed (`busy`).
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from bulkhead.home import Home
from bulkhead.linux.fds import readable
from bulkhead.network.attached import Attached

NAME = "network"
_MOST = 200
"""Descriptors in one message; the kernel takes 253."""

Roles = Sequence[tuple[str, socket.socket]]
_SYNC = '{"op": "sync"}'


@dataclass(slots=True)
class _Message:
    """One that waits; `head` lacks its closing brace and the roles of the sockets."""

    workload_id: str
    head: str
    sockets: list[tuple[str, socket.socket]] = field(default_factory=list)

    def encode(self) -> bytes:
        if not self.head.startswith('{"op": "set"'):
            return self.head.encode()
        roles = json.dumps([role for role, _ in self.sockets])
        return f'{self.head[:-1]}, "roles": {roles}}}'.encode()

    def close(self) -> None:
        for _, one in self.sockets:
            one.close()
        self.sockets.clear()


class HelperLink:
    """Messages wait here, in order, while the helper is not there."""

    def __init__(self, home: Home) -> None:
        self._run = home.run
        self._path = home.in_run("network", "helper.sock")
        self._peer: socket.socket | None = None
        self._waiting: deque[_Message] = deque()
        self._unanswered = 0

    @property
    def waiting(self) -> int:
        """How many messages the helper has not been given yet."""
        return len(self._waiting)

    def process(self) -> tuple[str, list[str], dict[str, str]]:
        """What the holder must supervise: name, argv, environment."""
        source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        program = (
            f"import sys; sys.path.insert(0, {source!r}); "
            "from bulkhead.network.helper import main; main(sys.argv[1])"
        )
        return NAME, [sys.executable, "-I", "-S", "-c", program, self._run], {}

    def set(self, attached: Attached, sockets: Roles) -> None:
        """Serve this workload; the sockets are the helper's afterwards and closed here."""
        record = msgspec.json.encode(attached).decode()
        identity = attached.request.workload_id
        wanted = {"udp", "tcp", *(one.role for one in attached.ports)}
        for message in self._waiting:
            if message.workload_id == identity:
                # Ports given up before the helper came to hold them.
                for role, one in list(message.sockets):
                    if role not in wanted:
                        one.close()
                        message.sockets.remove((role, one))
        parts = [sockets[start : start + _MOST] for start in range(0, len(sockets), _MOST)]
        head = f'{{"op": "set", "id": {json.dumps(identity)}, "record": {record}}}'
        for part in parts or [()]:
            self._waiting.append(_Message(identity, head, list(part)))
        self.flush()

    def started(self, workload_id: str, pid: int) -> None:
        """The workload runs as `pid`."""
        self._tell(workload_id, json.dumps({"op": "started", "id": workload_id, "pid": pid}))

    def drop(self, workload_id: str) -> None:
        """Serve it no more; what waits about it need not be sent."""
        for message in self._waiting:
            if message.workload_id == workload_id:
                message.close()
        self._waiting = deque(one for one in self._waiting if one.workload_id != workload_id)
        self._waiting.append(_Message(workload_id, json.dumps({"op": "drop", "id": workload_id})))
        self.synchronise()

    def synchronise(self) -> None:
        """Ask to be told when the helper has done all it was given."""
        self._waiting.append(_Message("", _SYNC))
        self.flush()

    def _tell(self, workload_id: str, message: str) -> None:
        self._waiting.append(_Message(workload_id, message))
        self.flush()

    def flush(self) -> bool:
        """Hand over what waits, if the helper is there; whether nothing waits any more."""
        for _ in range(2):
            try:
                while self._waiting:
                    peer = self._connected()
                    message = self._waiting[0]
                    fds = [one.fileno() for _, one in message.sockets]
                    socket.send_fds(peer, [message.encode()], fds)
                    self._waiting.popleft().close()
                    self._unanswered += message.head is _SYNC
                return True
            except BlockingIOError:
                return False
            except (ConnectionError, FileNotFoundError):
                # It was started anew (try once more at once), or is not there yet.
                self._disconnect()
        return False

    def _connected(self) -> socket.socket:
        if self._peer is None:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                peer.setblocking(False)
                peer.connect(self._path)
            except BaseException:
                peer.close()
                raise
            self._peer = peer
        return self._peer

    def _disconnect(self) -> None:
        self._unanswered = 0
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    @property
    def busy(self) -> bool:
        """Whether a helper is there and has not yet said that it has done all it was told."""
        while self._peer is not None and self._unanswered:
            try:
                answer = self._peer.recv(4096)
            except BlockingIOError:
                return True
            except ConnectionError:
                answer = b""
            if answer:
                self._unanswered -= 1
            else:
                self._disconnect()
        return False

    def settle(self, patience_s: float) -> bool:
        """Wait until the helper has done all it was told; False if it is not there, or too slow."""
        self.synchronise()
        deadline = time.monotonic() + patience_s
        while self.busy:
            left = deadline - time.monotonic()
            if left <= 0 or self._peer is None:
                return False
            readable(self._peer.fileno(), left)
        return self._peer is not None

    def forget(self) -> None:
        """The helper is to end: nothing waits, its socket's file goes."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        """Close the connection and the sockets that were not handed over."""
        self._disconnect()
        while self._waiting:
            self._waiting.popleft().close()
