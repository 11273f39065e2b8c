"""Writes tar members deterministically: ustar headers, PAX records only for what ustar cannot hold.

Owners are numbers only (names of the host mean nothing elsewhere), times have nanoseconds.
"""

import stat
from collections.abc import Iterator

BLOCK = 512
END = bytes(2 * BLOCK)
_OCTAL_11 = 8**11
_OCTAL_7 = 8**7
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
HARD_LINK = b"1"


def _record(key: bytes, value: bytes) -> bytes:
    """One PAX record; its length counts its own digits, pax(1)."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """(prefix, name) of a ustar header, or None if it does not fit."""
    if len(name) <= 100:
        return b"", name
    at = name.rfind(b"/", 0, 156)
    if at <= 0 or len(name) - at - 1 > 100 or at + 1 == len(name):
        return None
    return name[:at], name[at + 1 :]


def _ustar(
    name: tuple[bytes, bytes], flag: bytes, mode: int, owner: tuple[int, int], size: int,
    mtime: int, link: bytes, device: tuple[int, int],
) -> bytes:  # fmt: skip
    block = bytearray(
        name[1].ljust(100, b"\0")
        + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, *owner, size, mtime)
        + b"        "
        + flag
        + link.ljust(100, b"\0")
        + b"ustar\x0000"
        + bytes(64)
        + b"%07o\0%07o\0" % device
        + name[0].ljust(155, b"\0")
        + bytes(12)
    )
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime_ns: int,
    *,
    link: bytes = b"",
    hard: bool = False,
    device: tuple[int, int] = (0, 0),
    xattrs: dict[bytes, bytes] | None = None,
) -> bytes:
    """The header blocks of one member; `mode` includes the type, a directory's name ends in "/".

    ValueError for a type tar does not have (a socket).
    """
    kind = stat.S_IFMT(mode)
    flag = HARD_LINK if hard else _TYPES.get(kind)
    if flag is None:
        raise ValueError("tar has no such file type")
    records: list[tuple[bytes, bytes]] = []
    seconds, rest = divmod(mtime_ns, 10**9)
    if rest or not 0 <= seconds < _OCTAL_11:
        records.append((b"mtime", _time(mtime_ns)))
    fields = {b"uid": uid, b"gid": gid}
    for key, value in fields.items():
        if value >= _OCTAL_7:
            records.append((key, b"%d" % value))
            fields[key] = 0
    if size >= _OCTAL_11:
        records.append((b"size", b"%d" % size))
    parts = _split(name)
    if parts is None or not name.isascii():
        records.append((b"path", name))
    if len(link) > 100 or not link.isascii():
        records.append((b"linkpath", link))
    if max(device) >= _OCTAL_7:
        raise ValueError("the device number does not fit a tar header")
    records.extend((b"SCHILY.xattr." + key, value) for key, value in (xattrs or {}).items())
    block = _ustar(
        parts or (b"", name[:100]),
        flag,
        stat.S_IMODE(mode),
        (fields[b"uid"], fields[b"gid"]),
        size if size < _OCTAL_11 else 0,
        min(max(seconds, 0), _OCTAL_11 - 1),
        link[:100],
        device,
    )
    if not records:
        return block
    body = b"".join(_record(key, value) for key, value in sorted(records))
    extended = _ustar((b"", b"PaxHeaders.0/file"), b"x", 0o644, (0, 0), len(body), 0, b"", (0, 0))
    return extended + body + bytes(-len(body) % BLOCK) + block


def _time(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, rest = divmod(abs(nanoseconds), 10**9)
    text = b"%s%d" % (sign, seconds)
    return text + (b".%09d" % rest).rstrip(b"0") if rest else text


def padding(size: int) -> bytes:
    """Zeros that fill up the last block of a body."""
    return bytes(-size % BLOCK)


def member(
    name: bytes, data: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime_ns: int = 0
) -> Iterator[bytes]:
    """A whole small regular file."""
    yield header(name, stat.S_IFREG | mode, uid, gid, len(data), mtime_ns)
    yield data + padding(len(data))
