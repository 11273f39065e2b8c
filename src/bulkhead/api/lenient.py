"""Request bodies as Go's decoder reads them, made fit for the engine's strict types.

Go matches member names without regard to case, ignores members it does not know, and takes null
for "absent". `decode` gives a value of the type, or Invalid with the place of what is wrong. What
no part of the engine could take is refused here: integers beyond 64 bits, NUL characters.
"""

import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from bulkhead.errors import Invalid

_T = TypeVar("_T")
Clean = Callable[[Any], Any]
_MAX = 1 << 63
_DEPTH = 64

_known: dict[Any, Clean] = {}


def decode(data: bytes, kind: type[_T]) -> _T:
    """The JSON object `data` as `kind`; an empty body or null is an empty object."""
    if not data.strip():
        data = b"{}"
    value = parse(data)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise Invalid(f"invalid JSON: expected an object, got {_named(value)}")
    return convert(value, kind)


def parse(data: bytes) -> Any:
    """Any JSON value; Invalid if it is none."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Invalid(f"invalid JSON: {error}") from None
    _check(value, _DEPTH)
    return value


def convert(value: dict[str, Any], kind: type[_T]) -> _T:
    """A decoded object as `kind`."""
    try:
        return msgspec.convert(_cleaner(kind)(value), kind)
    except msgspec.ValidationError as error:
        raise Invalid(f"invalid JSON: {error}") from None


def _named(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Invalid("invalid JSON: a string contains a NUL character")
    elif isinstance(value, dict):
        if not depth:
            raise Invalid("invalid JSON: nested too deeply")
        for key, inner in value.items():
            if "\0" in key:
                raise Invalid("invalid JSON: a name contains a NUL character")
            _check(inner, depth - 1)
    elif isinstance(value, list):
        if not depth:
            raise Invalid("invalid JSON: nested too deeply")
        for inner in value:
            _check(inner, depth - 1)
    elif isinstance(value, int) and not -_MAX <= value < _MAX:
        raise Invalid(f"invalid JSON: number {value} is out of range")


def _cleaner(kind: Any) -> Clean:
    found = _known.get(kind)
    if found is None:
        found = _known[kind] = _make(kind)
    return found


def _same(value: Any) -> Any:
    return value


def _make(kind: Any) -> Clean:
    origin = get_origin(kind)
    if origin in {Union, types.UnionType}:
        inner = [one for one in get_args(kind) if one is not type(None)]
        cleaners = [one for one in map(_cleaner, inner) if one is not _same]
        return cleaners[0] if len(cleaners) == 1 else _same
    if origin in {list, tuple}:
        inside = _cleaner(get_args(kind)[0])
        return _same if inside is _same else _list_of(inside)
    if origin is dict:
        inside = _cleaner(get_args(kind)[1])
        return _same if inside is _same else _dict_of(inside)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _struct(kind)
    if kind is int:
        return _whole
    return _same


def _whole(value: Any) -> Any:
    """Go takes 1e3 for an integer; some clients send 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list_of(inside: Clean) -> Clean:
    def clean(value: Any) -> Any:
        return [inside(one) for one in value] if isinstance(value, list) else value

    return clean


def _dict_of(inside: Clean) -> Clean:
    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: inside(one) if one is not None else None for key, one in value.items()}

    return clean


def _struct(kind: type[msgspec.Struct]) -> Clean:
    hints = get_type_hints(kind)
    members = {}
    for attribute, name in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True):
        members[name.lower()] = (name, _cleaner(hints[attribute]))

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found = {}
        for key, inner in value.items():
            member = members.get(key.lower())
            if member is not None and inner is not None:
                found[member[0]] = member[1](inner)
        return found

    return clean
