"""Bounds on what an archive may cost us before it is refused."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one layer archive; a breach raises `Invalid` and leaves nothing behind.

    Sizes are bytes. A tar below `ratio_floor` bytes is never judged by its compression ratio.
    """

    tar_bytes: int = 256 * GIB
    """Uncompressed bytes of the archive."""
    apparent_bytes: int = 1024 * GIB
    """Sum of the sizes of all files, holes included."""
    ratio: int = 500
    """Uncompressed by compressed bytes; deflate cannot exceed about 1030, zstd can by far."""
    ratio_floor: int = 1 * GIB
    entries: int = 4_000_000
    """Archive members and directories they imply."""
    path_bytes: int = 4095
    """PATH_MAX less the terminator, path_resolution(7)."""
    depth: int = 512
    """Components of a path."""
    header_bytes: int = 1 * MIB
    """One extended header or long name."""
    xattr_bytes: int = 128 * KIB
    """All extended attributes of one member."""
    free_bytes: int = 64 * MIB
    """What must stay free on the store's file system."""


DEFAULT = Limits()
