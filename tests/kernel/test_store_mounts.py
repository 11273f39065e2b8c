"""Layers as the kernel sees them: every form gives the same files."""

import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from bulkhead.errors import BulkheadError, Corrupt, NotFound
from bulkhead.store import diff, tar_write
from bulkhead.store.content import ContentStore
from bulkhead.store.mounts import LayerMounts, is_mount
from tests.helpers import archives as a
from tests.helpers.residue import residue
from tests.helpers.scale import scaled
from tests.helpers.views import overlay, view
from tests.unit.test_store_layers import archive_of, members

ACL = bytes.fromhex(
    "0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff"
)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    """An empty store."""
    return ContentStore(str(tmp_path / "store"))


@contextmanager
def layer_mounts(store: ContentStore, run: Path, *forms: str) -> Iterator[LayerMounts]:
    """Mounted layers, all released at the end."""
    mounts = LayerMounts(store, str(run), forms or ("file", "loop", "tree"))
    try:
        yield mounts
    finally:
        mounts.close()


def _usable(form: str, tmp_path: Path) -> None:
    """Skip if this kernel cannot mount `form`, found out by trying."""
    store = ContentStore(str(tmp_path / "probe"))
    layer = a.ingest(store, a.END)
    try:
        with layer_mounts(store, tmp_path / "probe-run", form) as mounts:
            mounts.lowers([layer.diff_id])
    except BulkheadError as error:
        pytest.skip(f"this kernel cannot mount the form {form}: {error}")


def _header(name: bytes, mode: int, size: int = 0, **more: object) -> bytes:
    return tar_write.header(name, mode, 1000, 50, size, 1_600_000_000_123_456_789, **more)  # type: ignore[arg-type]


def corpus() -> list[bytes]:
    """Three layers, bottom first, with everything a layer can have."""
    chance = random.Random(7)
    bottom = [
        _header(b"./", stat.S_IFDIR | 0o755),
        _header(b"acl", stat.S_IFREG | 0o664, 3, xattrs={b"system.posix_acl_access": ACL}),
        a.padded(b"acl"),
        _header(
            b"ping", stat.S_IFREG | 0o755, 4,
            xattrs={b"security.capability": CAPABILITY, b"user.note": b"x" * 200},
        ),
        a.padded(b"ping"),
        _header(b"setuid", stat.S_IFREG | 0o6755),
        _header(b"sticky/", stat.S_IFDIR | 0o1777, xattrs={b"trusted.mark": b"1"}),
        _header(b"null", stat.S_IFCHR | 0o666, device=(1, 3)),
        _header(b"disk", stat.S_IFBLK | 0o660, device=(259, 1_000_000)),
        _header(b"fifo", stat.S_IFIFO | 0o600),
        _header(
            b"link", stat.S_IFLNK | 0o777, link=b"../etc/passwd",
            xattrs={b"trusted.t": b"on a link", b"user.u": b"not allowed there"},
        ),
        _header(b"pipe", stat.S_IFIFO | 0o600, xattrs={b"user.u": b"x", b"security.x": b"y"}),
        _header(b"defaults/", stat.S_IFDIR | 0o775, xattrs={b"system.posix_acl_default": ACL}),
        _header(b"longlink", stat.S_IFLNK | 0o777, link=b"t" * 4095),
        _header(b"hard", stat.S_IFREG | 0o777, link=b"ping", hard=True),
        _header(b"hardsym", stat.S_IFLNK | 0o777, link=b"link", hard=True),
        _header(b"n" * 255, stat.S_IFREG | 0o644),
        _header(b"opaque/", stat.S_IFDIR | 0o755),
        a.file(b"opaque/lower"),
        _header(b"gone/", stat.S_IFDIR | 0o755),
        a.file(b"gone/a"),
        a.file(b"deleted"),
        a.file(b"replaced"),
        a.file(b"becomes-dir"),
        a.directory(b"becomes-file/"),
        a.file(b"becomes-file/x"),
        a.directory(b"merged/"),
        a.file(b"merged/one"),
        a.file(b"implied/by/this"),
        a.pax((b"GNU.sparse.size", b"3000000"), (b"GNU.sparse.map", b"0,4,2000000,4")),
        a.file(b"sparse", b"12345678"),
    ]  # fmt: skip
    for n in range(400):
        size = chance.choice((0, 1, 100, 4000, 4032, 4095, 4096, 4097, 9000, 40000))
        data = chance.randbytes(size)
        name = b"many/%03d%s" % (n, b"m" * (n % 80))
        bottom += [_header(name, stat.S_IFREG | 0o600, size), a.padded(data)]
    middle = [
        a.file(b"opaque/.wh..wh..opq", b""),
        a.file(b"opaque/upper"),
        a.file(b".wh.gone", b""),
        a.file(b".wh.deleted", b""),
        a.file(b"replaced", b"new"),
        a.file(b".wh.becomes-dir", b""),
        a.directory(b"becomes-dir/"),
        a.file(b"becomes-dir/x"),
        a.file(b"becomes-file", b"now a file"),
        _header(b"merged/", stat.S_IFDIR | 0o711, xattrs={b"user.k": b"v"}),
        a.file(b"merged/two"),
        a.file(b"many/.wh.000", b""),
    ]
    top = [a.directory(b"gone/"), a.file(b"gone/b"), a.file(b"opaque/top")]
    return [b"".join(layer) + a.END for layer in (bottom, middle, top)]


def hundred() -> list[bytes]:
    """A hundred small layers that add, replace, hide and make opaque."""
    chance = random.Random(100)
    layers = []
    for n in range(100):
        parts = [a.file(b"layer/%03d" % n, b"%d" % n), a.file(b"last", b"%d" % n)]
        shared = b"shared/%d" % chance.randrange(20)
        parts.append(
            chance.choice((a.file(shared, b"%d" % n), a.file(b"shared/.wh." + shared[7:])))
        )
        if n % 17 == 16:
            parts.append(a.file(b"d%d/.wh..wh..opq" % (n % 3), b""))
        parts.append(a.file(b"d%d/%d" % (n % 3, n)))
        layers.append(b"".join(parts) + a.END)
    return layers


def _compare(
    store: ContentStore, tmp_path: Path, form: str, diff_ids: Sequence[str]
) -> dict[str, dict[str, object]]:
    """The merged views of `form` and of unpacked trees are equal; returns the view."""
    views = []
    for which in (form, "tree"):
        run = tmp_path / f"run-{which}"
        with layer_mounts(store, run, which) as mounts:
            lowers = mounts.lowers(diff_ids)
            assert len(lowers) == len(set(diff_ids))
            with overlay(str(tmp_path / f"merged-{which}"), lowers) as merged:
                views.append(view(merged))
    assert views[0] == views[1]
    return views[0]


@pytest.mark.parametrize("form", ["file", "loop"])
def test_corpus_in_both_forms(store: ContentStore, tmp_path: Path, form: str) -> None:
    """Mounted and unpacked layers merge to equal views: bytes, modes, owners, times, attributes."""
    _usable(form, tmp_path)
    with residue(str(tmp_path)):
        ids = [a.ingest(store, data).diff_id for data in corpus()]
        seen = _compare(store, tmp_path, form, ids)
    assert seen["ping"]["xattrs"] == {"security.capability": CAPABILITY, "user.note": b"x" * 200}
    assert seen["acl"]["xattrs"] == {"system.posix_acl_access": ACL}
    assert seen["hard"]["nlink"] == 2
    assert seen["ping"]["mtime"] == 1_600_000_000_123_456_789
    assert seen["disk"]["device"] == os.makedev(259, 1_000_000)
    assert "deleted" not in seen
    assert "gone/a" not in seen
    assert "gone/b" in seen
    assert "opaque/lower" not in seen
    assert {"opaque/upper", "opaque/top", "merged/one", "merged/two"} <= seen.keys()
    assert seen["merged"]["mode"] == oct(stat.S_IFDIR | 0o711)
    assert seen["becomes-dir/x"]
    assert seen["becomes-file"]["size"] == 10


@pytest.mark.parametrize("form", ["file", "loop"])
def test_hundred_layers(store: ContentStore, tmp_path: Path, form: str) -> None:
    """So does an image of a hundred layers."""
    _usable(form, tmp_path)
    with residue(str(tmp_path)):
        ids = [a.ingest(store, data).diff_id for data in hundred()]
        seen = _compare(store, tmp_path, form, ids)
    assert len([p for p in seen if p.startswith("layer/")]) == 100


def test_real_tree(store: ContentStore, tmp_path: Path) -> None:
    """A part of this machine's own system, as GNU tar archives it, is the same in both forms."""
    _usable("file", tmp_path)
    parts = [
        p for p in ("etc", "usr/share/perl5", "usr/lib/python3", "bin") if os.path.exists(f"/{p}")
    ]
    done = subprocess.run(
        ["tar", "-C", "/", "--xattrs", "--xattrs-include=*", "--format=posix", "-cf",
         str(tmp_path / "real.tar"), *parts],
        capture_output=True,
    )  # fmt: skip
    if done.returncode > 1:
        pytest.skip(f"tar failed: {done.stderr!r}")
    with open(tmp_path / "real.tar", "rb") as stream:
        layer = store.ingest(iter(lambda: stream.read(1 << 20), b""))
    seen = _compare(store, tmp_path, "file", [layer.diff_id])
    assert len(seen) > 100
    with open(tmp_path / "real.tar", "rb") as stream:
        for piece in store.tar(layer.diff_id):
            assert stream.read(len(piece)) == piece
        assert not stream.read(1)


def test_erofs_utils_agree(store: ContentStore) -> None:
    """fsck.erofs of erofs-utils finds nothing wrong with our images."""
    program = shutil.which("fsck.erofs")
    if program is None:
        pytest.skip("fsck.erofs is not installed")
    for data in (*corpus(), a.END):
        layer = a.ingest(store, data)
        done = subprocess.run([program, layer.path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@settings(max_examples=scaled(20))
@given(members())
def test_generated_trees_mounted(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, dict[str, Any]]
) -> None:
    """For any tree, the kernel sees what our reader sees, and fsck.erofs agrees."""
    folder = tmp_path_factory.mktemp("generated")
    _usable("file", folder)
    store = ContentStore(str(folder / "store"))
    layer = a.ingest(store, archive_of(tree))
    ours = a.contents(layer)
    with layer_mounts(store, folder / "run", "file") as mounts:
        theirs = view(mounts.lowers([layer.diff_id])[0])
    assert {os.fsdecode(path) or "." for path in ours} == theirs.keys()
    for path, item in ours.items():
        seen = theirs[os.fsdecode(path) or "."]
        assert seen["mode"] == oct(item["mode"])
        assert seen["owner"] == item["owner"]
        assert seen["mtime"] == item["mtime"]
        assert seen["xattrs"] == {os.fsdecode(k): v for k, v in item["xattrs"].items()}
        if "data" in item:
            assert seen["data"] == hashlib.sha256(item["data"]).hexdigest()
        if "link" in item:
            assert seen["link"] == os.fsdecode(item["link"])
        if "device" in item:
            assert seen["device"] == os.makedev(*item["device"])
        if not stat.S_ISDIR(item["mode"]):
            assert seen["nlink"] == item["nlink"]
    program = shutil.which("fsck.erofs")
    if program is not None:
        done = subprocess.run([program, layer.path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_mounts_survive_and_are_released(store: ContentStore, tmp_path: Path) -> None:
    """A second instance finds what the first mounted; release_unused keeps what is used."""
    _usable("file", tmp_path)
    ids = [a.ingest(store, a.file(b"f%d" % n) + a.END).diff_id for n in range(3)]
    with residue(str(tmp_path)):
        first = LayerMounts(store, str(tmp_path / "run"))
        lowers = first.lowers(ids)
        assert [os.listdir(path) for path in lowers] == [["f2"], ["f1"], ["f0"]]
        second = LayerMounts(store, str(tmp_path / "run"))
        assert second.lowers(ids) == lowers
        assert len([p for p in lowers if is_mount(p)]) == 3
        assert second.release_unused({ids[1]}) == sorted(
            os.path.basename(p) for p in (lowers[0], lowers[2])
        )
        assert [is_mount(path) for path in lowers] == [False, True, False]
        assert second.lowers(ids) == lowers
        second.close()
        assert not (tmp_path / "run" / "layers").exists()


def test_repeated_layers(store: ContentStore, tmp_path: Path) -> None:
    """A layer that an image has twice is given once: overlayfs refuses it otherwise."""
    one = a.ingest(store, a.file(b"f", b"1") + a.END).diff_id
    two = a.ingest(store, a.file(b"f", b"2") + a.END).diff_id
    with layer_mounts(store, tmp_path / "run") as mounts:
        lowers = mounts.lowers([one, two, one])
        assert len(lowers) == 2
        with overlay(str(tmp_path / "merged"), lowers) as merged:
            assert Path(merged, "f").read_bytes() == b"1"


def test_threads_mount_once(store: ContentStore, tmp_path: Path) -> None:
    """Many threads asking at once get the same single mount."""
    ids = [a.ingest(store, a.file(b"f%d" % n) + a.END).diff_id for n in range(8)]
    results: list[tuple[str, ...]] = []
    with residue(str(tmp_path)), layer_mounts(store, tmp_path / "run") as mounts:
        threads = [
            threading.Thread(target=lambda: results.append(mounts.lowers(ids))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        assert len(set(results)) == 1


def test_missing_and_damaged(store: ContentStore, tmp_path: Path) -> None:
    """A layer that is not there is NotFound; one the kernel refuses is Corrupt."""
    layer = a.ingest(store, a.file(b"f") + a.END)
    _usable("file", tmp_path)
    with layer_mounts(store, tmp_path / "run", "file") as mounts:
        with pytest.raises(NotFound):
            mounts.lowers(["sha256:" + "0" * 64])
        with open(layer.path, "r+b") as stream:
            stream.seek(1024)
            stream.write(b"\0" * 128)
        with pytest.raises(Corrupt):
            mounts.lowers([layer.diff_id])


def test_collected_and_stored_again(store: ContentStore, tmp_path: Path) -> None:
    """A layer that was collected and comes back is there again, in every form."""
    for form in ("file", "tree"):
        if form == "file":
            _usable("file", tmp_path)
        data = a.file(b"f", form.encode()) + a.END
        diff_id = a.ingest(store, data).diff_id
        with layer_mounts(store, tmp_path / f"run-{form}", form) as mounts:
            (first,) = mounts.lowers([diff_id])
            assert Path(first, "f").read_text() == form
            store.gc(lambda: ())
            a.ingest(store, data)
            (again,) = mounts.lowers([diff_id])
            assert Path(again, "f").read_text() == form


def test_store_on_an_overlay(tmp_path: Path) -> None:
    """Where the store's file system is an overlay the next form is taken by itself."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    with ExitStack() as undo:
        merged = undo.enter_context(
            overlay(
                str(tmp_path / "merged"),
                [str(tmp_path / "lower")],
                str(tmp_path / "upper"),
                str(tmp_path / "work"),
            )
        )
        store = ContentStore(f"{merged}/store")
        layer = a.ingest(store, a.file(b"f") + a.END)
        mounts = undo.enter_context(layer_mounts(store, tmp_path / "run"))
        (path,) = mounts.lowers([layer.diff_id])
        assert Path(path, "f").read_bytes() == b"data"


def _mutate(root: str, chance: random.Random) -> None:
    """Random changes as a workload makes them."""
    for n in range(60):
        paths = [os.path.join(b, x) for b, ds, fs in os.walk(root) for x in (*ds, *fs)]
        path = chance.choice(paths)
        info = os.lstat(path)
        what = chance.randrange(9)
        if what == 0 and stat.S_ISDIR(info.st_mode):
            shutil.rmtree(path)
        elif what == 1 and not stat.S_ISDIR(info.st_mode):
            os.unlink(path)
        elif what == 2 and stat.S_ISREG(info.st_mode):
            Path(path).write_bytes(chance.randbytes(chance.randrange(6000)))
        elif what == 3 and stat.S_ISDIR(info.st_mode):
            Path(path, f"new{n}").write_bytes(chance.randbytes(10))
            os.link(f"{path}/new{n}", f"{path}/hard{n}")
        elif what == 4 and stat.S_ISDIR(info.st_mode):
            shutil.rmtree(path)
            os.mkdir(path, 0o700)
            os.symlink("x" * 120, f"{path}/link")
        elif what == 5:
            os.chown(path, 1, 2, follow_symlinks=False)
        elif what == 6:
            os.utime(path, ns=(0, n * 10**9 + 5), follow_symlinks=False)
        elif what == 7 and stat.S_ISREG(info.st_mode):
            os.setxattr(path, "user.changed", b"%d" % n)
        elif what == 8 and stat.S_ISDIR(info.st_mode) and not os.path.exists(f"{path}/fifo"):
            os.mkfifo(f"{path}/fifo")


@pytest.mark.parametrize("seed", range(8))
def test_committed_upper_gives_the_same_view(
    store: ContentStore, tmp_path: Path, seed: int
) -> None:
    """Changes archived by `tar_upper` and stored as a layer merge to what the workload saw."""
    ids = [a.ingest(store, data).diff_id for data in corpus()]
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    with residue(str(tmp_path)), layer_mounts(store, tmp_path / "run") as mounts:
        lowers = mounts.lowers(ids)
        target = str(tmp_path / "merged")
        with overlay(target, lowers, str(tmp_path / "upper"), str(tmp_path / "work")) as merged:
            before = view(merged)
            _mutate(merged, random.Random(seed))
            after = view(merged)
            listed = diff.changes(str(tmp_path / "upper"), lowers)
            exported = b"".join(diff.tar_tree(merged))
        tar = b"".join(diff.tar_upper(str(tmp_path / "upper")))
        assert tar == b"".join(diff.tar_upper(str(tmp_path / "upper")))
        layer = a.ingest(store, tar)
        with overlay(target, mounts.lowers([*ids, layer.diff_id])) as merged:
            again = view(merged)
        whole = a.ingest(store, exported)
        with overlay(target, mounts.lowers([whole.diff_id])) as merged:
            flat = view(merged)
    for root in (after, again, flat):
        root.pop(".")  # the root directory itself is no member of a layer
    assert again == after
    assert {p: {k: v for k, v in i.items() if k != "nlink"} for p, i in flat.items()} == {
        p: {k: v for k, v in i.items() if k != "nlink"} for p, i in after.items()
    }
    before.pop(".")
    _check_changes(before, after, listed)


def _check_changes(
    before: dict[str, dict[str, object]],
    after: dict[str, dict[str, object]],
    listed: list[tuple[int, str]],
) -> None:
    kinds = {path[1:]: kind for kind, path in listed}
    assert [path for _, path in listed] == sorted(
        (path for _, path in listed), key=lambda p: os.fsencode(p)
    )
    for path in after.keys() - before.keys():
        assert kinds[path] == diff.ADDED, path
    for path in before.keys() - after.keys():
        parents = [path[:at] for at in range(len(path)) if path[at] == "/"]
        hidden = any(p not in after or after[p]["mode"] != before[p]["mode"] for p in parents)
        assert kinds.get(path) == diff.DELETED or hidden, path
    for path in after.keys() & before.keys():
        if after[path] != before[path]:
            assert kinds[path] == diff.MODIFIED, path
    for path, kind in kinds.items():
        assert (path in after) == (kind != diff.DELETED), path
        assert (path in before) == (kind != diff.ADDED), path


UNPRIVILEGED = """
import os, sys
from bulkhead.store.content import ContentStore
from bulkhead.store.mounts import LayerMounts
from tests.helpers import archives as a
from tests.kernel.test_store_mounts import corpus
store = ContentStore(sys.argv[1] + "/store")
mounts = LayerMounts(store, sys.argv[1] + "/run")
lowers = mounts.lowers([a.ingest(store, data).diff_id for data in corpus()])
top, middle, bottom = lowers
assert all(path.endswith("/tree") for path in lowers), lowers
info = os.lstat(middle + "/deleted")
assert info.st_rdev == 0 and info.st_mode & 0o170000 == 0o020000
assert os.getxattr(middle + "/opaque", "user.overlay.opaque") == b"y"
assert os.getxattr(bottom + "/ping", "user.note") == b"x" * 200
assert os.stat(bottom + "/ping").st_uid == os.geteuid()
print("fine")
"""


def test_without_privileges(tmp_path: Path) -> None:
    """Without any capability layers are unpacked; whiteouts and opacity are kept for userxattr."""
    program = shutil.which("setpriv")
    if program is None:
        pytest.skip("setpriv is not installed")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [program, "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", UNPRIVILEGED,
         str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": ":".join((f"{root}/src", str(root), *sys.path[1:]))},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr
