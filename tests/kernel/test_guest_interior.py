"""Files and processes of a guest, looked at through its monitor; the guest is a PID namespace."""

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import tree
from bulkhead.boundaries.guest.interior import Interior, Sink
from bulkhead.boundaries.guest.tree import Entry
from bulkhead.errors import Invalid, NotFound, Unavailable
from tests.helpers.guest_rig import simple
from tests.helpers.monitor_rig import Monitor, main_frames

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def interior(tmp_path: Path) -> Iterator[Interior]:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        yield Interior(os.getpid(), place=str(tmp_path / "guest.sock"))


def _all(reader: tree.Reader) -> dict[bytes, tuple[Entry, bytes]]:
    return {entry.path: (entry, b"".join(reader.contents())) for entry in reader}


def test_files_come_as_they_are(interior: Interior, tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "deep/er").mkdir(parents=True)
    (top / "file").write_bytes(b"x" * 200_000)
    (top / "file").chmod(0o4751)
    os.chown(top / "deep", 7, 8)
    os.link(top / "file", top / "other")
    (top / "link").symlink_to("../nowhere")
    os.mkfifo(top / "pipe")
    os.setxattr(top / "file", "user.note", b"\0\1")
    os.utime(top / "file", ns=(1, 1234567890123456789))
    found = interior.get(str(tmp_path), "top", _all)
    assert sorted(found) == [b"", b"deep", b"deep/er", b"file", b"link", b"other", b"pipe"]
    entry, contents = found[b"file"]
    assert (entry.mode, contents) == (stat.S_IFREG | 0o4751, b"x" * 200_000)
    assert (entry.mtime_ns, entry.nlink) == (1234567890123456789, 2)
    assert entry.xattrs[b"user.note"] == b"\0\1"
    assert entry.inode == found[b"other"][0].inode
    assert found[b"link"][0].link == b"../nowhere"
    assert (found[b"deep"][0].uid, found[b"deep"][0].gid) == (7, 8)
    assert interior.stat(str(top), "file").size == 200_000
    with pytest.raises(NotFound):
        interior.stat(str(top), "missing")


def _put(interior: Interior, directory: Path, *entries: tuple[Entry, bytes], hard: bool = False,
         keep_kinds: bool = False) -> None:  # fmt: skip
    def write(sink: Sink) -> None:
        for entry, contents in entries:
            sink(tree.encode(entry, hard=hard) + contents)
        sink(tree.END)

    interior.put(str(directory), write, keep_kinds=keep_kinds)


def test_files_are_put_where_they_belong(interior: Interior, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    place = tmp_path / "in"
    note = {b"user.note": b"n"}
    _put(
        interior, place,
        (Entry(b"a/b", stat.S_IFDIR | 0o750, uid=3, gid=4, mtime_ns=10**18), b""),
        (Entry(b"a/b/f", stat.S_IFREG | 0o6755, uid=5, gid=6, size=5, xattrs=note), b"12345"),
        (Entry(b"s", stat.S_IFLNK | 0o777, link=b"a/b"), b""),
        (Entry(b"n", stat.S_IFCHR | 0o600, device=(1, 3)), b""),
    )  # fmt: skip
    assert (place / "a/b/f").read_bytes() == b"12345"
    info = (place / "a/b/f").stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o6755, 5, 6)
    assert os.getxattr(place / "a/b/f", "user.note") == b"n"
    assert (place / "a/b").stat().st_uid == 3
    assert (place / "s").readlink() == Path("a/b")
    assert os.stat(place / "n").st_rdev == os.makedev(1, 3)
    link = Entry(b"hard", stat.S_IFREG, link=b"a/b/f")
    _put(interior, place, (link, b""), hard=True)
    assert (place / "hard").stat().st_ino == info.st_ino


@pytest.mark.parametrize("name", [b"../out", b"a/../../out", b"/out", b"a//b", b""])
def test_a_name_cannot_lead_out(interior: Interior, tmp_path: Path, name: bytes) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises((Invalid, Unavailable)):
        _put(interior, tmp_path / "in", (Entry(name, stat.S_IFREG | 0o600, size=1), b"x"))
    assert not (tmp_path / "out").exists()


def test_kinds_are_kept_and_what_is_missing_is_named(interior: Interior, tmp_path: Path) -> None:
    place = tmp_path / "in"
    (place / "dir").mkdir(parents=True)
    (place / "file").write_bytes(b"")
    with pytest.raises(Invalid, match='overwrite directory "dir" with non-directory'):
        _put(interior, place, (Entry(b"dir", stat.S_IFREG | 0o600), b""))
    with pytest.raises(Invalid, match='overwrite non-directory "file" with directory'):
        _put(interior, place, (Entry(b"file", stat.S_IFDIR | 0o700), b""), keep_kinds=True)
    with pytest.raises(NotFound):
        _put(interior, tmp_path / "nowhere", (Entry(b"f", stat.S_IFREG | 0o600), b""))


def test_processes_are_those_of_the_workload_s_namespace(interior: Interior) -> None:
    found = list(interior.processes())
    assert any(command.startswith(b"sleep\0") for _, command, _, _ in found)
    assert all(b"(" in line for line, _, _, _ in found)


def _feed(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_connections_come_from_inside(interior: Interior) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with interior.connect("127.0.0.1", port) as ours, server.accept()[0] as theirs:
            ours.setblocking(True)
            ours.sendall(b"question")
            ours.shutdown(socket.SHUT_WR)
            assert theirs.recv(100, socket.MSG_WAITALL) == b"question"
            theirs.sendall(b"answer")
            theirs.shutdown(socket.SHUT_WR)
            assert ours.recv(100, socket.MSG_WAITALL) == b"answer"
    with pytest.raises(ConnectionRefusedError):
        interior.connect("127.0.0.1", port)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 200,
        bytes(10),
        tree.encode(Entry(b"x" * 5000, stat.S_IFREG)),
        tree.encode(Entry(b"x", stat.S_IFREG, size=1 << 60)),
        tree.encode(Entry(b"x", stat.S_IFREG, size=10)) + b"short",
        tree.encode(Entry(b"x", 0o170000)),
    ],
)
def test_nonsense_from_a_guest_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        feeder = threading.Thread(target=_feed, args=(theirs, data))
        feeder.start()
        with ours.makefile("rb") as stream, pytest.raises(Unavailable):
            _all(tree.Reader(stream))
        feeder.join()
