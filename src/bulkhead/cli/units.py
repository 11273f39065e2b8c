"""Sizes, times and ids as docker prints them."""

import time
from datetime import UTC, datetime

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def _scaled(size: float, base: float, units: tuple[str, ...]) -> tuple[float, str]:
    at = 0
    while size >= base and at < len(units) - 1:
        size /= base
        at += 1
    return size, units[at]


def _significant(number: float, digits: int) -> str:
    """Like C's %.*g, without an exponent for what sizes can be."""
    text = f"{number:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def human_size(size: float, digits: int = 4) -> str:
    """`1.234kB`, `78.6MB`: powers of 1000, at most `digits` significant ones."""
    number, unit = _scaled(float(size), 1000.0, _DECIMAL)
    return f"{_significant(number, digits)}{unit}"


def short_size(size: float) -> str:
    """`78.6MB`: three digits, as the image table shows."""
    return human_size(size, 3)


def binary_size(size: float) -> str:
    """`1.5GiB`: powers of 1024, as stats show."""
    number, unit = _scaled(float(size), 1024.0, _BINARY)
    return f"{_significant(number, 4)}{unit}"


def human_duration(seconds: float) -> str:
    """`Less than a second`, `5 seconds`, `About a minute`, `3 hours`, `2 weeks`, …"""
    whole = int(seconds)
    minutes, hours = whole // 60, int(seconds / 3600 + 0.5)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{hours // 24 // 365} years"


def ago(unix_s: float) -> str:
    """`5 minutes ago`; `N/A` for no time."""
    if unix_s <= 0:
        return "N/A"
    return f"{human_duration(max(time.time() - unix_s, 0))} ago"


def parse_time(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time as APIs give it; 0 for none or the zero time."""
    if not text or text.startswith("0001-"):
        return 0.0
    head, dot, tail = text.partition(".")
    fraction = 0.0
    zone = ""
    if dot:
        digits = len(tail) - len(tail.lstrip("0123456789"))
        fraction = float(f"0.{tail[:digits] or '0'}")
        zone = tail[digits:]
    else:
        for mark in ("Z", "+", "-"):
            at = head.rfind(mark)
            if at >= 19:
                head, zone = head[:at], head[at:]
                break
    offset = zone.replace("Z", "+00:00") or "+00:00"
    return datetime.fromisoformat(head + offset).timestamp() + fraction


def moment(text: str) -> str:
    """--since and --until for the engine: `42m30s` ago, a date, or seconds, as Unix seconds."""
    from bulkhead.cli.options import UsageError, parse_duration

    try:
        float(text)
        return text
    except ValueError:
        pass
    try:
        return f"{time.time() - parse_duration(text) / 1e9:.9f}"
    except ValueError:
        pass
    try:
        local = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise UsageError(
            f'failed to parse time "{text}": use 2006-01-02T15:04:05, 10m, or Unix seconds'
        ) from None
    return f"{local.astimezone(UTC).timestamp():.9f}"


def local_time(unix_s: float) -> str:
    """`2024-05-01 12:00:00 +0000 UTC`, as docker prints CreatedAt."""
    at = datetime.fromtimestamp(unix_s).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S %z} {at.tzname()}"


def short_id(identity: str) -> str:
    """The first twelve characters, without the algorithm."""
    return identity.rpartition(":")[2][:12]


def ellipsis_text(text: str, width: int) -> str:
    """`text` cut to `width` characters, the last a … when something is left out."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
