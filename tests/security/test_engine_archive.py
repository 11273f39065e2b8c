"""Copying into and out of a root whose owner is hostile: nothing outside is read or written."""

import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.engine import archive, copyup
from bulkhead.errors import BulkheadError, Invalid
from bulkhead.linux import copying

OPTIONS = archive.Options(keep_kinds=False, owner=(os.getuid(), os.getgid()))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A root with a way out in every form, and a secret beside it."""
    inside, outside = tmp_path / "root", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "dir").mkdir()
    (inside / "abs").symlink_to(outside)
    (inside / "rel").symlink_to("../outside")
    (inside / "deep").symlink_to("../../../../../../../../../../" + str(outside))
    (inside / "loop").symlink_to("loop")
    (inside / "file").symlink_to(outside / "secret")
    fd = os.open(inside, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def tar(*members: tuple[str, bytes | str]) -> io.BytesIO:
    """Bytes are a file's content; "-> x" is a symbolic link, "=> x" a hard link, "/" a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.uid, info.gid = os.getuid(), os.getgid()
            if isinstance(content, bytes):
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
                continue
            if content == "/":
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                info.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                info.linkname = content[3:]
            made.addfile(info)
    out.seek(0)
    return out


def outside(tmp_path: Path) -> dict[str, str]:
    place = tmp_path / "outside"
    return {name: (place / name).read_text() for name in os.listdir(place)}


UNTOUCHED = {"secret": "secret"}


@pytest.mark.parametrize("path", ["abs", "rel", "deep", "abs/secret", "rel/secret", "deep/../dir"])
def test_reading_through_links_stays_inside(root: int, tmp_path: Path, path: str) -> None:
    out = io.BytesIO()
    try:
        archive.write(root, f"/{path}/", out, "w")
        archive.write(root, f"/{path}", out, "w")
    except BulkheadError:
        pass
    assert b"secret\0" not in out.getvalue().replace(b"secret\0\0", b"")
    assert b"outside" not in out.getvalue() or path in {"abs", "rel", "deep"}


def test_a_link_at_the_end_is_copied_as_a_link(root: int) -> None:
    out = io.BytesIO()
    archive.write(root, "/file", out, "w")
    out.seek(0)
    with tarfile.open(fileobj=out) as made:
        (member,) = made.getmembers()
    assert member.issym()
    assert archive.describe(root, "/file", "w")["linkTarget"].endswith("/outside/secret")


@pytest.mark.parametrize("path", ["/abs", "/rel", "/deep", "/loop"])
def test_writing_to_a_link_out_of_the_root_fails_or_stays_inside(
    root: int, tmp_path: Path, path: str
) -> None:
    with pytest.raises(BulkheadError):
        archive.extract(root, path, tar(("x", b"in")), OPTIONS, "w")
    assert outside(tmp_path) == UNTOUCHED


@pytest.mark.parametrize(
    "members",
    [
        (("../outside/new", b"x"),),
        (("dir/../../outside/new", b"x"),),
        (("abs/new", b"x"),),
        (("rel/secret", b"overwritten"),),
        (("made", "-> ../outside"), ("made/new", b"x")),
        (("made", "-> /"), ("made/outside/new", b"x")),
        (("hard", "=> ../outside/secret"),),
        (("hard", "=> file"), ("hard", b"overwritten")),
        (("hard", "=> rel/secret"),),
        (("file", b"replaced, not followed"),),
        (("/abs", "/"), ("/abs/new", b"x")),
    ],
)
def test_members_that_lead_out_change_nothing_outside(
    root: int, tmp_path: Path, members: tuple[tuple[str, bytes | str], ...]
) -> None:
    try:
        archive.extract(root, "/", tar(*members), OPTIONS, "w")
    except BulkheadError as error:
        assert "\n" not in error.message
    assert outside(tmp_path) == UNTOUCHED
    assert os.stat(tmp_path / "outside/secret").st_nlink == 1


def test_a_link_swapped_for_a_directory_meanwhile_leads_nowhere(root: int, tmp_path: Path) -> None:
    inside = tmp_path / "root"
    real, link = inside / "real", inside / "link"
    real.mkdir()
    link.symlink_to("../outside")
    place = inside / "place"
    place.symlink_to("real")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in ("../outside", "real", "/outside"):
                fresh = inside / "fresh"
                os.symlink(target, fresh)
                os.rename(fresh, place)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(300):
            try:
                members = tar((f"place/n{number}", b"x"), ("place/sub/deeper", b"y"))
                archive.extract(root, "/", members, OPTIONS, "w")
                archive.write(root, "/place/", io.BytesIO(), "w")
            except BulkheadError:
                continue
    finally:
        stop.set()
        thread.join()
    assert outside(tmp_path) == UNTOUCHED
    assert not (tmp_path / "outside" / "sub").exists()


def test_damaged_archives_are_refused(root: int, tmp_path: Path) -> None:
    good = tar(("dir/a", b"x" * 5000)).getvalue()
    for bad in (b"garbage" * 1000, good[:3000]):
        with pytest.raises(Invalid):
            archive.extract(root, "/", io.BytesIO(bad), OPTIONS, "w")


def test_kinds_are_kept_when_asked(root: int, tmp_path: Path) -> None:
    keep = archive.Options(keep_kinds=True, owner=OPTIONS.owner)
    with pytest.raises(Invalid, match="cannot overwrite directory"):
        archive.extract(root, "/", tar(("dir", b"x")), keep, "w")
    with pytest.raises(Invalid, match="cannot overwrite non-directory"):
        archive.extract(root, "/", tar(("file", "/")), keep, "w")
    assert outside(tmp_path) == UNTOUCHED


def test_a_round_trip_keeps_everything(root: int, tmp_path: Path) -> None:
    source = tmp_path / "root/dir"
    (source / "a").write_bytes(b"content")
    os.chmod(source / "a", 0o4751)
    os.link(source / "a", source / "b")
    (source / "c").symlink_to("a")
    os.mkfifo(source / "p")
    os.utime(source / "a", ns=(1, 1_600_000_000_123_456_789))
    out = io.BytesIO()
    archive.write(root, "/dir", out, "w")
    out.seek(0)
    (tmp_path / "root/copy").mkdir()
    archive.extract(root, "/copy", out, OPTIONS, "w")
    copy = tmp_path / "root/copy/dir"
    assert (copy / "a").read_bytes() == b"content"
    assert os.stat(copy / "a").st_mode == os.stat(source / "a").st_mode
    assert os.stat(copy / "a").st_ino == os.stat(copy / "b").st_ino
    assert os.readlink(copy / "c") == "a"
    assert sorted(os.listdir(copy)) == ["a", "b", "c", "p"]


def test_a_subpath_of_a_volume_does_not_lead_out(root: int, tmp_path: Path) -> None:
    for path in ("abs", "rel", "deep", "../outside"):
        with pytest.raises(Invalid):
            copyup.subdirectory(str(tmp_path / "root"), path)
    assert copyup.subdirectory(str(tmp_path / "root"), "dir").endswith("/root/dir")


def test_filling_a_volume_follows_nothing(root: int, tmp_path: Path) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    into = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    source = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    try:
        copying.copy_directory(source, into)
    finally:
        os.close(into)
        os.close(source)
    assert os.readlink(target / "file") == str(tmp_path / "outside/secret")
    assert (target / "dir").is_dir()
