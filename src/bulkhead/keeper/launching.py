"""A launch on the wire to the holder: the request as bytes, the reply as a result or an error."""

import errno
import os
import signal as signals
import struct

from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    Invalid,
    LaunchFailed,
)
from bulkhead.linux.fds import OwnedFd

MESSAGE = struct.Struct("=IIiI")
_LAUNCH = struct.Struct("=Q10I")
_LAUNCHED = struct.Struct("=qQ")
_FAILURE = struct.Struct("=IIiI")
_STEP, _EXEC, _DIED = 1, 2, 3
_MAX_INLINE = 64 << 10


def encode_request(request: LaunchRequest) -> tuple[tuple[bytes, ...], list[int], list[int]]:
    """(parts after the message head, descriptors, descriptors to close afterwards)."""
    identity, record = request.id.encode(), os.fsencode(request.record)
    uid_map, gid_map = request.uid_map.encode(), request.gid_map.encode()
    fds = [*request.fds, *request.keep]
    close: list[int] = []
    if request.cgroup_fd >= 0:
        fds.append(request.cgroup_fd)
    program = request.program
    if len(program) + len(request.meta) > _MAX_INLINE:
        fd = os.memfd_create("program")
        close.append(fd)
        # A regular file of tmpfs: a write is whole or fails.
        os.write(fd, program)
        fds.append(fd)
        program = b""
    head = _LAUNCH.pack(
        request.clone_flags,
        len(request.fds),
        len(request.keep),
        int(request.cgroup_fd >= 0),
        len(identity),
        len(record),
        len(request.meta),
        len(uid_map),
        len(gid_map),
        len(program),
        0,
    )
    return (head, identity, record, request.meta, uid_map, gid_map, program), fds, close


def decode_reply(request: LaunchRequest, data: bytes, fds: list[int]) -> Launched:
    """What the holder answered: the process, or the error it stands for."""
    _, _, status, _ = MESSAGE.unpack_from(data)
    body = data[MESSAGE.size :]
    if status == 0:
        pid, started = _LAUNCHED.unpack_from(body)
        return Launched(pid, started, OwnedFd(fds[0]) if fds else None)
    if status > 0:
        text = body.decode(errors="replace")
        if status == errno.EEXIST:
            raise Conflict(f"process {request.id} exists already")
        if status == errno.EINVAL:
            raise Invalid(f"launch of {request.id} refused: {text}")
        raise LaunchFailed(f"start of the process: {text}", step="clone", errno=status)
    kind, index, error, no_interpreter = _FAILURE.unpack_from(body)
    step = request.steps[index] if index < len(request.steps) else f"step {index}"
    if kind == _EXEC:
        raise _exec_failure(body[_FAILURE.size :], step, error, bool(no_interpreter))
    if kind == _DIED:
        how = (
            f"was killed by {signals.Signals(error & 127).name}"
            if error & 127
            else f"ended with code {error >> 8}"
        )
        raise LaunchFailed(f"{step}: the process {how}", step=step, errno=0)
    raise LaunchFailed(f"{step}: {os.strerror(error)}", step=step, errno=error)


def _exec_failure(name: bytes, step: str, error: int, no_interpreter: bool) -> LaunchFailed:
    """Docker's words, by which people and clients know these failures."""
    program = name.decode("utf-8", "replace")
    reason = os.strerror(error).lower()
    if error in (errno.ENOENT, errno.ENOTDIR):
        if no_interpreter:
            message = f"exec {program}: {reason} (the interpreter it names is missing)"
        elif "/" in program:
            message = f'exec: "{program}": stat {program}: {reason}'
        else:
            message = f'exec: "{program}": executable file not found in $PATH'
        return CommandNotFound(message, step=step, errno=error)
    if error == errno.ENOEXEC:
        return CommandNotExecutable(f"exec {program}: {reason}", step=step, errno=error)
    if error in (errno.EACCES, errno.EISDIR, errno.EPERM, errno.ETXTBSY):
        return CommandNotExecutable(f'exec: "{program}": {reason}', step=step, errno=error)
    return LaunchFailed(f'exec: "{program}": {reason}', step=step, errno=error)
