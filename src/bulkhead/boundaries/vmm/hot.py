"""Orders for a microVM that runs: disks put into its empty places, cards connected, its balloon.

Nobody holds a control socket open for it: both ends are in QEMU itself (images.py, templates.py).
The engine takes a copy of one by pidfd_getfd(2) for as long as it has something to say, so that it
may be killed and another go on. Everything blocks, and is for threads. What QEMU answers is
bounded, and is believed no more than the guest.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from bulkhead.boundaries.vmm import images, qemu
from bulkhead.errors import Unavailable, Unsupported
from bulkhead.linux import pidfd
from bulkhead.linux.fds import readable

_ANSWER_S = 20.0
_TURN_S = 120.0
_MAX = 1 << 20
_NAME = "qemu"
_turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
"""Whose turn it is at a machine: two at once would take each other's answers."""


class Control:
    """The control socket of the QEMU in the jail whose first process is `pid`.

    Unsupported for a machine that was booted without one, Unavailable if it has ended.
    """

    def __init__(self, pid: int, fd: int = images.CONTROL_PEER) -> None:
        with pidfd.open_process(_machine(pid)) as process:
            try:
                copy = pidfd.get_descriptor(process, fd)
            except OSError as error:
                raise Unavailable(f"the machine's control socket: {error.strerror}") from error
        try:
            self._socket = socket.socket(fileno=copy.fileno())
        except OSError:
            copy.close()
            raise Unsupported("this machine was booted, not cloned: it has no control") from None
        copy.take()
        self._data = bytearray()
        self._turn = _turns[pid]

    def __enter__(self) -> Self:
        if not self._turn.acquire(timeout=_TURN_S):
            self._socket.close()
            raise Unavailable("the machine is being changed, and that does not end")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._turn.release()

    def execute(self, command: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """QEMU's answer; Unavailable with its words if it refuses or does not answer."""
        mark = os.urandom(8).hex()
        line = json.dumps({"execute": command, "arguments": arguments, "id": mark}).encode() + b"\n"
        try:
            socket.send_fds(self._socket, [line], list(fds), socket.MSG_DONTWAIT)
            answer = self._answer(mark)
        except OSError as error:
            raise Unavailable(f"QEMU: {command}: {error.strerror}") from error
        if "error" in answer:
            found = answer["error"]
            said = found.get("desc", "") if isinstance(found, dict) else found
            raise Unavailable(f"QEMU: {command}: {str(said)[:200]}")
        return answer.get("return")

    def _answer(self, mark: str) -> dict[str, Any]:
        """The message with that mark; others are events, and answers that nobody waited for."""
        deadline = time.monotonic() + _ANSWER_S
        while True:
            while b"\n" in self._data:
                line, _, rest = bytes(self._data).partition(b"\n")
                self._data = bytearray(rest)
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(line)
                    if isinstance(message, dict) and message.get("id") == mark:
                        return message
            left = deadline - time.monotonic()
            if left <= 0 or len(self._data) > _MAX:
                raise Unavailable("QEMU does not answer")
            # The description of the socket is QEMU's too: its mode stays as it is.
            if readable(self._socket.fileno(), left):
                received = self._socket.recv(65536, socket.MSG_DONTWAIT)
                if not received:
                    raise Unavailable("QEMU has ended")
                self._data += received

    # --- disks -----------------------------------------------------------------------------

    def add_disk(self, place: int, disk: qemu.Disk) -> None:
        """Put `disk` into an empty place."""
        node = qemu.disk_node(disk, place)
        self.execute("blockdev-add", **node)
        try:
            self._use(place, node["node-name"])
        except BaseException:
            with contextlib.suppress(Unavailable):
                self._delete(node["node-name"])
            raise

    def remove_disk(self, place: int) -> None:
        """Take it out again; the guest must have let go of it."""
        self._use(place, qemu.empty_name(place))
        self._delete(qemu.disk_name(place))

    def _delete(self, name: str) -> None:
        arguments: dict[str, Any] = {"node-name": name}
        self.execute("blockdev-del", **arguments)

    def _use(self, place: int, name: str) -> None:
        path = f"/machine/peripheral/{qemu.device_name(place)}"
        self.execute("qom-set", path=path, property="drive", value=name)

    # --- cards -----------------------------------------------------------------------------

    def connect_card(self, number: int, tap: int) -> None:
        """Connect spare card `number` with a tap."""
        self.execute("getfd", fds=[tap], fdname=f"tap{number}")
        end, wire = f"tap{number}", f"wire{number}"
        self.execute("netdev_add", type="tap", id=end, fd=f"tap{number}")
        try:
            hub = qemu.hub(number)
            self.execute("netdev_add", type="hubport", id=wire, hubid=hub, netdev=end)
        except BaseException:
            with contextlib.suppress(Unavailable):
                self.execute("netdev_del", id=end)
            raise

    def disconnect_card(self, number: int) -> None:
        """Undo `connect_card`; the tap is closed."""
        self.execute("netdev_del", id=f"wire{number}")
        self.execute("netdev_del", id=f"tap{number}")

    # --- memory ----------------------------------------------------------------------------

    def balloon(self, memory_bytes: int) -> None:
        """Ask the guest to make do with that much; what it gives goes back to the host."""
        self.execute("balloon", value=memory_bytes)

    def memory(self) -> int:
        """Bytes that the guest has now, without what is in the balloon."""
        found = self.execute("query-balloon")
        actual = found.get("actual") if isinstance(found, dict) else None
        if not isinstance(actual, int) or actual < 0:
            raise Unavailable("QEMU: query-balloon: no number")
        return actual


def _machine(pid: int) -> int:
    """The QEMU below the monitor that is process `pid`."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            for child in file.read().split():
                with open(f"/proc/{child}/comm", encoding="utf-8", errors="replace") as name:
                    if name.read().strip().startswith(_NAME):
                        return int(child)
    except OSError as error:
        raise Unavailable(f"the machine has ended: {error.strerror}") from error
    raise Unavailable("the machine has ended")
