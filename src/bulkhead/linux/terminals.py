"""Pseudo-terminals: ioctl numbers and structures. See ioctl_tty(2)."""

import struct

TIOCSCTTY = 0x540E
TIOCSWINSZ = 0x5414
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441

UNLOCKED = struct.pack("=i", 0)
"""TIOCSPTLCK's argument."""


def window_size(rows: int, columns: int) -> bytes:
    """struct winsize, in characters."""
    return struct.pack("=4H", rows & 0xFFFF, columns & 0xFFFF, 0, 0)
