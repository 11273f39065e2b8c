"""The keeper's log format: cutting, encoding, rotation, reading back."""

import asyncio
import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bulkhead.keeper import logs
from bulkhead.keeper.journal import MAX_RECORD, LogFile, cut, encode_records, timestamp
from bulkhead.keeper.main import parse_options
from bulkhead.keeper.pump import Attachment, filter_keys

NOW = 1_700_000_000_123_456_789


def collect(path: Path, **options: int | None) -> list[logs.Record]:
    async def main() -> list[logs.Record]:
        return [r async for r in logs.read(str(path), **options)]  # type: ignore[arg-type]

    return asyncio.run(main())


@given(st.lists(st.binary(max_size=200)), st.binary(max_size=50))
def test_records_join_to_the_bytes_whatever_they_are(lines: list[bytes], rest: bytes) -> None:
    data = b"\n".join([*lines, rest])
    records, left = cut(data)
    assert b"".join(records) + left == data
    assert all(r.endswith(b"\n") and b"\n" not in r[:-1] for r in records)
    encoded = encode_records(records, 1, NOW).splitlines()
    back = [logs.decode(line) for line in encoded]
    assert [r.data for r in back if r] == records
    for line in encoded:
        assert json.loads(line)["stream"] == "stdout"


@given(st.integers(0, 4), st.integers(0, 3), st.sampled_from(["x", "ä", "€", "😀"]))
def test_long_lines_are_cut_between_characters(pages: int, extra: int, char: str) -> None:
    data = (char * (pages * MAX_RECORD // len(char.encode()) + extra)).encode()
    records, left = cut(data)
    assert b"".join(records) + left == data
    assert len(left) <= MAX_RECORD
    for record in (*records, left):
        record.decode()  # whole characters
        assert len(record) <= MAX_RECORD


@given(st.lists(st.binary(min_size=1, max_size=20_000), max_size=6))
def test_a_line_in_pieces_is_new_or_all(pieces: list[bytes]) -> None:
    """What the journal relies on: the unfinished line is a suffix of the new bytes, or all."""
    partial = b""
    for piece in pieces:
        _, rest = cut(partial + piece, len(partial))
        assert len(rest) <= len(piece) or rest == partial + piece
        partial = rest


def test_times() -> None:
    assert timestamp(NOW) == "2023-11-14T22:13:20.123456789Z"
    assert logs.parse_time(timestamp(NOW)) == NOW
    assert logs.parse_time("2023-11-14T22:13:20Z") == 1_700_000_000 * 10**9
    assert logs.parse_time("2023-11-14T22:13:20.5Z") == 1_700_000_000 * 10**9 + 5 * 10**8


def test_rotation_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path), 1000, 3)
    for n in range(100):
        log.rotate_if_full()
        log.append(encode_records([b"line %d\n" % n], 1 + n % 2, NOW + n))
    log.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    records = collect(path)
    numbers = [int(r.data.split()[1]) for r in records]
    assert numbers == list(range(numbers[0], 100))
    assert [r.stream for r in records] == [1 + n % 2 for n in numbers]
    for tail in (0, 1, 5, 20, len(numbers), 1000):
        want = numbers[len(numbers) - min(tail, len(numbers)) :]
        assert [int(r.data.split()[1]) for r in collect(path, tail=tail)] == want
    assert [r.time_ns for r in collect(path, since=NOW + 98)] == [NOW + 98, NOW + 99]
    assert collect(path, until=NOW + 97)[-1].time_ns == NOW + 97
    assert logs.size_on_disk(str(path)) == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert collect(tmp_path / "none") == []


def test_one_file_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path), 500, 1)
    for n in range(50):
        log.rotate_if_full()
        log.append(encode_records([b"line %d\n" % n], 1, NOW))
    log.close()
    assert os.listdir(tmp_path) == ["log"]
    assert collect(path)[-1].data == b"line 49\n"


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    good = encode_records([b"good\n"], 1, NOW)
    path.write_bytes(
        b"\0\0\0\n{}\n[]\n" + good + b'{"log":1,"stream":"stdout","time":""}\n' + good[:9]
    )
    assert [r.data for r in collect(path)] == [b"good\n"]


def test_a_tail_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "log"
    records = [b"%d " % n + b"y" * 5000 + b"\n" for n in range(60)]
    path.write_bytes(encode_records(records, 1, NOW))
    assert [r.data for r in collect(path, tail=40)] == records[-40:]


def test_a_tail_ends_where_the_log_ended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(encode_records([b"1\n", b"2\n"], 1, NOW))

    async def main() -> list[bytes]:
        found = []
        async for record in logs.read(str(path), tail=2):
            found.append(record.data)
            with path.open("ab") as file:  # the workload goes on writing
                file.write(encode_records([b"3\n"] * 1000, 1, NOW))
        return found

    assert asyncio.run(main()) == [b"1\n", b"2\n"]


def test_options_keep_any_path() -> None:
    text = "tty=1\ndriver=json-file\npath=/a=b\nc/\udcff"
    got = parse_options(text.encode("utf-8", "surrogateescape"))
    assert got == {"tty": "1", "driver": "json-file", "path": "/a=b\nc/\udcff"}


def test_detach_keys() -> None:
    def typed(*portions: bytes) -> tuple[bytes, bool]:
        attachment = Attachment((-1, -1, -1), b"\x10\x11", lambda why: None)
        out, detached = b"", False
        for portion in portions:
            passed, detached = filter_keys(attachment, portion)
            out += passed
        return out, detached

    assert typed(b"abc") == (b"abc", False)
    assert typed(b"a\x10\x11b") == (b"a", True)
    assert typed(b"a\x10", b"\x11") == (b"a", True)
    assert typed(b"a\x10", b"b") == (b"a\x10b", False)
    assert typed(b"\x10\x10\x11") == (b"\x10", True)
    assert typed(b"\x11\x10") == (b"\x11", False)
