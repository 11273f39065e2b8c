"""A launch on the wire to the holder: the request as bytes, the reply as a result or an error."""

import errno
import os
import struct

from bulkhead.boundary.failures import launch_failure
from bulkhead.boundary.seam import Launched, LaunchRequest
from bulkhead.errors import Conflict, Invalid, LaunchFailed
from bulkhead.linux.fds import OwnedFd

MESSAGE = struct.Struct("=IIiI")
_LAUNCH = struct.Struct("=Q10I")
_LAUNCHED = struct.Struct("=qQ")
_FAILURE = struct.Struct("=IIiI")
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
    raise launch_failure(
        kind,
        index,
        error,
        body[_FAILURE.size :],
        request.steps,
        no_interpreter=bool(no_interpreter),
    )
