"""The engine's side of network/helper.py: hands it sockets and records, without ever waiting."""

import contextlib
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from bulkhead.home import Home
from bulkhead.network.attached import Attached

NAME = "network"
_MOST = 200
"""Descriptors in one message; the kernel takes 253."""

Roles = Sequence[tuple[str, socket.socket]]


class HelperLink:
    """Messages wait here, in order, while the helper is not there."""

    def __init__(self, home: Home) -> None:
        self._run = home.run
        self._path = home.in_run("network", "helper.sock")
        self._peer: socket.socket | None = None
        self._waiting: deque[tuple[str, bytes, list[socket.socket]]] = deque()

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
        parts = [sockets[start : start + _MOST] for start in range(0, len(sockets), _MOST)]
        for part in parts or [()]:
            head = json.dumps({"op": "set", "id": identity, "roles": [role for role, _ in part]})
            message = f'{head[:-1]}, "record": {record}}}'
            self._waiting.append((identity, message.encode(), [one for _, one in part]))
        self.flush()

    def started(self, workload_id: str, pid: int) -> None:
        """The workload runs as `pid`."""
        self._tell(workload_id, {"op": "started", "id": workload_id, "pid": pid})

    def drop(self, workload_id: str) -> None:
        """Serve it no more; what waits about it need not be sent."""
        kept = deque(one for one in self._waiting if one[0] != workload_id)
        for identity, _, sockets in self._waiting:
            if identity == workload_id:
                for one in sockets:
                    one.close()
        self._waiting = kept
        self._tell(workload_id, {"op": "drop", "id": workload_id})

    def _tell(self, workload_id: str, message: dict[str, Any]) -> None:
        self._waiting.append((workload_id, json.dumps(message).encode(), []))
        self.flush()

    def flush(self) -> bool:
        """Hand over what waits, if the helper is there; whether nothing waits any more."""
        for _ in range(2):
            try:
                while self._waiting:
                    peer = self._connected()
                    _, data, sockets = self._waiting[0]
                    socket.send_fds(peer, [data], [one.fileno() for one in sockets])
                    self._waiting.popleft()
                    for one in sockets:
                        one.close()
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
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def forget(self) -> None:
        """The helper is to end: nothing waits, its socket's file goes."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        """Close the connection and the sockets that were not handed over."""
        self._disconnect()
        while self._waiting:
            for one in self._waiting.popleft()[2]:
                one.close()
