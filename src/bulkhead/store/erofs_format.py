"""EROFS on disk: the subset that our writer makes and our reader reads.

4 KiB blocks, extended (64-byte) inodes, FLAT_PLAIN and FLAT_INLINE bodies, inline and shared
attributes; no compression, chunks, 48-bit or long-prefix features, so that Linux 5.4 to today can
read it. Structures: fs/erofs/erofs_fs.h.

    block 0   1024 superblock (128 bytes, crc32c over the rest of the block)
              1152 root inode, its attributes and, if it fits, its entries
    then      bodies of files, 4 KiB aligned, as they streamed in; between them clusters of
              inodes (64-byte aligned) with attributes and inlined tails; at the end
              directories and shared attributes

`meta_blkaddr` is 0, so a nid is simply an inode's offset in the file divided by 32.
"""

import struct
from functools import cache

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
MAGIC = 0xE0F5E1E2
SUPER_OFFSET = 1024
ROOT_OFFSET = SUPER_OFFSET + 128
SLOT = 32
INODE_SIZE = 64
COMPAT_CHECKSUM = 1
COMPAT_MTIME = 2
FLAT_PLAIN = 0
FLAT_INLINE = 2
NO_BLOCK = 0xFFFFFFFF

FT_REGULAR, FT_DIRECTORY, FT_CHAR, FT_BLOCK, FT_FIFO, FT_SOCKET, FT_SYMLINK = range(1, 8)

S_IFMT_OF = {
    FT_REGULAR: 0o100000,
    FT_DIRECTORY: 0o040000,
    FT_CHAR: 0o020000,
    FT_BLOCK: 0o060000,
    FT_FIFO: 0o010000,
    FT_SOCKET: 0o140000,
    FT_SYMLINK: 0o120000,
}

SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24s")
"""magic checksum compat blkszbits extslots root_nid inos build_s build_ns blocks meta_blkaddr
xattr_blkaddr uuid volume incompat algs devices slotoff dirblkbits prefixes prefix_start packed_nid
(filter, reserved)"""
INODE = struct.Struct("<HHHHQIIIIqII16x")
"""format xattr_icount mode reserved size u ino uid gid mtime mtime_ns nlink"""
NLINK_AT = 44
DIRENT = struct.Struct("<QHBB")
XATTR_HEADER = struct.Struct("<IB7x")
XATTR_ENTRY = struct.Struct("<BBH")

XATTR_PREFIXES: tuple[tuple[bytes, int, bool], ...] = (
    (b"user.", 1, False),
    (b"system.posix_acl_access", 2, True),
    (b"system.posix_acl_default", 3, True),
    (b"trusted.", 4, False),
    (b"security.", 6, False),
)
"""(prefix or whole name, index on disk, whether it is a whole name)."""

XATTR_NAMES = {index: prefix for prefix, index, _ in XATTR_PREFIXES}


def format_of(layout: int) -> int:
    """`i_format` of an extended inode with this body layout."""
    return 1 | layout << 1


def pack_device(major: int, minor: int) -> int:
    """A device number as the kernel's new_encode_dev(): 12 bits major, 20 bits minor."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def unpack_device(packed: int) -> tuple[int, int]:
    """(major, minor) of new_encode_dev()'s result."""
    return (packed & 0xFFF00) >> 8, (packed & 0xFF) | (packed >> 12 & 0xFFF00)


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes, value: int = 0xFFFFFFFF) -> int:
    """The kernel's crc32c(): Castagnoli, seeded, not inverted at the end."""
    table = _crc_table()
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value


def super_checksum(block: bytes) -> int:
    """Checksum of block 0, computed with the field itself zero."""
    area = bytearray(block[SUPER_OFFSET:BLOCK_SIZE])
    area[4:8] = bytes(4)
    return crc32c(bytes(area))


def xattr_entry(name: bytes, value: bytes) -> bytes | None:
    """One attribute as stored, padded to 4 bytes; None if EROFS has no way to name it."""
    for prefix, index, whole in XATTR_PREFIXES:
        if name == prefix if whole else name.startswith(prefix):
            suffix = name[len(prefix) :]
            entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
            return entry + bytes(-len(entry) % 4)
    return None
