"""Docker's filters: {"key": ["value", …]}, from older clients {"key": {"value": true}}. Pure."""

import datetime
import re
import time
from collections.abc import Mapping
from typing import Any

from bulkhead.errors import Invalid

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|d|w)")
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9,
          "h": 3600 * 10**9, "d": 86400 * 10**9, "w": 7 * 86400 * 10**9}  # fmt: skip


def normalise(given: Mapping[str, Any] | None, allowed: frozenset[str]) -> dict[str, list[str]]:
    """Lists of strings by key; Invalid for a key that is not `allowed`."""
    found: dict[str, list[str]] = {}
    for key, values in (given or {}).items():
        if key not in allowed:
            raise Invalid(f"invalid filter '{key}'")
        if isinstance(values, Mapping):
            found[key] = [str(value) for value, wanted in values.items() if wanted]
        elif isinstance(values, str):
            found[key] = [values]
        else:
            found[key] = [str(value) for value in values]
    return found


def moment_ns(text: str | float | None) -> int | None:
    """Nanoseconds since the epoch of a timestamp, RFC 3339 time, or how long ago ("10m")."""
    if text is None or text == "":
        return None
    if isinstance(text, int | float):
        return int(text * 10**9)
    if re.fullmatch(r"-?\d+(\.\d*)?", text):
        seconds, _, fraction = text.partition(".")
        return int(seconds) * 10**9 + int((fraction + "0" * 9)[:9])
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return time.time_ns() - sum(int(float(n) * _UNITS[unit]) for n, unit in parts)
    fraction_ns = 0
    match = re.fullmatch(r"(.*?:\d\d)\.(\d+)(.*)", text)
    if match is not None:
        text, fraction_ns = match[1] + match[3], int((match[2] + "0" * 9)[:9])
    try:
        parsed = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise Invalid(f'failed to parse time "{text}"') from None
    if parsed.tzinfo is None:
        parsed = parsed.astimezone()
    return int(parsed.timestamp()) * 10**9 + fraction_ns


def labels_match(labels: Mapping[str, str], wanted: list[str]) -> bool:
    """Whether every "key" or "key=value" is there."""
    for entry in wanted:
        key, separator, value = entry.partition("=")
        if key not in labels or (separator and labels[key] != value):
            return False
    return True


def truth(values: list[str]) -> bool:
    """A filter that is true or false; Invalid otherwise."""
    value = values[-1].lower()
    if value in {"1", "t", "true"}:
        return True
    if value in {"0", "f", "false"}:
        return False
    raise Invalid(f"invalid filter value: {values[-1]}")
