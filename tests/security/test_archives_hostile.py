"""Hostile and damaged layer archives: refused with one clear line, nothing left in the store."""

import gzip
import os
import random
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import BulkheadError, Corrupt, Invalid
from bulkhead.store.content import ContentStore
from bulkhead.store.limits import Limits
from tests.helpers import archives as a

SMALL = Limits(
    tar_bytes=64 << 20,
    apparent_bytes=128 << 20,
    ratio=100,
    ratio_floor=1 << 20,
    entries=2000,
    depth=64,
    header_bytes=1 << 16,
    xattr_bytes=1 << 15,
)


def _many_records(count: int) -> bytes:
    return a.pax(*((b"comment", b"x" * 50) for _ in range(count)))


def _base256(value: int) -> bytes:
    return (value & ((1 << 96) - 1) | 1 << 95).to_bytes(12, "big")


REFUSED: dict[str, bytes] = {
    "absolute path": a.file(b"/etc/passwd"),
    "absolute path by PAX": a.pax((b"path", b"/etc/passwd")) + a.file(b"ok"),
    "absolute path by GNU long name": a.block(b"././@LongLink", b"L", size=12)
    + a.padded(b"/etc/passwd\0")
    + a.file(b"ok"),
    "absolute prefix": a.file(b"passwd", prefix=b"/etc"),
    "dot-dot": a.file(b"../escape"),
    "dot-dot inside": a.file(b"a/../../escape"),
    "dot-dot harmless": a.file(b"a/../b"),
    "dot-dot directory": a.directory(b".."),
    "dot-dot by PAX": a.pax((b"path", b"a/../../x")) + a.file(b"ok"),
    "dot-dot by prefix": a.file(b"x", prefix=b"a/../.."),
    "symlink swap": a.block(b"d", b"2", link=b"/etc") + a.file(b"d/passwd"),
    "symlink swap, relative": a.block(b"d", b"2", link=b"../../..") + a.file(b"d/passwd"),
    "symlink swap of a directory": a.directory(b"d/")
    + a.block(b"d", b"2", link=b"/etc")
    + a.file(b"d/passwd"),
    "symlink swap of a full directory": a.directory(b"d/")
    + a.file(b"d/x")
    + a.block(b"d", b"2", link=b"/etc"),
    "symlink as parent of a directory": a.block(b"d", b"2", link=b"/") + a.directory(b"d/e/"),
    "symlink as parent of a whiteout": a.block(b"d", b"2", link=b"/") + a.file(b"d/.wh.x"),
    "file as a parent": a.file(b"f") + a.file(b"f/x"),
    "hard link out of the root": a.block(b"l", b"1", link=b"../etc/passwd"),
    "hard link, absolute": a.block(b"l", b"1", link=b"/etc/passwd"),
    "hard link to nothing": a.block(b"l", b"1", link=b"missing"),
    "hard link to a later member": a.block(b"l", b"1", link=b"f") + a.file(b"f"),
    "hard link to a directory": a.directory(b"d") + a.block(b"l", b"1", link=b"d"),
    "hard link through a symlink": a.block(b"s", b"2", link=b"/etc")
    + a.block(b"l", b"1", link=b"s/passwd"),
    "hard link to itself, missing": a.block(b"l", b"1", link=b"l"),
    "hard link onto the root": a.file(b"f") + a.block(b".", b"1", link=b"f"),
    "overlay whiteout device": a.block(b"etc", b"3"),
    "device number out of range": a.block(b"dev", b"3", device=(4096, 1)),
    "block device out of range": a.block(b"dev", b"4", device=(1, 1 << 20)),
    "whiteout of nothing": a.file(b".wh."),
    "whiteout of dot": a.file(b"a/.wh.."),
    "whiteout of dot-dot": a.file(b"a/.wh..."),
    "whiteout as a parent": a.file(b".wh.a/b"),
    "root as a file": a.file(b"./"[:1]),
    "root as a symlink": a.block(b"./", b"2", link=b"/etc"),
    "no name": a.file(b""),
    "long component": a.pax((b"path", b"x" * 256)) + a.file(b"ok"),
    "long component of a parent": a.pax((b"path", b"x" * 256 + b"/y")) + a.file(b"ok"),
    "long path": a.pax((b"path", b"x/" * 2100)) + a.directory(b"ok"),
    "deep path": a.pax((b"path", b"x/" * 65)) + a.directory(b"ok"),
    "NUL in a PAX path": a.pax((b"path", b"a\0b")) + a.file(b"ok"),
    "NUL in a PAX link": a.pax((b"linkpath", b"a\0b")) + a.block(b"l", b"2", link=b"x"),
    "empty symlink": a.block(b"l", b"2"),
    "endless symlink": a.pax((b"linkpath", b"x" * 4096)) + a.block(b"l", b"2", link=b"x"),
    "negative size": a.block(b"f", size=_base256(-1)),
    "size not octal": a.block(b"f", size=b"99999999999\0"),
    "size not a number": a.block(b"f", size=b"-0000000001\0"),
    "huge size": a.block(b"f", size=_base256(1 << 62)),
    "size beyond the limit": a.block(b"f", size=_base256(1 << 30)),
    "PAX size beyond the stream": a.pax((b"size", b"100000")) + a.file(b"f"),
    "PAX size negative": a.pax((b"size", b"-1")) + a.file(b"f"),
    "PAX size huge": a.pax((b"size", b"9" * 30)) + a.file(b"f"),
    "PAX uid out of range": a.pax((b"uid", b"4294967295")) + a.file(b"f"),
    "PAX time not a number": a.pax((b"mtime", b"nan")) + a.file(b"f"),
    "PAX time huge": a.pax((b"mtime", b"9" * 19)) + a.file(b"f"),
    "PAX length wrong": a.raw_pax(b"99 path=x\n") + a.file(b"f"),
    "PAX length zero": a.raw_pax(b"0 path=x\n") + a.file(b"f"),
    "PAX length huge": a.raw_pax(b"9" * 19 + b" path=x\n") + a.file(b"f"),
    "PAX without a length": a.raw_pax(b"path=x\n") + a.file(b"f"),
    "PAX without equals": a.raw_pax(b"8 pathx\n") + a.file(b"f"),
    "PAX bomb": _many_records(2000) + a.file(b"f"),
    "PAX size field lies": a.block(b"x", b"x", size=_base256(1 << 40)) + a.file(b"f"),
    "PAX at the end": a.pax((b"path", b"x")),
    "long name at the end": a.block(b"././@LongLink", b"L", size=2) + a.padded(b"x\0"),
    "xattr bomb": a.pax((b"SCHILY.xattr.user.x", b"x" * 40000)) + a.file(b"f"),
    "xattr without a space": a.pax((b"SCHILY.xattr.x", b"x")) + a.file(b"f"),
    "xattr without a name": a.pax((b"SCHILY.xattr.user.", b"x")) + a.file(b"f"),
    "too many xattrs": a.pax(*((b"SCHILY.xattr.user.%d" % n, b"") for n in range(300)))
    + a.file(b"f"),
    "ACL malformed": a.pax((b"SCHILY.xattr.system.posix_acl_access", b"\2\0\0\0junk"))
    + a.file(b"f"),
    "ACL out of order": a.pax(
        (
            b"SCHILY.xattr.system.posix_acl_access",
            b"\2\0\0\0" + b"".join(bytes([tag, 0, 7, 0]) + b"\xff" * 4 for tag in (4, 1, 32)),
        )
    )
    + a.file(b"f"),
    "ACL by default on a file": a.pax(
        (
            b"SCHILY.xattr.system.posix_acl_default",
            b"\2\0\0\0" + b"".join(bytes([tag, 0, 7, 0]) + b"\xff" * 4 for tag in (1, 4, 32)),
        )
    )
    + a.file(b"f"),
    "capability malformed": a.pax((b"SCHILY.xattr.security.capability", b"\1\0\0\2"))
    + a.file(b"f"),
    "checksum wrong": a.block(b"f")[:-1] + b"x",
    "not a tar": b"hello, this is not a tar archive at all".ljust(1024, b"."),
    "unknown type": a.block(b"f", b"Z"),
    "multi-volume": a.block(b"f", b"M"),
    "data after the end": a.file(b"f") + a.END + b"garbage".ljust(512, b"\0"),
    "members after the end": a.file(b"f") + a.END + a.file(b"g"),
    "lone zero block": a.file(b"f") + bytes(512) + a.file(b"g"),
    "ends within a header": a.file(b"f") + a.block(b"g")[:300],
    "ends within a body": a.block(b"f", size=5000) + b"x" * 4000,
    "ends within a large body": a.block(b"f", size=500000) + b"x" * 400000,
    "ends within padding": a.block(b"f", size=5) + b"xxxxx",
    "ends within a PAX header": a.block(b"x", b"x", size=600) + b"x" * 512,
    "sparse map overlaps": a.pax(
        (b"GNU.sparse.major", b"0"),
        (b"GNU.sparse.minor", b"1"),
        (b"GNU.sparse.size", b"100"),
        (b"GNU.sparse.map", b"0,3,2,1"),
    )
    + a.file(b"f"),
    "sparse map beyond the size": a.pax((b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"100,4"))
    + a.file(b"f"),
    "sparse map odd": a.pax((b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"0,4,9"))
    + a.file(b"f"),
    "sparse map short of data": a.pax((b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"0,2"))
    + a.file(b"f"),
    "sparse size huge": a.pax((b"GNU.sparse.size", b"9" * 18), (b"GNU.sparse.map", b"0,4"))
    + a.file(b"f"),
    "sparse 1.0 map never ends": a.pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
    + a.file(b"f", b"9999999\n" + b"1\n" * 3000),
    "sparse 1.0 map missing": a.pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
    + a.file(b"f", b""),
    "old sparse map endless": a.checksummed(
        a.block(b"f", b"S")[:386] + b"0" * 96 + b"\1" + b"00000000000\0" + bytes(17)
    )
    + (bytes(504) + b"\1" + bytes(7)) * 200,
    "too many members": b"".join(a.directory(b"d%d" % n) for n in range(2001)),
    "too many implied directories": b"".join(
        a.directory(b"%d/a/b/c/d/e/f/g/h/" % n) for n in range(300)
    ),
    "apparent size": b"".join(
        a.pax((b"GNU.sparse.size", b"%d" % (100 << 20)), (b"GNU.sparse.map", b"0,0"))
        + a.file(b"f%d" % n, b"")
        for n in range(2)
    ),
}


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    """An empty store with small limits."""
    return ContentStore(str(tmp_path / "store"), SMALL)


def _refuse(store: ContentStore, data: bytes, **more: object) -> BulkheadError:
    before = a.snapshot(store)
    with pytest.raises((Invalid, Corrupt)) as caught:
        a.ingest(store, data, **more)
    assert a.snapshot(store) == before, "something was left behind"
    message = str(caught.value)
    assert "\n" not in message
    assert "\0" not in message
    assert len(message) < 600
    return caught.value


@pytest.mark.parametrize("name", REFUSED)
def test_refused(store: ContentStore, name: str) -> None:
    """Each of them raises Invalid and the store is as it was."""
    assert isinstance(_refuse(store, REFUSED[name] + a.END), Invalid)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_gzip(store: ContentStore, name: str) -> None:
    """The same inside gzip, where the blob itself must not stay either."""
    _refuse(store, gzip.compress(REFUSED[name] + a.END, 1))


def test_refused_without_an_end(store: ContentStore) -> None:
    """A header cut off right after a good member."""
    _refuse(store, a.file(b"f") + b"\1" * 100)


GOOD = a.file(b"f", b"x" * 5000) + a.END


def _damaged() -> dict[str, bytes]:
    packed = gzip.compress(GOOD, 6)
    frame = zstd.compress(GOOD, 3)
    return {
        "gzip cut": packed[:-9],
        "gzip without its trailer": packed[:-8],
        "gzip header only": packed[:10],
        "gzip with a wrong checksum": packed[:-8] + b"\0\0\0\0" + packed[-4:],
        "gzip with a wrong length": packed[:-4] + b"\1\0\0\0",
        "gzip with garbage after it": packed + b"garbage",
        "gzip with zeros after it": packed + bytes(100),
        "gzip with half a member after it": packed + packed[: len(packed) // 2],
        "gzip with a damaged body": packed[:30] + bytes([packed[30] ^ 0xFF]) + packed[31:],
        "zstd cut": frame[:-5],
        "zstd with garbage after it": frame + b"garbage",
        "zstd with a damaged body": frame[:20] + bytes([frame[20] ^ 0xFF]) + frame[21:],
    }


@pytest.mark.parametrize("name", _damaged())
def test_damaged_compression(store: ContentStore, name: str) -> None:
    """Truncated, extended and altered streams are Corrupt (or what they inflate to is refused)."""
    _refuse(store, _damaged()[name])


def test_wrong_digests(store: ContentStore) -> None:
    """A blob or tar of another digest or size than announced is Corrupt and not kept."""
    packed = gzip.compress(GOOD, 6)
    wrong = "sha256:" + "0" * 64
    assert isinstance(_refuse(store, packed, digest=wrong), Corrupt)
    assert isinstance(_refuse(store, packed, diff_id=wrong), Corrupt)
    assert isinstance(_refuse(store, packed, size=len(packed) - 1), Corrupt)
    assert isinstance(_refuse(store, packed, size=len(packed) + 1), Corrupt)
    assert isinstance(_refuse(store, GOOD, digest=wrong), Corrupt)
    assert isinstance(_refuse(store, packed, digest=wrong, keep_blob=False), Corrupt)
    assert isinstance(_refuse(store, packed, digest=wrong, resume=True), Corrupt)
    for digest in ("sha256:xyz", "md5:0", "sha256:" + "A" * 64, "../../etc/passwd", ""):
        assert isinstance(_refuse(store, packed, digest=digest), Invalid)


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress], ids=["gzip", "zstd"])
def test_bomb(store: ContentStore, pack: Callable[[bytes], bytes]) -> None:
    """An archive that inflates beyond the ratio is stopped."""
    body = bytes(32 << 20)
    error = _refuse(store, pack(a.block(b"zeros", size=len(body)) + body + a.END))
    assert "bomb" in str(error)


def test_size_bomb(tmp_path: Path) -> None:
    """An archive beyond the size limit is stopped."""
    store = ContentStore(str(tmp_path / "s"), Limits(tar_bytes=1 << 20))
    error = _refuse(store, a.file(b"f", os.urandom(2 << 20)) + a.END)
    assert "exceeds" in str(error)


def test_nested_bomb_is_data(store: ContentStore) -> None:
    """A compressed file inside a layer is only a file."""
    inner = gzip.compress(bytes(1 << 20))
    layer = a.ingest(store, a.file(b"bomb.gz", inner) + a.END)
    assert a.contents(layer)[b"bomb.gz"]["data"] == inner


def test_overlay_xattrs_are_stripped(store: ContentStore) -> None:
    """Attributes that steer overlayfs come from us alone; the tar keeps them."""
    data = (
        a.pax(
            (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
            (b"SCHILY.xattr.user.overlay.metacopy", b""),
            (b"SCHILY.xattr.trusted.overlay.overlay.opaque", b"y"),
            (b"SCHILY.xattr.user.kept", b"1"),
        )
        + a.directory(b"d/")
        + a.END
    )
    layer = a.ingest(store, data)
    assert a.contents(layer)[b"d"]["xattrs"] == {b"user.kept": b"1"}
    assert b"".join(store.tar(layer.diff_id)) == data


def test_neutral_oddities(store: ContentStore) -> None:
    """What looks odd and is harmless is kept as it is, never interpreted."""
    data = (
        a.block(b"up", b"2", link=b"../../../../etc/passwd")
        + a.block(b"hard", b"1", link=b"up")
        + a.file(b"new\nline\x1b[31m", b"1")
        + a.file(b"caf\xff\xfe", b"2")
        + a.block(b"dev/null", b"3", device=(1, 3), mode=0o666)
        + a.block(b"link-with-size", b"2", link=b"x", size=4096)
        + a.directory(b"dir-with-size", size=4096)
        + a.file(b"dup", b"first")
        + a.file(b"dup", b"second")
        + a.block(b"turn", b"2", link=b"x")
        + a.directory(b"turn/")
        + a.file(b"turn/x", b"3")
        + a.file(b"./a//./b/", b"")
        + a.END
    )
    layer = a.ingest(store, data)
    seen = a.contents(layer)
    assert seen[b"up"]["link"] == b"../../../../etc/passwd"
    assert seen[b"hard"]["link"] == b"../../../../etc/passwd"
    assert seen[b"hard"]["nlink"] == 2
    assert seen[b"new\nline\x1b[31m"]["data"] == b"1"
    assert seen[b"caf\xff\xfe"]["data"] == b"2"
    assert seen[b"dev/null"]["device"] == (1, 3)
    assert seen[b"dup"]["data"] == b"second"
    assert seen[b"turn/x"]["data"] == b"3"
    assert stat.S_ISDIR(seen[b"a/b"]["mode"])
    assert b"".join(store.tar(layer.diff_id)) == data


def test_multi_member_gzip(store: ContentStore) -> None:
    """Members one after another are one stream (as pigz and estargz write it)."""
    data = a.file(b"f", os.urandom(3000)) + a.file(b"g", os.urandom(3000)) + a.END
    cuts = (0, 100, 1000, 4000, len(data))
    packed = b"".join(gzip.compress(data[start:end]) for start, end in pairwise(cuts))
    layer = a.ingest(store, packed)
    assert b"".join(store.tar(layer.diff_id)) == data
    assert b"".join(store.blob_for(layer.digest, layer.diff_id)) == packed


def test_zstd_frames(store: ContentStore) -> None:
    """Several frames and skippable ones are one stream (as zstd:chunked writes it)."""
    data = a.file(b"f", os.urandom(3000)) + a.END
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    packed = zstd.compress(data[:1000]) + skippable + zstd.compress(data[1000:]) + skippable
    layer = a.ingest(store, packed)
    assert b"".join(store.tar(layer.diff_id)) == data


def _valid_archive() -> bytes:
    return b"".join(
        (
            a.file(b"a/b/c", b"c" * 10),
            a.file(b"a/b/d", b"d" * 5000),
            a.pax((b"SCHILY.xattr.user.k", b"v"), (b"path", b"p" * 120), (b"mtime", b"1.5")),
            a.file(b"p", b"1" * 700),
            a.block(b"././@LongLink", b"L", size=151) + a.padded(b"n" * 150 + b"\0"),
            a.file(b"n", b""),
            a.block(b"s", b"2", link=b"t"),
            a.pax((b"GNU.sparse.size", b"9000"), (b"GNU.sparse.map", b"0,4,8000,4")),
            a.file(b"sp", b"12345678"),
            a.directory(b"d/"),
            a.file(b"d/.wh.gone", b""),
            a.file(b"d/.wh..wh..opq", b""),
            a.block(b"h", b"1", link=b"a/b/c"),
            a.block(b"c", b"3", device=(5, 1)),
            a.END,
        )
    )


@given(st.integers(0, 2**32))
def test_fuzz_mutated(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Mutated archives are either stored exactly or refused; never another error, never residue."""
    chance = random.Random(seed)
    base = _valid_archive()
    store = ContentStore(str(tmp_path_factory.mktemp("fuzz")), SMALL)
    before = a.snapshot(store)
    for _ in range(20):
        data = bytearray(base)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            what = chance.randrange(5)
            if what == 0:
                data[at] = chance.randrange(256)
            elif what == 1:
                data[at : at + chance.randint(1, 600)] = b""
            elif what == 2:
                data[at:at] = chance.randbytes(chance.randint(1, 600))
            elif what == 3:
                header = at // 512 * 512
                data[header + 124 : header + 136] = chance.randbytes(12)
            else:
                start = chance.randrange(len(data)) // 512 * 512
                data[at // 512 * 512 : at // 512 * 512] = data[start : start + 1024]
        for header in range(0, len(data) - 511, 512):  # keep most checksums right, to get further
            if bytes(data[header + 257 : header + 262]) == b"ustar" and chance.random() < 0.9:
                data[header : header + 512] = a.checksummed(bytes(data[header : header + 512]))
        try:
            layer = a.ingest(store, bytes(data), compression="")
        except (Invalid, Corrupt):
            assert a.snapshot(store) == before
            continue
        assert b"".join(store.tar(layer.diff_id)) == bytes(data)
        a.contents(layer)
        store.gc(lambda: ())
        assert a.snapshot(store) == before


@given(st.binary(max_size=3000))
def test_fuzz_random_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Arbitrary bytes are refused or are empty archives."""
    store = ContentStore(str(tmp_path_factory.mktemp("fuzz")), SMALL)
    for prefix in (b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"):
        try:
            layer = a.ingest(store, prefix + data)
        except (Invalid, Corrupt):
            continue
        assert b"".join(store.blob_for(layer.digest, layer.diff_id)) == prefix + data
