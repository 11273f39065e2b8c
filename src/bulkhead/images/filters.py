"""Filters of `images` and of pruning, in Docker's words and shapes.

`filters` is what clients send: {"label": ["a=b"]} or the older {"label": {"a=b": true}}.
"""

import datetime
import fnmatch
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec

from bulkhead.errors import Invalid
from bulkhead.images.catalog import Image
from bulkhead.images.describe import instant
from bulkhead.images.names import Entry, Snapshot

LIST = frozenset({"dangling", "label", "label!", "before", "since", "reference", "until"})
PRUNE = frozenset({"dangling", "label", "label!", "until"})

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TRUE = frozenset({"1", "true", "t", "T", "TRUE", "True"})
_FALSE = frozenset({"0", "false", "f", "F", "FALSE", "False"})

Filters = dict[str, list[str]]


def normalise(filters: Mapping[str, Any] | None, allowed: Collection[str]) -> Filters:
    """`filters` with lists as values; Invalid, in Docker's words, for a name not `allowed`."""
    result: Filters = {}
    for name, values in (filters or {}).items():
        if name not in allowed:
            raise Invalid(f"invalid filter '{name}'")
        if isinstance(values, Mapping):
            result[name] = [str(value) for value, wanted in values.items() if wanted]
        elif isinstance(values, list | tuple):
            result[name] = [str(value) for value in values]
        else:
            raise Invalid(f"invalid value of filter '{name}': a list is expected")
    return result


def flag(filters: Filters, name: str, default: bool | None) -> bool | None:
    """A boolean filter's value, `default` if it is not given."""
    values = set(filters.get(name, ()))
    if not values:
        return default
    if values <= _TRUE:
        return True
    if values <= _FALSE:
        return False
    raise Invalid(f"invalid filter '{name}={','.join(sorted(values))}'")


def moment(text: str, now: float) -> float:
    """Seconds since 1970 of a timestamp (RFC 3339, a date, unix seconds) or of a duration ago."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return now - sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    for layout in (text, text + "Z", text + "T00:00:00Z", text + ":00Z"):
        try:
            parsed = msgspec.convert(layout, datetime.datetime)
        except (msgspec.ValidationError, ValueError):
            continue
        return parsed.timestamp()
    raise Invalid(f"failed to parse {text!r} as a time or a duration (24h, 2006-01-02T15:04:05Z)")


def _labels_match(image: Image, wanted: list[str]) -> bool:
    labels = image.config.container.labels or {}
    for term in wanted:
        key, equals, value = term.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def reference_matches(entry: Entry, pattern: str) -> bool:
    """Docker's `reference` filter: a glob over the familiar name, with or without the tag."""
    if entry.reference is None:
        return False
    expression = re.compile(_glob(pattern))
    shown = (entry.reference.familiar, entry.reference.familiar_name)
    full = (str(entry.reference), entry.reference.name)
    return any(expression.fullmatch(text) for text in (*shown, *full))


def familiar_names(entries: Iterable[Entry], patterns: Iterable[str]) -> set[str]:
    """Those names among `entries` that one of the `reference` patterns means."""
    wanted = list(patterns)
    return {
        entry.reference.familiar
        for entry in entries
        if entry.reference is not None and any(reference_matches(entry, one) for one in wanted)
    }


def _glob(pattern: str) -> str:
    """A regular expression of Go's path.Match: `*` and `?` do not cross a slash."""
    translated: list[str] = []
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if char == "[" and (end := pattern.find("]", position + 1)) > 0:
            translated.append(fnmatch.translate(pattern[position : end + 1])[4:-3])
            position = end
        elif char in "*?":
            translated.append("[^/]*" if char == "*" else "[^/]")
        elif char == "\\" and position + 1 < len(pattern):
            position += 1
            translated.append(re.escape(pattern[position]))
        else:
            translated.append(re.escape(char))
        position += 1
    return "".join(translated)


def predicate(
    filters: Filters, snapshot: Snapshot, find: Callable[[str], Image]
) -> Callable[[Image], bool]:
    """Whether an image passes every filter but `dangling`'s default; `find` resolves references."""
    tests: list[Callable[[Image], bool]] = []
    now = time.time()
    for text in filters.get("before", ()):
        limit = instant(find(text).created)
        tests.append(lambda image, limit=limit: instant(image.created) < limit)  # type: ignore[misc]
    for text in filters.get("since", ()):
        limit = instant(find(text).created)
        tests.append(lambda image, limit=limit: instant(image.created) > limit)  # type: ignore[misc]
    for text in filters.get("until", ()):
        limit = moment(text, now)
        tests.append(lambda image, limit=limit: instant(image.created) < limit)  # type: ignore[misc]
    if wanted := filters.get("label"):
        tests.append(lambda image: _labels_match(image, wanted))
    if unwanted := filters.get("label!"):
        tests.append(lambda image: not any(_labels_match(image, [term]) for term in unwanted))
    if patterns := filters.get("reference"):
        tests.append(
            lambda image: any(
                reference_matches(entry, pattern)
                for entry in snapshot.by_image[image.id]
                for pattern in patterns
            )
        )
    dangling = flag(filters, "dangling", None)
    if dangling is not None:
        tests.append(lambda image: is_dangling(snapshot, image.id) == dangling)
    return lambda image: all(test(image) for test in tests)


def is_dangling(snapshot: Snapshot, image: str) -> bool:
    """Whether the image has no tag; a digest alone does not keep it named, as in Docker's list."""
    return not any(
        entry.reference is not None and entry.reference.tag is not None
        for entry in snapshot.by_image.get(image, ())
    )
