"""Boot partitions, partition tables and seeds, read back by readers of our own."""

import io
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from bulkhead.errors import Invalid
from bulkhead.machines import fat, gpt, seed


def chain(table: bytes, first: int) -> list[int]:
    found = []
    while 2 <= first < 0xFFF8:
        found.append(first)
        (first,) = struct.unpack_from("<H", table, first * 2)
    return found


def read(data: bytes) -> dict[str, bytes]:
    """Every file of a FAT16 file system by its long path."""
    sector, per, reserved, tables, roots = struct.unpack_from("<HBHBH", data, 11)
    (size,) = struct.unpack_from("<H", data, 22)
    table = data[reserved * sector :][: size * sector]
    assert table == data[(reserved + size) * sector :][: size * sector]
    root = (reserved + tables * size) * sector
    first = root + roots * 32

    def contents(number: int) -> bytes:
        parts = (first + (one - 2) * per * sector for one in chain(table, number))
        return b"".join(data[at : at + per * sector] for at in parts)

    def walk(entries: bytes, above: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        long = ""
        for at in range(0, len(entries), 32):
            entry = entries[at : at + 32]
            if entry[0] == 0:
                break
            if entry[11] == 0x0F:
                units = entry[1:11] + entry[14:26] + entry[28:32]
                part = units.decode("utf-16-le").partition("\0")[0].rstrip("\uffff")
                long = part + long
                continue
            name = (
                long
                or b".".join(
                    one.strip() for one in (entry[:8], entry[8:11]) if one.strip()
                ).decode()
            )
            long = ""
            number, length = struct.unpack_from("<HI", entry, 26)
            if entry[11] & 0x08 or name in (".", ".."):
                continue
            if entry[11] & 0x10:
                found |= walk(contents(number), f"{above}{name}/")
            else:
                found[above + name] = contents(number)[:length]
        return found

    return walk(data[root:first], "")


FILES = {
    "EFI/BOOT/BOOTX64.EFI": bytes(range(256)) * 300,
    "loader/entries/debian-6.1.0-cloud-amd64.conf": b"title x\n",
    "loader/loader.conf": b"",
    "a name of more than twenty-six characters": b"long",
    "user-data": b"#cloud-config\n",
}


def test_a_file_system_has_its_files() -> None:
    out = io.BytesIO()
    fat.write(out, FILES, size=8 << 20, label="EFI", serial=7, moment=1_700_000_000)
    assert len(out.getvalue()) == 8 << 20
    assert read(out.getvalue()) == FILES


def test_it_may_begin_anywhere_and_depends_on_nothing_else() -> None:
    made = []
    for _ in range(2):
        out = io.BytesIO()
        fat.write(out, FILES, size=8 << 20, label="X", serial=1, moment=1, offset=1 << 20)
        made.append(out.getvalue())
    assert made[0] == made[1]
    assert made[0][: 1 << 20].count(0) == 1 << 20
    assert read(made[0][1 << 20 :]) == FILES


@pytest.mark.parametrize(
    ("files", "size"),
    [({"a": b"x" * (9 << 20)}, 8 << 20), ({"a": b""}, 1 << 20), ({"a:b": b""}, 8 << 20)],
    ids=["too much", "too small", "a bad name"],
)
def test_what_cannot_be_is_refused(files: dict[str, bytes], size: int) -> None:
    with pytest.raises(Invalid):
        fat.write(io.BytesIO(), files, size=size, label="X", serial=1, moment=1)


def test_a_partition_table_and_its_copy() -> None:
    size, identity = 64 << 20, uuid.UUID(int=5)
    part = gpt.Partition(gpt.ESP, uuid.UUID(int=6), "EFI", 1 << 20, 8 << 20)
    out = io.BytesIO()
    out.truncate(size)
    gpt.write(out, size, identity, [part])
    data = out.getvalue()
    assert data[510:512] == b"\x55\xaa"
    for place in (512, size - 512):
        header = bytearray(data[place : place + 92])
        (check,) = struct.unpack_from("<I", header, 16)
        header[16:20] = b"\0" * 4
        assert zlib.crc32(header) == check
        own, other, *_ = struct.unpack_from("<QQ", header, 24)
        assert (own * 512, other * 512) == (place, size - 512 if place == 512 else 512)
        (table,) = struct.unpack_from("<Q", header, 72)
        entries = data[table * 512 :][: 128 * 128]
        assert zlib.crc32(entries) == struct.unpack_from("<I", header, 88)[0]
        assert uuid.UUID(bytes_le=entries[:16]) == gpt.ESP
        assert struct.unpack_from("<QQ", entries, 32) == (2048, 2048 + (8 << 11) - 1)


def test_a_seed(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "seed.img"
    own = seed.Seed("i-1", "web", user="me", keys=["ssh-ed25519 AAAA x"], password='a"b')
    seed.write(str(path), own, uid=path.parent.stat().st_uid)
    data = path.read_bytes()
    assert data[43:54].rstrip() == b"cidata"
    files = read(data)
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": "i-1", "local-hostname": "web"}
    told = yaml.safe_load(files["user-data"])
    assert told["password"] == 'a"b'
    assert told["ssh_authorized_keys"] == ["ssh-ed25519 AAAA x"]
    assert files["user-data"].startswith(b"#cloud-config\n")
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "given",
    [
        seed.Seed("i", "x", keys=["no key"]),
        seed.Seed("i", "x", keys=["ssh-rsa A\nruncmd: []"]),
        seed.Seed("i", "x", user_data="hello"),
        seed.Seed("i", "x", user_data="#" * (seed.MOST_BYTES + 1)),
    ],
    ids=["key", "two lines", "no mark", "too long"],
)
def test_what_cloud_init_would_not_read_is_refused(given: seed.Seed) -> None:
    with pytest.raises(Invalid):
        seed.check(given)
