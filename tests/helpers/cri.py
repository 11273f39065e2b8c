"""The container runtime interface of Kubernetes, as kubelet speaks it to containerd.

The few messages that the tests need, written by field number: `{1: "name", 4: {1: 7}}`, a list for
what is repeated; k8s.io/cri-api, runtime/v1/api.proto. grpc carries the bytes.
"""

from pathlib import Path
from typing import Any

import grpc

Message = dict[int, Any]
_TIMEOUT_S = 300
RUNNING, EXITED = 1, 2
NODE = 2
"""NamespaceMode: the node's own network, so that no network plug-in is needed."""


def encode(message: Message) -> bytes:
    """A message in protocol buffers' wire format."""
    return b"".join(_field(number, value) for number, value in message.items())


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: Any) -> bytes:
    if isinstance(value, list):
        return b"".join(_field(number, one) for one in value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = encode(value) if isinstance(value, dict) else value
    data = data.encode() if isinstance(data, str) else data
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def decode(data: bytes) -> Message:
    """The fields of a message, the last of each number; those with a length are bytes."""
    found: Message = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            found[key >> 3] = varint()
        elif key & 7 == 2:
            size = varint()
            found[key >> 3] = data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {key & 7}")
    return found


class Cri:
    """One connection, and one pod's configuration, as kubelet keeps it."""

    def __init__(self, socket: Path, handler: str, logs: Path, cgroup: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._handler = handler
        self.pod: Message = {
            1: {1: "pod", 2: "uid", 3: "default", 4: 0},
            3: str(logs),
            8: {1: cgroup, 2: {1: {1: NODE}}},
        }
        self._attempt = 0

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, method: str, message: Message) -> Message:
        """One call of the RuntimeService; grpc.RpcError."""
        call: Any = self._channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")
        return decode(call(encode(message), timeout=_TIMEOUT_S))

    def sandbox(self) -> str:
        """Run the pod's sandbox; its id."""
        answer = self.call("RunPodSandbox", {1: self.pod, 2: self._handler})
        return str(answer[1], "ascii")

    def create(
        self, sandbox: str, command: list[str], *, memory: int = 0, tty: bool = False
    ) -> str:
        """A further container of the pod; its id. Its log is N.log, counted from 1."""
        self._attempt += 1
        namespaces = {3: {1: NODE}}
        config: Message = {
            1: {1: "one", 2: self._attempt},
            2: {1: "docker.io/library/busybox:latest"},
            3: command,
            11: f"{self._attempt}.log",
            14: int(tty),
            15: {1: {4: memory}, 2: namespaces},
        }
        answer = self.call("CreateContainer", {1: sandbox, 2: config, 3: self.pod})
        return str(answer[1], "ascii")

    def status(self, container: str) -> tuple[int, int]:
        """(state, exit code)."""
        found = decode(self.call("ContainerStatus", {1: container})[1])
        return found.get(3, 0), found.get(7, 0)

    def execute(self, container: str, *command: str) -> tuple[int, str, str]:
        """ExecSync: (exit code, standard output, standard error)."""
        answer = self.call("ExecSync", {1: container, 2: list(command), 3: 120})
        out, err = (answer.get(number, b"").decode() for number in (1, 2))
        return answer.get(3, 0), out, err

    def memory(self, container: str) -> int:
        """Bytes in use, by ContainerStats."""
        stats = decode(self.call("ContainerStats", {1: container})[1])
        value: int = decode(decode(stats[3])[2])[1]
        return value
