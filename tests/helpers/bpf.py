"""An interpreter of seccomp's classic BPF, written from the kernel's documentation alone.

Documentation/networking/filter.rst and seccomp(2). It knows nothing of the compiler.
"""

import struct
from collections.abc import Sequence

_INSTRUCTION = struct.Struct("=HBBI")


def run(program: bytes, number: int, architecture: int, arguments: Sequence[int] = ()) -> int:
    """What the filter returns for one call; AssertionError if the program is malformed."""
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, architecture, 0x1234_5678_9ABC, *words)
    code = list(_INSTRUCTION.iter_unpack(program))
    at = accumulator = 0
    while True:
        operation, jt, jf, k = code[at]
        at += 1
        if operation == 0x20:
            assert k % 4 == 0 and k < len(data)
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif operation == 0x06:
            return int(k)
        elif operation == 0x05:
            at += k
        elif operation == 0x54:
            accumulator &= k
        else:
            true = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[operation]
            at += jt if true else jf
        assert at < len(code), "ran beyond the end"
