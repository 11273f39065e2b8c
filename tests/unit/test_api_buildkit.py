"""What BuildKit's clients are told, as HTTP/2 frames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.api import buildkit

SETTINGS = buildkit.frame(4, 0, 0, b"\0\4\0\1\0\0")


def test_every_call_is_refused_with_the_one_line() -> None:
    calls = buildkit.frame(1, 4, 1, b"\x83") + buildkit.frame(0, 1, 1, b"body")
    said = buildkit.replies(bytearray(SETTINGS + calls + buildkit.frame(1, 5, 3, b"\x83")))
    assert said is not None
    refusals = [buildkit.frame(1, 5, number, buildkit.REFUSAL) for number in (1, 3)]
    assert said == buildkit.frame(4, 1, 0) + b"".join(refusals)
    assert buildkit.NO_BUILDKIT.encode() in buildkit.REFUSAL
    assert buildkit.REFUSAL.startswith(b"\x88")


def test_pings_are_answered_and_acknowledgements_are_not() -> None:
    assert buildkit.replies(bytearray(buildkit.frame(6, 0, 0, b"12345678"))) == buildkit.frame(
        6, 1, 0, b"12345678"
    )
    given = buildkit.frame(4, 1, 0) + buildkit.frame(6, 1, 0, b"12345678")
    assert buildkit.replies(bytearray(given)) == b""


@pytest.mark.parametrize("data", [
    buildkit.frame(7, 0, 0, b"\0" * 8),  # the client leaves
    b"\xff\xff\xff" + buildkit.frame(0, 0, 1)[3:],  # a frame larger than agreed
])  # fmt: skip
def test_some_are_hung_up_on(data: bytes) -> None:
    assert buildkit.replies(bytearray(data)) is None


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_in_any_pieces(data: bytes, cut: int) -> None:
    whole, parts = bytearray(data), bytearray(data[:cut])
    at_once = buildkit.replies(whole)
    first = buildkit.replies(parts)
    if at_once is None or first is None:
        return
    parts += data[cut:]
    assert first + (buildkit.replies(parts) or b"") == at_once
    assert parts == whole


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254])
def test_lengths_of_header_fields(size: int) -> None:
    found = buildkit._literal("n", "v" * size)
    rest = found[3:]
    length = rest[0] if rest[0] < 127 else 127 + rest[1]
    assert length == size
    assert found.endswith(b"v" * size)
