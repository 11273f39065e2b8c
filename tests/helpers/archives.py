"""Tar archives made block by block, so that they can be wrong in every way; and layer helpers."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from bulkhead.store.content import ContentStore, Layer
from bulkhead.store.erofs_read import Image

END = bytes(1024)


def checksummed(block: bytes) -> bytes:
    """A header block with its checksum put right."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def block(
    name: bytes,
    flag: bytes = b"0",
    *,
    size: "int | bytes" = 0,
    link: bytes = b"",
    mode: int = 0o644,
    device: tuple[int, int] = (0, 0),
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    mtime: bytes = b"00000000000\0",
) -> bytes:
    """One header; `size` may be the raw field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = (
        name.ljust(100, b"\0")[:100]
        + b"%07o\0" % mode
        + b"0000000\0" * 2
        + field
        + mtime
        + bytes(8)
        + flag
        + link.ljust(100, b"\0")[:100]
        + magic
        + bytes(64)
        + b"%07o\0%07o\0" % device
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    return checksummed(raw)


def padded(data: bytes) -> bytes:
    """`data` filled up to whole blocks."""
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"data", **more: Any) -> bytes:
    """A regular file's header and body."""
    return block(name, size=len(data), **more) + padded(data)


def directory(name: bytes, **more: Any) -> bytes:
    """A directory's header."""
    return block(name, b"5", mode=0o755, **more)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """An extended header for the next member."""
    return raw_pax(b"".join(record(key, value) for key, value in records))


def raw_pax(data: bytes) -> bytes:
    """An extended header with any body."""
    return block(b"PaxHeaders/x", b"x", size=len(data)) + padded(data)


def chunked(data: bytes, size: int = 65536) -> Iterator[bytes]:
    """`data` in chunks."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def ingest(store: ContentStore, data: bytes, **more: Any) -> Layer:
    """Store `data` as a layer."""
    return store.ingest(chunked(data), **more)


def tar_members(members: "list[tuple[tarfile.TarInfo, bytes]]", form: int) -> bytes:
    """An archive written by tarfile."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(layer: Layer) -> dict[bytes, dict[str, Any]]:
    """Everything our reader sees in a layer: path → attributes; `same` groups hard links."""
    found: dict[bytes, dict[str, Any]] = {}
    first: dict[int, bytes] = {}
    with open(layer.path, "rb") as stream:
        image = Image(stream.fileno())
        for path, inode in image.walk():
            kind = stat.S_IFMT(inode.mode)
            item: dict[str, Any] = {
                "mode": inode.mode,
                "owner": (inode.uid, inode.gid),
                "mtime": inode.mtime * 10**9 + inode.mtime_ns,
                "xattrs": image.xattrs(inode),
                "nlink": inode.nlink,
            }
            if kind == stat.S_IFREG:
                item["data"] = b"".join(image.read(inode))
                item["same"] = first.setdefault(inode.nid, path)
            elif kind == stat.S_IFLNK:
                item["link"] = image.link_target(inode)
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                item["device"] = inode.device
            found[path] = item
    return found


def snapshot(store: ContentStore) -> Mapping[str, int]:
    """Every path of the store's directory with its size."""
    found: dict[str, int] = {}
    for base, _, names in os.walk(store.root):
        found[base] = 0
        for name in names:
            path = f"{base}/{name}"
            found[path] = os.lstat(path).st_size
    return found
