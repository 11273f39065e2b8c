"""What a process gets beside its streams: the caller's descriptors, a listener of system calls.

And what is told of it: a pidfd for --pidfd-socket, the state for a listener (config-linux.md,
"Seccomp": linux.seccomp.listenerPath).
"""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from bulkhead.boundaries.container_process import LISTENER, LISTENER_STATE_MAX
from bulkhead.errors import Invalid, Unavailable
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import VERSION, Seccomp, Spec
from bulkhead.runtime import parent
from bulkhead.runtime.spawner import Spawner

_FIRST, _MOST = 3, 21
_HANDOVER = ("sendmsg",)
"""Calls that the child itself needs after its filter is installed."""


def preserved(count: int) -> Sequence[int]:
    """The caller's descriptors from 3 on (--preserve-fds); Invalid if there are not so many."""
    if not count:
        return ()
    if not 0 < count <= _MOST:
        raise Invalid(f"--preserve-fds {count}: from 0 to {_MOST}")
    parent.current().require_caller("passes descriptors on")
    numbers = range(_FIRST, _FIRST + count)
    for number in numbers:
        try:
            os.fstat(number)
        except OSError:
            raise Invalid(f"--preserve-fds {count}: descriptor {number} is not open") from None
    return numbers


def check_listener(seccomp: Seccomp | None) -> None:
    """Invalid for a filter that notifies nobody, or whose notification could not be set up."""
    if seccomp is None:
        return
    names = {
        name for rule in seccomp.syscalls if rule.action == "SCMP_ACT_NOTIFY" for name in rule.names
    }
    if seccomp.default_action == "SCMP_ACT_NOTIFY":
        raise Invalid("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY is for single calls only")
    if names and not seccomp.listener_path:
        raise Invalid("linux.seccomp: SCMP_ACT_NOTIFY needs listenerPath")
    if seccomp.listener_metadata and not seccomp.listener_path:
        raise Invalid("linux.seccomp.listenerMetadata needs listenerPath")
    for name in _HANDOVER:
        if name in names:
            raise Invalid(f"linux.seccomp: {name} cannot be notified: the notification needs it")


def listener(
    spec: Spec, state: dict[str, object], spawner: Spawner, undo: ExitStack
) -> tuple[int, int]:
    """seam.Bundle.listener for a process that is about to be launched, (-1, -1) without a path.

    `state` is the container's, told with its pid to whoever listens; Unavailable if nobody does.
    """
    seccomp = spec.linux.seccomp
    if seccomp is None or not seccomp.listener_path:
        return -1, -1
    path = seccomp.listener_path
    agent = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        agent.connect(path)
    except OSError as error:
        raise Unavailable(f"linux.seccomp.listenerPath {path}: {error.strerror}") from None
    read, write = os.pipe2(os.O_CLOEXEC)
    reads, writes = OwnedFd(read), OwnedFd(write)
    undo.callback(reads.close)
    undo.callback(writes.close)

    def tell(pid: int, _fd: OwnedFd) -> bool:
        first = state.get("pid") or pid
        told = {
            "ociVersion": VERSION,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": seccomp.listener_metadata,
            "state": state | {"pid": first},
        }
        data = json.dumps(told).encode()
        if len(data) > LISTENER_STATE_MAX:
            raise Invalid(f"linux.seccomp: the state for the listener has {len(data)} bytes")
        os.write(int(writes), data)
        return False

    spawner.notes[LISTENER] = tell
    return agent.fileno(), read


def send_pidfd(path: str, pid: int) -> None:
    """Hand a pidfd of `pid` to whoever listens at `path` (--pidfd-socket); Invalid if nobody."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
        pidfd.open_process(pid) as process,
    ):
        try:
            client.connect(path)
            socket.send_fds(client, [b"pidfd"], [int(process)])
        except OSError as error:
            raise Invalid(f"--pidfd-socket {path}: {error.strerror}") from None
