"""The guest protocol as bytes (`native/frames.h` is its other description, docs/guest-protocol.md
the words).

Host to guest (`run`, `encode(Type.…)`), for `bulkhead-monitor` to send; guest to host, for tests
and for the engine's connections to the monitor's socket:

    message = run(1, compiled.data, Mode.PIPES, clone_flags=…)   # bytes, one frame or fragments
    for frame in decoder.feed(received): …                        # GuestProtocolError if malformed
    raise failure(frame, compiled.steps)                          # of a FAILED frame

On the stream to a guest frames follow each other; on the monitor's SOCK_SEQPACKET sockets one
packet is one frame (`packets`). In programs run by a guest's init, Fd(0) to Fd(2) are the standard
streams (`STREAMS`), Fd(3) (`CONTEXT`) a pidfd of the process named as `context`.
"""

import enum
import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bulkhead.boundary.failures import launch_failure
from bulkhead.errors import LaunchFailed, Unavailable

VERSION = 1
FRAME_MAX = 65536
"""Bytes of payload of one frame."""
WINDOW = 256 << 10
"""Bytes of one stream that may be under way without credit."""
MESSAGE_MAX = 4 << 20
"""Bytes of a message put together from fragments."""
MORE = 1
STREAMS = ("stdin", "stdout", "stderr")
CONTEXT = 3
MAIN = 1
"""The id of a guest's main process."""

HEADER = struct.Struct("<IBBHII")
_RUN = struct.Struct("<IIIHH")
_HELLO = struct.Struct("<16sQ32s")
_FAILED = struct.Struct("<III")
_REFUSED = 4


class GuestProtocolError(Unavailable):
    """The other side sent what is not a frame, or one that is out of place."""


class Type(enum.IntEnum):
    """Types of frames; those from 64 on are sent by the guest."""

    HELLO = 1
    RUN = 2
    STDIN = 3
    STDIN_EOF = 4
    RESIZE = 5
    SIGNAL = 6
    CREDIT = 7
    READ = 8
    FUSE_MOUNT = 9
    FUSE_REPLY = 10
    SHUTDOWN = 11
    ADOPT = 12
    FUSE_DROP = 13
    MEMBER = 14
    GUEST_HELLO = 64
    STARTED = 65
    FAILED = 66
    DONE = 67
    OUT = 68
    EOF = 69
    EXITED = 70
    DATA = 71
    FUSE = 72
    GUEST_CREDIT = 73
    LOG = 74
    TAKEN = 75


class Mode(enum.IntEnum):
    """How a program runs: to its end in init's own namespaces, or with pipes or a terminal."""

    SETUP = 0
    PIPES = 1
    TERMINAL = 2


Steps = Sequence[str] | Mapping[int, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Frame:
    """One message, put together if it came in fragments."""

    type: int
    id: int = 0
    arg: int = 0
    payload: bytes = b""


def frames(kind: int, identity: int = 0, arg: int = 0, payload: bytes = b"") -> Iterator[bytes]:
    """The message as one frame, or as fragments."""
    at = 0
    while True:
        part = payload[at : at + FRAME_MAX]
        at += len(part)
        more = MORE if at < len(payload) else 0
        yield HEADER.pack(len(part), kind, more, 0, identity, arg & 0xFFFFFFFF) + part
        if not more:
            return


def encode(kind: int, identity: int = 0, arg: int = 0, payload: bytes = b"") -> bytes:
    """The message as bytes for a stream."""
    return b"".join(frames(kind, identity, arg, payload))


def run(
    identity: int,
    program: bytes,
    mode: Mode,
    *,
    clone_flags: int = 0,
    context: int = 0,
    rows: int = 0,
    columns: int = 0,
) -> bytes:
    """Run a launch program as process `identity` (not 0) of the guest."""
    head = _RUN.pack(clone_flags, mode, context, rows & 0xFFFF, columns & 0xFFFF)
    return encode(Type.RUN, identity, 0, head + program)


def run_packets(
    identity: int, program: bytes, mode: Mode, *, context: int = 0, kind: Type = Type.RUN
) -> list[bytes]:
    """Likewise as packets for the monitor's socket, one frame each; `kind`: RUN, or MEMBER."""
    head = _RUN.pack(0, mode, context, 0, 0)
    return list(frames(kind, identity, 0, head + program))


def hello(nonce: bytes, realtime_ns: int, entropy: bytes) -> bytes:
    """Begin: the guest forgets all, sets its clock, stirs in 32 bytes of `entropy`, answers with
    the nonce of 16 bytes.
    """
    return encode(Type.HELLO, 0, VERSION, _HELLO.pack(nonce, realtime_ns, entropy))


def resize(identity: int, rows: int, columns: int) -> bytes:
    """The size of a terminal, in characters."""
    return encode(Type.RESIZE, identity, (rows & 0xFFFF) << 16 | columns & 0xFFFF)


def credit(identity: int, stream: int, size: int) -> bytes:
    """`size` more bytes of output stream 1 or 2 may come."""
    return encode(Type.CREDIT, identity, size, struct.pack("<I", stream))


def fuse_mount(identity: int, target: str, options: str = "") -> bytes:
    """Mount a FUSE file system on the existing directory `target`; `options` as mount(8) takes
    them, beyond those every mount has.
    """
    return encode(Type.FUSE_MOUNT, identity, 0, f"{target}\0{options}\0".encode())


def shutdown(how: int, unmount: Sequence[str]) -> bytes:
    """End everything, unmount those paths in their order, write back, reboot(2) with `how`."""
    return encode(Type.SHUTDOWN, 0, how, b"".join(p.encode() + b"\0" for p in unmount))


def failure(frame: Frame, steps: Steps) -> LaunchFailed:
    """The error that a FAILED frame stands for; `steps` are those of the program, or of several
    by the id of their RUN.
    """
    if isinstance(steps, Mapping):
        steps = steps.get(frame.id, ())
    if len(frame.payload) < _FAILED.size:
        raise GuestProtocolError("the guest's FAILED frame is too short")
    step, kind, no_interpreter = _FAILED.unpack_from(frame.payload)
    text = frame.payload[_FAILED.size :]
    if kind > _REFUSED or frame.arg > 0xFFFF:
        raise GuestProtocolError("the guest's FAILED frame makes no sense")
    if kind == _REFUSED:
        what, _, console = text.decode("utf-8", "replace").partition("\0")
        known = frame.arg in errno.errorcode and not console
        reason = f" ({os.strerror(frame.arg)})" if known else last_words(console)
        message = f"the guest's init refused: {what}{reason}" if frame.id else f"{what}{reason}"
        return LaunchFailed(message, step="run in the guest", errno=frame.arg)
    return launch_failure(kind, step, frame.arg, text, steps, no_interpreter=bool(no_interpreter))


def last_words(console: str) -> str:
    """The last two lines of a guest's console, fit to be shown, as the end of a sentence."""
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in console)
    lines = [line.strip() for line in printable.splitlines() if line.strip()]
    return f"; its console's last words: {' / '.join(lines[-2:])}" if lines else ""


class Decoder:
    """Frames from a stream; memory is bounded by MESSAGE_MAX per message under way."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._parts: dict[tuple[int, int], bytearray] = {}

    def feed(self, data: bytes) -> list[Frame]:
        """The messages that `data` completes."""
        self._data += data
        found: list[Frame] = []
        at = 0
        while len(self._data) - at >= HEADER.size:
            length, kind, flags, zero, identity, arg = HEADER.unpack_from(self._data, at)
            if length > FRAME_MAX or zero or flags & ~MORE:
                raise GuestProtocolError("not a frame of the guest protocol")
            end = at + HEADER.size + length
            if len(self._data) < end:
                break
            payload = bytes(self._data[at + HEADER.size : end])
            at = end
            whole = self._join(kind, identity, payload, more=bool(flags & MORE))
            if whole is not None:
                found.append(Frame(kind, identity, arg, whole))
        del self._data[:at]
        return found

    def _join(self, kind: int, identity: int, payload: bytes, *, more: bool) -> bytes | None:
        parts = self._parts.pop((kind, identity), None)
        if parts is None and not more:
            return payload
        parts = parts if parts is not None else bytearray()
        if len(parts) + len(payload) > MESSAGE_MAX or len(self._parts) >= 64:
            raise GuestProtocolError("a message in fragments is too long")
        parts += payload
        if not more:
            return bytes(parts)
        self._parts[kind, identity] = parts
        return None
