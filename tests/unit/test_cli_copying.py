"""Unpacking on the client's side what came out of a container."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from bulkhead.cli import copying
from bulkhead.errors import Invalid


def _archive(*members: tuple[str, bytes, str, int]) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, link, mode in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, mode
            member.uid = member.gid = 4711
            archive.addfile(member)
    stream.seek(0)
    return stream


def _place(folder: Path) -> copying.Place:
    folder.mkdir()
    return copying.Place(str(folder), None, str(folder), whole=True)


def test_a_second_name_of_a_link_changes_nothing_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    outside.chmod(0o600)
    stream = _archive(
        ("a", tarfile.SYMTYPE, str(outside), 0o777), ("b", tarfile.LNKTYPE, "a", 0o777)
    )
    copying.extract(stream, _place(tmp_path / "to"), keep_owner=False)
    assert os.readlink(tmp_path / "to" / "b") == str(outside)
    assert outside.stat().st_mode & 0o777 == 0o600


def test_no_second_name_is_made_of_a_file_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    stream = _archive(
        ("a", tarfile.SYMTYPE, str(tmp_path), 0o777), ("b", tarfile.LNKTYPE, "a/secret", 0o666)
    )
    with pytest.raises(Invalid, match="outside"):
        copying.extract(stream, _place(tmp_path / "to"), keep_owner=False)
    assert not (tmp_path / "to" / "b").exists()


def test_rights_are_not_lent_to_another_owner(tmp_path: Path) -> None:
    stream = _archive(("a", tarfile.REGTYPE, "", 0o6755))
    copying.extract(stream, _place(tmp_path / "to"), keep_owner=False)
    assert (tmp_path / "to" / "a").stat().st_mode & 0o7777 == 0o755
