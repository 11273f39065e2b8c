"""tar → EROFS → the same tree, and back to the same bytes; seen by our own reader."""

import io
import os
import random
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Corrupt, NotFound
from bulkhead.store import tar_write
from bulkhead.store.content import ContentStore
from bulkhead.store.erofs_read import Image
from tests.helpers import archives as a

NAMES = st.one_of(
    st.sampled_from(
        ["a", "b", "c", "lib", "x" * 60, "y" * 120, "z" * 255, "ü", "new\nline", "!", "~"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
        lambda n: n not in (".", "..") and not n.startswith(".wh.") and len(n.encode()) < 200
    ),
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
SIZES = st.one_of(
    st.integers(0, 100),
    st.sampled_from([511, 512, 513, 3900, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 70000]),
)
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 4, 1000, 4, 4, 2**32 - 1, 16, 6,
                  2**32 - 1, 32, 4, 2**32 - 1)  # fmt: skip
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
VALUES = st.binary(max_size=300) | st.binary(min_size=3900, max_size=4200)
XATTRS = st.fixed_dictionaries(
    {},
    optional={
        "user.a": VALUES,
        "user." + "n" * 200: VALUES,
        "trusted.t": VALUES,
        "security.capability": st.just(CAPABILITY),
        "system.posix_acl_access": st.just(ACL),
        "user.overlaid": VALUES,
    },
)
KINDS = st.sampled_from(["file", "file", "file", "dir", "symlink", "fifo", "char", "block", "link"])


@st.composite
def members(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """A consistent tree, path → what it is: what is above a path is a directory or absent."""
    tree: dict[str, dict[str, Any]] = {}
    files: list[str] = []
    for path in draw(st.lists(PATHS, unique=True, max_size=25)):
        if any(other.startswith(path + "/") for other in tree):
            continue
        parts = path.split("/")
        prefixes = ["/".join(parts[:n]) for n in range(1, len(parts))]
        if any(tree.get(p, {"kind": "dir"})["kind"] != "dir" for p in prefixes):
            continue
        kind = draw(KINDS)
        node: dict[str, Any] = {"kind": kind, "mode": draw(st.integers(0, 0o7777))}
        node["uid"] = draw(st.sampled_from([0, 1, 1000, 65534, 2**21, 2**32 - 2]))
        node["gid"] = draw(st.sampled_from([0, 5, 2**22]))
        node["mtime_ns"] = draw(st.integers(-(10**18), 2 * 10**18))
        if kind == "link":
            if not files:
                continue
            node["target"] = draw(st.sampled_from(files))
        elif kind == "file":
            node["data"] = os.urandom(1) * draw(SIZES)
            files.append(path)
        elif kind == "symlink":
            node["target"] = draw(st.text("abc/.", min_size=1, max_size=150) | st.just("t" * 4095))
        elif kind in ("char", "block"):
            node["device"] = (draw(st.integers(1, 4095)), draw(st.integers(0, 2**20 - 1)))
        if kind in ("file", "dir"):
            node["xattrs"] = {k.encode(): v for k, v in draw(XATTRS).items()}
        tree[path] = node
    return tree


MODES = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "link": stat.S_IFREG,
}


def archive_of(tree: dict[str, dict[str, Any]]) -> bytes:
    """The tree as a tar by our own writer."""
    out = b""
    for path, node in tree.items():
        kind = node["kind"]
        data = node.get("data", b"")
        if kind == "char" and max(node["device"]) >= 8**7:
            raise AssertionError("outside of what a header holds")
        out += tar_write.header(
            os.fsencode(path) + (b"/" if kind == "dir" else b""),
            MODES[kind] | node["mode"],
            node["uid"],
            node["gid"],
            len(data),
            node["mtime_ns"],
            link=os.fsencode(node.get("target", "")),
            hard=kind == "link",
            device=node.get("device", (0, 0)),
            xattrs=node.get("xattrs"),
        )
        out += a.padded(data)
    return out + a.END


def _expected(tree: dict[str, dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    result: dict[bytes, dict[str, Any]] = {}
    for path, node in tree.items():
        parts = path.split("/")
        for count in range(len(parts)):
            prefix = "/".join(parts[:count])
            result.setdefault(
                os.fsencode(prefix),
                {"mode": stat.S_IFDIR | 0o755, "owner": (0, 0), "mtime": 0, "xattrs": {}},
            )
        if node["kind"] == "link":
            result[os.fsencode(path)] = result[os.fsencode(node["target"])]
            continue
        mode = 0o777 if node["kind"] == "symlink" else node["mode"]
        item: dict[str, Any] = {
            "mode": MODES[node["kind"]] | mode,
            "owner": (node["uid"], node["gid"]),
            "mtime": node["mtime_ns"],
            "xattrs": node.get("xattrs", {}),
        }
        if "data" in node:
            item["data"] = node["data"]
        if node["kind"] == "symlink":
            item["link"] = os.fsencode(node["target"])
        if "device" in node:
            item["device"] = node["device"]
        result[os.fsencode(path)] = item
    return result


def _comparable(seen: dict[bytes, dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    return {
        path: {k: v for k, v in item.items() if k not in ("nlink", "same")}
        for path, item in seen.items()
    }


@given(members())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, dict[str, Any]]
) -> None:
    """Any tree comes back the same through the image, and the tar byte for byte."""
    store = ContentStore(str(tmp_path_factory.mktemp("s")))
    data = archive_of(tree)
    layer = a.ingest(store, data, compression="")
    seen = a.contents(layer)
    expected = _expected(tree)
    expected.setdefault(b"", seen[b""])
    assert _comparable(seen) == _comparable(expected)
    links = {p: n["target"] for p, n in tree.items() if n["kind"] == "link"}
    for path, target in links.items():
        assert seen[path.encode()]["same"] == seen[target.encode()]["same"]
        assert seen[path.encode()]["nlink"] == 1 + list(links.values()).count(target)
    assert b"".join(store.tar(layer.diff_id)) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # the writer is understood by others
        assert [m.name.rstrip("/") for m in tar] == [p.rstrip("/") for p in tree]


@given(members(), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_formats_of_others(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, dict[str, Any]], form: int
) -> None:
    """What tarfile writes in any format is read as tarfile reads it."""
    store = ContentStore(str(tmp_path_factory.mktemp("s")))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for path, node in tree.items():
            if node["kind"] not in ("file", "dir", "symlink"):
                continue
            info = tarfile.TarInfo(path)
            info.mode, info.mtime = node["mode"], max(0, node["mtime_ns"] // 10**9)
            info.uid, info.gid = min(node["uid"], 8**7 - 1), min(node["gid"], 8**7 - 1)
            data = node.get("data", b"")
            info.size = len(data)
            if node["kind"] == "dir":
                info.type = tarfile.DIRTYPE
            elif node["kind"] == "symlink":
                info.type, info.linkname = tarfile.SYMTYPE, node["target"]
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # too long for ustar
                continue
    layer = a.ingest(store, buffer.getvalue(), compression="")
    seen = a.contents(layer)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        for info in tar:
            item = seen[os.fsencode(info.name)]
            assert item["mtime"] == int(info.mtime) * 10**9
            assert item["owner"] == (info.uid, info.gid)
            if info.isreg():
                body = tar.extractfile(info)
                assert body is not None
                assert item["data"] == body.read()
                assert stat.S_IMODE(item["mode"]) == info.mode
            elif info.issym():
                assert item["link"] == os.fsencode(info.linkname)
    assert b"".join(store.tar(layer.diff_id)) == buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    """An empty store."""
    return ContentStore(str(tmp_path / "store"))


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_by_gnu_tar(store: ContentStore, tmp_path: Path, form: str) -> None:
    """GNU tar's four sparse formats give the same file, with holes in the image."""
    with open(tmp_path / "sparse", "wb") as stream:
        stream.write(b"A" * 5000)
        for n in range(1, 12):
            stream.seek(n * 1_000_003)
            stream.write(b"%d" % n * 3000)
        stream.truncate(20_000_001)
    command = ["tar", "-C", str(tmp_path), "-S", "-cf", str(tmp_path / "t.tar")]
    kind = ["--format=gnu"] if form == "gnu" else ["--format=posix", f"--sparse-version={form}"]
    made = subprocess.run([*command, *kind, "sparse"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"tar cannot make this: {made.stderr}")
    data = (tmp_path / "t.tar").read_bytes()
    if len(data) > 1_000_000:
        pytest.skip("the file system of the test keeps no holes")
    layer = a.ingest(store, data)
    assert a.contents(layer)[b"sparse"]["data"] == (tmp_path / "sparse").read_bytes()
    assert b"".join(store.tar(layer.diff_id)) == data
    assert store.layer_bytes(layer.diff_id) < 2_000_000


def test_whiteouts(store: ContentStore) -> None:
    """Whiteouts are 0/0 devices; with a new directory of that name they are opacity."""
    data = (
        a.file(b".wh.gone", b"")
        + a.file(b"d/.wh.gone", b"ignored body")
        + a.file(b"opaque/.wh..wh..opq", b"")
        + a.file(b"opaque/new", b"1")
        + a.file(b"both", b"new file")
        + a.file(b".wh.both", b"")
        + a.file(b".wh.replaced", b"")
        + a.directory(b"replaced/")
        + a.file(b"replaced/x", b"2")
        + a.directory(b".wh..wh.plnk")
        + a.file(b".wh..wh.aufs", b"")
        + a.END
    )
    layer = a.ingest(store, data)
    seen = a.contents(layer)
    assert set(seen) == {
        b"", b"gone", b"d", b"d/gone", b"opaque", b"opaque/new", b"both", b"replaced",
        b"replaced/x",
    }  # fmt: skip
    for path in (b"gone", b"d/gone"):
        assert stat.S_ISCHR(seen[path]["mode"])
        assert seen[path]["device"] == (0, 0)
        assert seen[path]["nlink"] == 2
    for path in (b"opaque", b"replaced"):
        assert seen[path]["xattrs"] == {b"trusted.overlay.opaque": b"y"}
    assert seen[b"both"]["data"] == b"new file"
    assert b"".join(store.tar(layer.diff_id)) == data


def test_opaque_root(store: ContentStore) -> None:
    """The root itself can be opaque and have attributes beyond its block."""
    big = a.pax(*((b"SCHILY.xattr.user.%d" % n, b"v" * 900) for n in range(8)))
    data = a.file(b".wh..wh..opq", b"") + big + a.directory(b"./") + a.file(b"f") + a.END
    seen = a.contents(a.ingest(store, data))
    assert len(seen[b""]["xattrs"]) == 9
    assert seen[b"f"]["data"] == b"data"


def test_large_directories_and_shared_attributes(store: ContentStore) -> None:
    """Directories of many blocks, thousands of inodes, an attribute stored once for all."""
    label = a.pax((b"SCHILY.xattr.security.selinux", b"system_u:object_r:usr_t:s0" * 20))
    names = [b"%04d" % n + b"n" * (n % 90) for n in range(3000)]
    data = b"".join(label + a.file(b"big/" + name, name) for name in names) + a.END
    layer = a.ingest(store, data)
    seen = a.contents(layer)
    assert sorted(p[4:] for p in seen if p.startswith(b"big/")) == sorted(names)
    assert all(seen[b"big/" + name]["data"] == name for name in names)
    assert all(len(seen[b"big/" + n]["xattrs"][b"security.selinux"]) == 520 for n in names)
    assert os.path.getsize(layer.path) < 1_500_000
    assert b"".join(store.tar(layer.diff_id)) == data


def test_duplicates(store: ContentStore) -> None:
    """The last of several members of one name wins, and hard links are counted right."""
    data = (
        a.file(b"f", b"1")
        + a.block(b"g", b"1", link=b"f")
        + a.block(b"h", b"1", link=b"f")
        + a.file(b"f", b"2")
        + a.directory(b"d", mtime=b"00000000005\0")
        + a.file(b"d/x", b"3")
        + a.block(b"d/", b"5", mode=0o700)
        + a.END
    )
    layer = a.ingest(store, data)
    seen = a.contents(layer)
    assert seen[b"f"]["data"] == b"2"
    assert seen[b"g"]["data"] == b"1"
    assert seen[b"g"]["nlink"] == 2
    assert seen[b"h"]["same"] == b"g"
    assert stat.S_IMODE(seen[b"d"]["mode"]) == 0o700
    assert seen[b"d/x"]["data"] == b"3"
    assert b"".join(store.tar(layer.diff_id)) == data


def test_empty_archives(store: ContentStore) -> None:
    """Nothing at all, the usual two zero blocks, and more padding."""
    for data in (b"", bytes(512), bytes(1024), bytes(10240), bytes(3_000_000)):
        layer = a.ingest(store, data)
        assert list(a.contents(layer)) == [b""]
        assert b"".join(store.tar(layer.diff_id)) == data


def test_old_headers(store: ContentStore) -> None:
    """v7 headers, a trailing slash for a directory, base-256 numbers, signed checksums."""
    big = a.block(b"big", size=b"\x80" + bytes(10) + b"\x05") + a.padded(b"12345")
    signed = a.block(b"\xff\xfe", size=2)
    total = sum(b if b < 128 else b - 256 for b in signed[:148] + b" " * 8 + signed[156:])
    signed = signed[:148] + b"%06o\0 " % total + signed[156:]
    data = (
        a.file(b"v7", b"1", magic=bytes(8), flag=b"\0")
        + a.block(b"v7dir/", b"\0", magic=bytes(8))
        + a.file(b"contiguous", b"2", flag=b"7")
        + big
        + signed
        + a.padded(b"ok")
        + a.END
    )
    seen = a.contents(a.ingest(store, data))
    assert seen[b"v7"]["data"] == b"1"
    assert stat.S_ISDIR(seen[b"v7dir"]["mode"])
    assert seen[b"contiguous"]["data"] == b"2"
    assert seen[b"big"]["data"] == b"12345"
    assert seen[b"\xff\xfe"]["data"] == b"ok"


def test_reader_lookup(store: ContentStore) -> None:
    """Single paths are found without mounting."""
    layer = a.ingest(store, a.file(b"a/b", b"x") + a.block(b"l", b"2", link=b"a") + a.END)
    with open(layer.path, "rb") as stream:
        image = Image(stream.fileno())
        assert b"".join(image.read(image.lookup("/a/./b"))) == b"x"
        assert image.link_target(image.lookup("l")) == b"a"
        for missing in ("a/c", "x", "a/b/c", "l/b"):
            with pytest.raises(NotFound):
                image.lookup(missing)


@given(st.integers(0, 2**32))
def test_reader_survives_damage(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """A damaged image raises Corrupt or gives wrong content; nothing else, and it ends."""
    chance = random.Random(seed)
    store = ContentStore(str(tmp_path_factory.mktemp("s")))
    data = a.file(b"d/f", b"x" * 5000) + a.file(b"g") + a.block(b"l", b"2", link=b"g") + a.END
    layer = a.ingest(store, data)
    good = Path(layer.path).read_bytes()
    for _ in range(20):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            bad[chance.randrange(1152, len(bad))] = chance.randrange(256)
        bad[1024 + 8] &= 0xFE  # without the checksum, to get further
        path = Path(store.root) / "bad"
        path.write_bytes(bad)
        with open(path, "rb") as stream:
            try:
                image = Image(stream.fileno())
                for _, inode in image.walk():
                    image.xattrs(inode)
                    if inode.kind == stat.S_IFREG and inode.size < 1 << 20:
                        b"".join(image.read(inode))
            except Corrupt:
                pass


def test_damaged_layer_is_noticed(store: ContentStore) -> None:
    """A bit that flips in the store makes `tar` raise Corrupt at its end."""
    layer = a.ingest(store, a.file(b"f", b"x" * 9000) + a.END)
    with open(layer.path, "r+b") as stream:
        stream.seek(4096)
        stream.write(b"y")
    with pytest.raises(Corrupt):
        b"".join(store.tar(layer.diff_id))
