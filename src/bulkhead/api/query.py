"""Parameters of a request's query, as Docker's daemon reads them."""

import json
import re
from typing import Any

from bulkhead.errors import Invalid

Query = dict[str, list[str]]
_FALSE = frozenset({"", "0", "no", "false", "none"})
_NUMBER = re.compile(r"[+-]?\d{1,18}")


def text(query: Query, name: str, default: str = "") -> str:
    """The first value; Invalid if it contains a NUL character."""
    values = query.get(name)
    if not values:
        return default
    if "\0" in values[0]:
        raise Invalid(f"invalid value for {name}")
    return values[0]


def texts(query: Query, name: str) -> list[str]:
    """Every value."""
    values = query.get(name, [])
    if any("\0" in value for value in values):
        raise Invalid(f"invalid value for {name}")
    return values


def flag(query: Query, name: str, *, default: bool = False) -> bool:
    """Go's reading: everything is true that is not "", 0, no, false or none."""
    values = query.get(name)
    if values is None:
        return default
    return values[0].strip().lower() not in _FALSE


def number(query: Query, name: str) -> int | None:
    """A whole number; None when absent or empty."""
    value = text(query, name).strip()
    if not value:
        return None
    if not value.isascii() or not _NUMBER.fullmatch(value):
        raise Invalid(f'invalid value for {name}: strconv.Atoi: parsing "{value}": invalid syntax')
    return int(value)


def filters(query: Query, name: str = "filters") -> dict[str, Any]:
    """Filters as JSON: {"key": ["value"]} or, from old clients, {"key": {"value": true}}."""
    value = text(query, name)
    if not value:
        return {}
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise Invalid(f"invalid filter: {value[:200]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Invalid(f"invalid filter: {value[:200]}")
    for key, values in found.items():
        entries = values if isinstance(values, list | dict) else None
        if entries is None or not all(isinstance(one, str) for one in entries):
            raise Invalid(f"invalid filter '{key}'")
        if isinstance(values, dict) and not all(isinstance(v, bool) for v in values.values()):
            raise Invalid(f"invalid filter '{key}'")
        if any("\0" in one or not one.isprintable() for one in (key, *entries)):
            raise Invalid(f"invalid filter '{key}'")
    return found
