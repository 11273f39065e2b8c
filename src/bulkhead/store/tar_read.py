"""A strict streaming reader of tar: ustar, PAX, GNU and v7, with every sparse format.

Where readers differ it follows Go's archive/tar, as that is what registries' other clients use: the
sizes of links, directories and devices are ignored, GNU long names win over PAX paths, global PAX
headers are ignored. Anything doubtful raises `Invalid`: no guess is made about hostile input.

Every byte that is not a member's body is handed to `literal` in stream order, so that a recipe can
give the exact archive back. See tar(5), pax(1), "GNU tar: Sparse Formats".
"""

import struct
from collections.abc import Callable, Iterator

from bulkhead.errors import Invalid
from bulkhead.store.limits import DEFAULT, Limits

BLOCK = 512
REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_ZERO = bytes(BLOCK)
_REGULAR_FLAGS = frozenset((b"0", b"\0", b"7", b"S"))
_KINDS = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_U32_MAX = (1 << 32) - 2
_TIME_MAX = 1 << 62


def show(name: bytes) -> str:
    """`name` for an error message: quoted, control characters escaped, cut to 200 characters."""
    text = repr(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 200 else text[:197] + "...'"


class ByteSource:
    """Bytes from an iterator of chunks: taken exactly, or viewed without copying."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._at = 0
        self.consumed = 0

    def _more(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._buffer, self._at = chunk, 0
                return True
        self._buffer, self._at = b"", 0
        return False

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes, or fewer if the stream ends first."""
        end = self._at + count
        if end <= len(self._buffer):
            piece = self._buffer[self._at : end]
            self._at = end
            self.consumed += count
            return piece
        return b"".join(self.views(count))

    def views(self, count: int) -> Iterator[memoryview]:
        """Views that together are `count` bytes; fewer if the stream ends first."""
        while count:
            have = len(self._buffer) - self._at
            if not have:
                if not self._more():
                    return
                have = len(self._buffer)
            size = have if have < count else count
            view = memoryview(self._buffer)[self._at : self._at + size]
            self._at += size
            self.consumed += size
            count -= size
            yield view


class Entry:
    """One member: its attributes, and how many body bytes (`stored`) follow in the stream.

    `name` and `link` are the raw bytes of the archive. `size` is the file's size; with `sparse`,
    a list of (offset, length) of its data, it exceeds `stored`.
    """

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime", "mtime_ns", "name",
        "size", "sparse", "stored", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, name: bytes, kind: bytes) -> None:
        self.name = name
        self.kind = kind
        self.mode = self.uid = self.gid = self.size = self.stored = 0
        self.mtime = self.mtime_ns = self.major = self.minor = 0
        self.link = b""
        self.xattrs: dict[bytes, bytes] | None = None
        self.sparse: list[tuple[int, int]] | None = None


def number(field: bytes, what: str, name: bytes) -> int:
    """A header's numeric field: octal text, or GNU base-256; Invalid if it is neither."""
    text = field.strip(b" \0")
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            raise Invalid(f"archive member {show(name)}: {what} is not an octal number") from None
    first = field[0]
    if first & 0x80:
        value = int.from_bytes(field, "big", signed=False) & ((1 << (8 * len(field) - 1)) - 1)
        if first & 0x40:
            value -= 1 << (8 * len(field) - 1)
        return value
    text = text.partition(b"\0")[0].rstrip(b" ")
    if not text:
        return 0
    if not text.isdigit():
        raise Invalid(f"archive member {show(name)}: {what} is not a number")
    try:
        return int(text, 8)
    except ValueError:
        raise Invalid(f"archive member {show(name)}: {what} is not an octal number") from None


def pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The (key, value) pairs of an extended header, pax(1): "LENGTH KEY=VALUE\\n" each."""
    records: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            raise Invalid("extended header: a record has no length")
        end = at + int(digits)
        if end <= space + 1 or end > len(data) or data[end - 1] != 0x0A:
            raise Invalid("extended header: a record's length is wrong")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise Invalid("extended header: a record is not KEY=VALUE")
        records.append((key, value))
        at = end
    return records


def _decimal(value: bytes, what: str, name: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise Invalid(f"archive member {show(name)}: {what} is not a number")
    return int(value)


def pax_time(value: bytes, name: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds (floored) of a PAX time such as "-1.25"."""
    whole, _, fraction = value.partition(b".")
    negative = whole.startswith(b"-")
    digits = whole[1:] if negative else whole
    fraction = fraction[:9]
    if not (digits.isdigit() and len(digits) <= 19) or not (fraction.isdigit() or not fraction):
        raise Invalid(f"archive member {show(name)}: its time is not a number")
    total = int(digits) * 10**9 + int(fraction.ljust(9, b"0"))
    seconds, nanoseconds = divmod(-total if negative else total, 10**9)
    return seconds, nanoseconds


def _check_sparse(pairs: list[tuple[int, int]], size: int, stored: int, name: bytes) -> None:
    """Ordered, without overlap, within `size`, and exactly `stored` bytes of data."""
    end = total = 0
    for offset, length in pairs:
        if offset < end:
            raise Invalid(f"archive member {show(name)}: its sparse map overlaps")
        end = offset + length
        total += length
    if end > size or total != stored:
        raise Invalid(f"archive member {show(name)}: its sparse map does not fit its size")


class TarReader:
    """Iterates over the members of the archive in `source`.

    The caller must consume exactly `entry.stored` bytes from `source` before the next iteration.
    """

    def __init__(
        self, source: ByteSource, literal: Callable[[bytes], None], limits: Limits = DEFAULT
    ) -> None:
        self._source = source
        self._literal = literal
        self._limits = limits

    def _block(self) -> bytes:
        """One 512-byte block, recorded; b"" at the end of the stream."""
        block = self._source.take(BLOCK)
        if block and len(block) != BLOCK:
            raise Invalid("the archive ends within a header")
        self._literal(block)
        return block

    def _special(self, size: int) -> bytes:
        """The body of an extended header or long name, recorded with its padding."""
        if not 0 <= size <= self._limits.header_bytes:
            raise Invalid(
                f"an extended header of {size} bytes exceeds the limit of "
                f"{self._limits.header_bytes}"
            )
        padded = self._source.take(-(-size // BLOCK) * BLOCK)
        if len(padded) < size:
            raise Invalid("the archive ends within an extended header")
        self._literal(padded)
        return padded[:size]

    def _end(self) -> None:
        """After the first zero block: only zeros may follow."""
        if any(self._block()):
            raise Invalid("the archive has a lone zero block before further members")
        while piece := self._source.take(64 * 1024):
            if piece.count(0) != len(piece):
                raise Invalid("the archive has data after its end")
            self._literal(piece)

    def __iter__(self) -> Iterator[Entry]:
        source = self._source
        pax: list[tuple[bytes, bytes]] | None = None
        long_name = long_link = b""
        while block := self._block():
            if block == _ZERO:
                if pax is not None or long_name or long_link:
                    raise Invalid("the archive ends after an extended header")
                self._end()
                return
            fields = _HEADER.unpack(block)
            self._checksum(block, fields)
            flag = fields[7]
            if flag in b"xgXLK":
                body = self._special(number(fields[4], "size", fields[0]))
                if flag == b"L":
                    long_name = body.partition(b"\0")[0]
                elif flag == b"K":
                    long_link = body.partition(b"\0")[0]
                elif flag != b"g":
                    pax = pax_records(body)
                continue
            entry = self._entry(fields, block, pax, long_name, long_link)
            pax, long_name, long_link = None, b"", b""
            expected = source.consumed + entry.stored
            yield entry
            if source.consumed != expected:
                raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
            if padding := -entry.stored % BLOCK:
                zeros = source.take(padding)
                self._literal(zeros)
                if len(zeros) < padding:
                    raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
        if pax is not None or long_name or long_link:
            raise Invalid("the archive ends after an extended header")

    @staticmethod
    def _checksum(block: bytes, fields: tuple[bytes, ...]) -> None:
        want = number(fields[6], "checksum", fields[0].partition(b"\0")[0])
        have = sum(block) - sum(fields[6]) + 256
        if want != have:
            signed = have - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
            if want != signed:
                raise Invalid("not a tar header: its checksum is wrong")

    def _entry(
        self,
        fields: tuple[bytes, ...],
        block: bytes,
        pax: list[tuple[bytes, bytes]] | None,
        long_name: bytes,
        long_link: bytes,
    ) -> Entry:
        name = fields[0].partition(b"\0")[0]
        magic = fields[9]
        if magic[:6] == b"ustar\0":
            prefix = fields[14].partition(b"\0")[0]
            if prefix:
                name = prefix + b"/" + name
        entry = Entry(name, fields[7])
        entry.mode = number(fields[1], "mode", name) & 0o7777
        entry.uid = number(fields[2], "uid", name)
        entry.gid = number(fields[3], "gid", name)
        entry.size = number(fields[4], "size", name)
        entry.mtime = number(fields[5], "mtime", name)
        entry.link = fields[8].partition(b"\0")[0]
        if entry.kind in (CHAR, BLOCK_DEVICE):
            entry.major = number(fields[12], "device", name)
            entry.minor = number(fields[13], "device", name)
        sparse_version = self._merge(entry, pax) if pax else b""
        if long_name:
            entry.name = long_name
        if long_link:
            entry.link = long_link
        self._finish(entry, block, pax, sparse_version)
        return entry

    def _merge(self, entry: Entry, pax: list[tuple[bytes, bytes]]) -> bytes:
        """Apply PAX records; returns which sparse format they tell of: "", "0" or "1"."""
        version = b""
        name = entry.name
        total = 0
        for key, value in pax:
            if key == b"path" and value:
                entry.name = value
            elif key == b"linkpath" and value:
                entry.link = value
            elif key == b"size" and value:
                entry.size = _decimal(value, "size", name)
            elif key == b"uid" and value:
                entry.uid = _decimal(value, "uid", name)
            elif key == b"gid" and value:
                entry.gid = _decimal(value, "gid", name)
            elif key == b"mtime" and value:
                entry.mtime, entry.mtime_ns = pax_time(value, name)
            elif key.startswith(b"SCHILY.xattr."):
                total += len(key) + len(value)
                if total > self._limits.xattr_bytes:
                    raise Invalid(f"archive member {show(name)}: too many extended attributes")
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[13:]] = value
            elif key.startswith(b"GNU.sparse."):
                if key == b"GNU.sparse.major":
                    version = b"1" if value == b"1" else version
                elif not version:
                    version = b"0"
        if version:
            for key, value in pax:
                if key == b"GNU.sparse.name" and value:
                    entry.name = value
        return version

    def _finish(
        self,
        entry: Entry,
        block: bytes,
        pax: list[tuple[bytes, bytes]] | None,
        sparse_version: bytes,
    ) -> None:
        """Validate ranges, settle the kind and the body."""
        name = entry.name
        if not name:
            raise Invalid("an archive member has no name")
        if b"\0" in name or b"\0" in entry.link:
            raise Invalid(f"archive member {show(name)}: a NUL in its name")
        if not (0 <= entry.uid <= _U32_MAX and 0 <= entry.gid <= _U32_MAX):
            raise Invalid(f"archive member {show(name)}: its owner is out of range")
        if not -_TIME_MAX < entry.mtime < _TIME_MAX:
            raise Invalid(f"archive member {show(name)}: its time is out of range")
        kind = entry.kind
        if kind in _KINDS:
            entry.size = 0
            return
        if kind not in _REGULAR_FLAGS:
            raise Invalid(f"archive member {show(name)}: unknown type {show(kind)}")
        if not 0 <= entry.size <= self._limits.apparent_bytes:
            raise Invalid(f"archive member {show(name)}: its size {entry.size} is out of range")
        entry.stored = entry.size
        entry.kind = REGULAR
        if kind == b"S":
            self._old_sparse(entry, block)
        elif sparse_version and pax:
            self._pax_sparse(entry, pax, sparse_version)
        elif name.endswith(b"/"):
            entry.kind = DIRECTORY

    def _settle_sparse(self, entry: Entry, pairs: list[tuple[int, int]], size: int) -> None:
        if not 0 <= size <= self._limits.apparent_bytes:
            raise Invalid(f"archive member {show(entry.name)}: its size {size} is out of range")
        _check_sparse(pairs, size, entry.stored, entry.name)
        entry.size = size
        entry.sparse = [pair for pair in pairs if pair[1]]

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU's first format: four pairs in the header, further ones in blocks after it."""
        pairs: list[tuple[int, int]] = []

        def collect(area: bytes) -> None:
            for at in range(0, len(area) - 23, 24):
                if not area[at]:
                    return
                offset = number(area[at : at + 12], "sparse offset", entry.name)
                length = number(area[at + 12 : at + 24], "sparse length", entry.name)
                if offset < 0 or length < 0:
                    raise Invalid(f"archive member {show(entry.name)}: negative sparse map")
                pairs.append((offset, length))

        collect(block[386:482])
        more = block[482]
        blocks = 0
        while more:
            extension = self._block()
            if not extension:
                raise Invalid("the archive ends within a sparse map")
            collect(extension[:504])
            more = extension[504]
            blocks += 1
            if blocks * BLOCK > self._limits.header_bytes:
                raise Invalid(f"archive member {show(entry.name)}: its sparse map is too long")
        self._settle_sparse(entry, pairs, number(block[483:495], "size", entry.name))

    def _pax_sparse(self, entry: Entry, pax: list[tuple[bytes, bytes]], version: bytes) -> None:
        """GNU's PAX formats: 0.0 and 0.1 in the records, 1.0 at the start of the body."""
        size = entry.size
        numbers: list[int] = []
        for key, value in pax:
            if key in (b"GNU.sparse.size", b"GNU.sparse.realsize"):
                size = _decimal(value, "size", entry.name)
            elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                if (len(numbers) % 2 == 1) != (key == b"GNU.sparse.numbytes"):
                    raise Invalid(f"archive member {show(entry.name)}: its sparse map is wrong")
                numbers.append(_decimal(value, "sparse map", entry.name))
            elif key == b"GNU.sparse.map" and value:
                numbers = [_decimal(n, "sparse map", entry.name) for n in value.split(b",")]
        if version == b"1":
            numbers = self._body_map(entry)
        if len(numbers) % 2:
            raise Invalid(f"archive member {show(entry.name)}: its sparse map is wrong")
        self._settle_sparse(entry, list(zip(numbers[::2], numbers[1::2], strict=True)), size)

    def _body_map(self, entry: Entry) -> list[int]:
        """Format 1.0: decimal numbers, one a line, the count of pairs first, padded to a block."""
        text = b""
        count = -1
        while True:
            lines = text.split(b"\n")
            if count < 0 and len(lines) > 1:
                count = _decimal(lines[0], "sparse map", entry.name)
            if count >= 0 and len(lines) > 2 * count + 1:
                return [_decimal(n, "sparse map", entry.name) for n in lines[1 : 2 * count + 1]]
            if len(text) > self._limits.header_bytes or entry.stored < BLOCK:
                raise Invalid(f"archive member {show(entry.name)}: its sparse map is wrong")
            # Read more at a time as the map grows, so that parsing stays linear.
            want = min(max(BLOCK, len(text) // BLOCK * BLOCK), entry.stored // BLOCK * BLOCK)
            want = self._map_blocks(count, lines, want)
            for _ in range(want // BLOCK):
                block = self._block()
                if not block:
                    raise Invalid(f"archive member {show(entry.name)}: the archive ends within it")
                text += block
            entry.stored -= want

    @staticmethod
    def _map_blocks(count: int, lines: list[bytes], want: int) -> int:
        """Never more than the map surely needs: a number takes two bytes or more."""
        if count < 0:
            return BLOCK
        missing = 2 * count + 2 - len(lines)
        return min(want, -(-(2 * missing - 1) // BLOCK) * BLOCK)
