"""Archives unpacked into foreign trees, and paths taken out of them."""

import gzip
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Invalid, NotFound
from bulkhead.store import diff
from bulkhead.store.unpack import open_inside, unpack
from tests.helpers import archives as a
from tests.helpers.views import view


def _unpack(data: bytes, root: Path, path: str = "/", **more: object) -> None:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        unpack(a.chunked(data, 1000), fd, path, **more)  # type: ignore[arg-type]
    finally:
        os.close(fd)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a secret beside it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("untouched")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_tree_comes_back(root: Path, tmp_path: Path) -> None:
    """What `tar_tree` writes, `unpack` makes again."""
    source = tmp_path / "source"
    (source / "d/e").mkdir(parents=True)
    (source / "d/f").write_bytes(os.urandom(10_000))
    os.link(source / "d/f", source / "hard")
    os.symlink("../../secret", source / "d/link")
    os.mkfifo(source / "fifo")
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(source / "d/f", 5, 6)
    os.chmod(source / "d/f", 0o4755)
    os.setxattr(source / "d/f", "user.k", b"v")
    os.utime(source / "d", ns=(0, 1_234_567_890))
    (source / "empty").mkdir(mode=0o700)
    data = b"".join(diff.tar_tree(str(source)))
    for packed in (data, gzip.compress(data)):
        _unpack(packed, root)
        ours, theirs = view(str(root)), view(str(source))
        ours.pop("."), theirs.pop(".")
        assert ours == theirs


def test_links_of_the_root_are_followed_inside_it(root: Path) -> None:
    """A parent that is an absolute or climbing link leads within the root, as for the workload."""
    (root / "etc").mkdir()
    os.symlink("/etc", root / "absolute")
    os.symlink("../../../../etc", root / "climbing")
    _unpack(a.file(b"absolute/a") + a.file(b"climbing/b") + a.END, root)
    assert sorted(os.listdir(root / "etc")) == ["a", "b"]
    _unpack(a.file(b"c") + a.END, root, "/climbing/")
    assert (root / "etc/c").read_bytes() == b"data"


def test_last_component_is_replaced_not_followed(root: Path, tmp_path: Path) -> None:
    """A link in the place of a member goes; what it points to stays."""
    os.symlink(tmp_path / "secret/file", root / "f")
    os.symlink("/target", root / "g")
    (root / "target").write_text("kept")
    _unpack(a.file(b"f") + a.file(b"g") + a.END, root)
    assert not (root / "f").is_symlink()
    assert (root / "target").read_text() == "kept"
    assert (tmp_path / "secret/file").read_text() == "untouched"


@pytest.mark.parametrize(
    "data",
    [
        a.file(b"../escape"),
        a.file(b"/escape"),
        a.file(b"a/../../escape"),
        a.block(b"l", b"1", link=b"../secret/file"),
        a.block(b"l", b"1", link=b"/secret/file"),
        a.block(b"l", b"1", link=b"missing"),
        a.file(b"f") + a.file(b"f/x"),
        a.block(b".", b"2", link=b"/"),
        a.block(b"f", size=100),
    ],
)
def test_hostile_members_are_refused(root: Path, tmp_path: Path, data: bytes) -> None:
    """Nothing outside is touched."""
    with pytest.raises(Invalid):
        _unpack(data, root)
    assert sorted(os.listdir(tmp_path)) == ["root", "secret"]
    assert os.stat(tmp_path / "secret/file").st_nlink == 1


def test_kinds_and_owners(root: Path) -> None:
    """noOverwriteDirNonDir and a forced owner."""
    (root / "d").mkdir()
    (root / "d/x").write_text("x")
    (root / "f").write_text("f")
    with pytest.raises(Conflict):
        _unpack(a.file(b"d"), root, keep_kind=True)
    with pytest.raises(Conflict):
        _unpack(a.directory(b"f"), root, keep_kind=True)
    _unpack(a.file(b"d") + a.directory(b"f") + a.END, root, owner=(7, 8))
    assert (root / "d").is_file()
    assert (root / "f").is_dir()
    assert (os.stat(root / "d").st_uid, os.stat(root / "f").st_gid) == (7, 8)
    with pytest.raises(NotFound):
        _unpack(a.END, root, "/missing")
    with pytest.raises(Invalid):
        _unpack(a.END, root, "/d")


def test_tar_path(root: Path) -> None:
    """One path out, under another name, links not followed."""
    (root / "d").mkdir()
    (root / "d/x").write_text("x")
    os.symlink("/etc/passwd", root / "l")
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        with open_inside(fd, "/", os.O_RDONLY | os.O_DIRECTORY) as top:
            one = b"".join(diff.tar_path(int(top), "d", "renamed"))
            two = b"".join(diff.tar_path(int(top), "l", "l"))
            with pytest.raises(FileNotFoundError):
                b"".join(diff.tar_path(int(top), "missing", "x"))
    finally:
        os.close(fd)
    _unpack(one + b"", root, "/")
    _unpack(two, root, "/renamed")
    assert (root / "renamed/x").read_text() == "x"
    assert os.readlink(root / "renamed/l") == "/etc/passwd"


def test_swaps_meanwhile(root: Path, tmp_path: Path) -> None:
    """A workload that swaps a directory for a link while we unpack gains nothing."""
    stop = threading.Event()
    os.symlink("../../secret", root / "evil")
    (root / "d").mkdir()

    def swap() -> None:
        while not stop.is_set():
            try:
                os.rename(root / "d", root / "aside")
                os.rename(root / "evil", root / "d")
                os.rename(root / "d", root / "evil")
                os.rename(root / "aside", root / "d")
            except OSError:
                # We may have taken a name meanwhile.
                for name in ("d", "aside"):
                    with suppress(FileExistsError):
                        (root / name).mkdir()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for n in range(300):
            data = a.directory(b"d") + a.file(b"d/file", b"%d" % n) + a.file(b"d/sub/%d" % n)
            try:
                _unpack(data + a.END, root)
            except (Invalid, OSError):
                continue
    finally:
        stop.set()
        thread.join()
    assert os.listdir(tmp_path / "secret") == ["file"]
    assert (tmp_path / "secret/file").read_text() == "untouched"
