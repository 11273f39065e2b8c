"""What a hostile guest may answer when it is asked for files and processes."""

import io
import stat
import tarfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.boundaries.guest import link, tree
from bulkhead.boundaries.guest.tree import Entry
from bulkhead.engine import guest_files, table
from bulkhead.errors import BulkheadError, Invalid, Unavailable

FILE = stat.S_IFREG | 0o644
NAMES = [b"../out", b"a/../../out", b"/etc/shadow", b"a//b", b"a/./b", b"..", b"a\0b"]


def _stream(*entries: Entry) -> tree.Reader:
    data = b"".join(tree.encode(entry) + bytes(entry.size) for entry in entries) + tree.END
    return tree.Reader(io.BytesIO(data))


def _copied(reader: tree.Reader) -> Iterator[bytes]:
    entries = iter(reader)
    return guest_files.tar(reader, guest_files.renamed(next(entries), entries, b"top"))


def _committed(reader: tree.Reader) -> Iterator[bytes]:
    return guest_files.tar(reader, guest_files.committed(reader), layer=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [_copied, _committed])
def test_no_name_leads_out(make: Callable[[tree.Reader], Iterator[bytes]], name: bytes) -> None:
    with pytest.raises(Unavailable, match="name"):
        list(make(_stream(Entry(b"", stat.S_IFDIR | 0o755), Entry(name, FILE))))


def test_every_name_is_below_what_was_asked_for() -> None:
    entries = [Entry(b"", stat.S_IFDIR | 0o755), Entry(b"a", FILE, size=700), Entry(b"b/c", FILE)]
    data = b"".join(_copied(_stream(*entries)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["top", "top/a", "top/b/c"]
    with pytest.raises(Unavailable, match="without a name"):
        list(_copied(_stream(*entries, Entry(b"", FILE))))


def test_what_is_remembered_of_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_files, "MOST", 100)
    several = [Entry(b"%d" % n, FILE, nlink=2, inode=(1, n)) for n in range(101)]
    with pytest.raises(Invalid, match="several names"):
        list(_committed(_stream(*several)))


@given(st.binary(max_size=400))
def test_any_bytes_are_files_or_an_error(data: bytes) -> None:
    reader = tree.Reader(io.BytesIO(data))
    with pytest.raises(BulkheadError):
        for _ in reader:
            pass


@given(st.integers(0, 79), st.binary(min_size=1, max_size=8))
def test_a_changed_head_is_an_entry_or_an_error(at: int, noise: bytes) -> None:
    data = bytearray(tree.encode(Entry(b"name", FILE, size=3)) + b"abc" + tree.END)
    data[at : at + len(noise)] = noise
    try:
        found = list(tree.Reader(io.BytesIO(bytes(data))))
    except BulkheadError:
        return
    assert len(found) <= 1


@given(st.binary(max_size=300))
def test_process_lines_that_make_no_sense_are_left_out(line: bytes) -> None:
    assert table.parse(line, b"", 0, 0) is None


def test_a_process_may_be_called_anything() -> None:
    line = b"12 (a) b) S 1 12 " + b"0 " * 46 + b"0\n"
    found = table.parse(line, b"\xff\0x", 1, 2)
    assert found is not None
    assert found.name == "a) b"


def test_a_guest_that_goes_silent_is_given_up() -> None:
    reading, writing = link.pipe()
    with reading, writing, pytest.raises(Unavailable, match="sent nothing"):
        link.Patient(int(reading), 0.01).read(10)
