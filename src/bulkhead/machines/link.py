"""How commands run in a machine: frames on a virtio port between the engine and the agent inside.

    u32 length of the payload (at most 65536) · u8 kind · u32 channel       little-endian

The host begins with MARK and 16 random bytes; the agent forgets everything and answers with the
same. What either side reads before that is not believed. A channel is one command: RUN (JSON:
argv, tty, rows, columns), then INPUT, INPUT_END and SIGNAL one way, OUTPUT, ERROR and at last EXIT
the other. Of each stream WINDOW bytes may be under way: TAKEN says how many were passed on.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from bulkhead.errors import Invalid

PORT = "bulkhead.engine"
"""The name of the virtio port."""
MARK = bytes.fromhex("8f1e0b7a5c3d4962a1f6d2c49b7e1350")
NONCE = 16
MOST = 65536
WINDOW = 256 << 10
CHANNELS = 64
_HEADER = struct.Struct("<IBI")


class Kind(IntEnum):
    """What a frame is."""

    RUN = 1
    INPUT = 2
    INPUT_END = 3
    SIGNAL = 4
    OUTPUT = 16
    ERROR = 17
    EXIT = 18
    TAKEN = 19


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: Kind
    channel: int
    payload: bytes


def frame(kind: Kind, channel: int, payload: bytes = b"") -> bytes:
    """As it is sent."""
    return _HEADER.pack(len(payload), kind, channel) + payload


def number(value: int) -> bytes:
    """The payload of SIGNAL, EXIT and TAKEN."""
    return struct.pack("<i", value)


def number_in(payload: bytes) -> int:
    """What is in such a payload; Invalid if it is none."""
    if len(payload) != 4:
        raise Invalid("a number of the machine's link has not four bytes")
    value: int = struct.unpack("<i", payload)[0]
    return value


class Splitter:
    """Takes a byte stream apart. `nonce`: only what follows MARK and these bytes counts (host);
    without it every MARK begins anew (agent).
    """

    def __init__(self, nonce: bytes = b"") -> None:
        self._data = bytearray()
        self._nonce = nonce
        self.opening = MARK + nonce
        """What the host begins with."""
        self.greeted = False
        self.greeting = b""
        """The last nonce, for the agent to repeat."""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now; Invalid for one that cannot be."""
        self._data += data
        if not (self._nonce and self.greeted):
            self._greet()
        found: list[Frame] = []
        while self.greeted and len(self._data) >= _HEADER.size:
            size, kind, channel = _HEADER.unpack_from(self._data)
            if size > MOST or kind not in Kind._value2member_map_:
                raise Invalid(f"the machine's link carries a frame of {size} bytes, kind {kind}")
            if len(self._data) < _HEADER.size + size:
                break
            payload = bytes(self._data[_HEADER.size : _HEADER.size + size])
            del self._data[: _HEADER.size + size]
            found.append(Frame(Kind(kind), channel, payload))
        return found

    def _greet(self) -> None:
        wanted = MARK + self._nonce
        place = self._data.rfind(wanted)
        if place < 0:
            if not self.greeted:
                del self._data[: -len(wanted)]
            return
        end = place + len(MARK) + NONCE
        if len(self._data) < end:
            return
        self.greeting = bytes(self._data[place + len(MARK) : end])
        del self._data[:end]
        self.greeted = True
