"""YAML and XML of others, read as what they are: data.

YAML is read by the core schema of YAML 1.2 ("on" and "010" are not a truth and not an eight), with
the place of every mistake. Refused are duplicate keys, other keys than words, tags, and documents
that grow by aliases. XML is refused with a document type, hence with entities.
"""

import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from bulkhead.errors import Invalid, Unavailable

MOST_BYTES = 8 << 20
MOST_VALUES = 200_000
"""Of all documents of a file together, aliases counted each time."""
MOST_DEPTH = 60
MOST_DIGITS = 400

_QUOTED = frozenset("'\"|>")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def yaml_documents(text: str, source: str) -> list[Any]:
    """The documents of `text`, empty ones left out; Invalid with `source`:line:column."""
    if len(text) > MOST_BYTES:
        raise Invalid(f"{source}: more than {MOST_BYTES >> 20} MiB of YAML")
    try:
        import yaml
    except ImportError:
        raise Unavailable(f"{source}: PyYAML is needed to read it: pip install pyyaml") from None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    reader = _Reader(source)
    try:
        for event in yaml.parse(text, Loader=loader):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise Invalid(f"{place}: {error.problem or error.context or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise Invalid(f"{source}: not YAML: {error}") from None
    return [document for document in reader.documents if document is not None]


def yaml_document(text: str, source: str) -> Any:
    """The one document of `text`, None if there is none; Invalid if there are several."""
    found = yaml_documents(text, source)
    if len(found) > 1:
        raise Invalid(f"{source}: {len(found)} documents where one is expected")
    return found[0] if found else None


class _Open:
    """A sequence or mapping whose end has not come yet."""

    __slots__ = ("anchor", "before", "key", "merged", "value")

    def __init__(self, value: list[Any] | dict[str, Any], anchor: str | None, before: int) -> None:
        self.value = value
        self.anchor = anchor
        self.before = before
        """How many values had been read when it began."""
        self.key: str | None = None
        self.merged: list[dict[str, Any]] = []


class _Reader:
    """Events of PyYAML to plain values, without recursion."""

    def __init__(self, source: str) -> None:
        self.documents: list[Any] = []
        self._source = source
        self._count = 0
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}

    def _fail(self, event: Any, what: str) -> Invalid:
        mark = event.start_mark
        return Invalid(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {what}")

    def take(self, event: Any) -> None:
        """The next event."""
        kind = type(event).__name__
        if kind == "DocumentStartEvent":
            self._anchors.clear()
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            if len(self._open) >= MOST_DEPTH:
                raise self._fail(event, f"nested deeper than {MOST_DEPTH} levels")
            if self._open and isinstance(self._open[-1].value, dict) and self._open[-1].key is None:
                raise self._fail(event, "a key must be a word")
            value: Any = {} if kind == "MappingStartEvent" else []
            self._open.append(_Open(value, event.anchor, self._count))
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            self._close(event)
        elif kind == "ScalarEvent":
            self._scalar(event)
        elif kind == "AliasEvent":
            value, size = self._anchors.get(event.anchor, (None, -1))
            if size < 0:
                raise self._fail(event, f"nothing whole is called {event.anchor!r} before this")
            self._put(event, value, size)

    def _close(self, event: Any) -> None:
        done = self._open.pop()
        value = done.value
        if isinstance(value, dict):
            for one in done.merged:
                for key, inner in one.items():
                    value.setdefault(key, inner)
        size = self._count - done.before + 1
        if done.anchor:
            self._anchors[done.anchor] = (value, size)
        self._put(event, value, 1)

    def _scalar(self, event: Any) -> None:
        plain = event.style not in _QUOTED and event.tag in (None, "!")
        holder = self._open[-1] if self._open else None
        if holder is not None and isinstance(holder.value, dict) and holder.key is None:
            if event.value in holder.value:
                raise self._fail(event, f"{event.value!r} is there twice")
            holder.key = "\0<<" if plain and event.value == "<<" else event.value
            return
        value = plain_value(event.value) if plain else event.value
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)
        self._put(event, value, 1)

    def _put(self, event: Any, value: Any, size: int) -> None:
        self._count += size
        if self._count > MOST_VALUES:
            raise self._fail(event, f"more than {MOST_VALUES} values, aliases counted")
        if not self._open:
            self.documents.append(value)
            return
        holder = self._open[-1]
        if isinstance(holder.value, list):
            holder.value.append(value)
        elif holder.key is None:
            raise self._fail(event, "a key must be a word")
        elif holder.key == "\0<<":
            several = value if isinstance(value, list) else [value]
            if not all(isinstance(one, dict) for one in several):
                raise self._fail(event, "only a mapping can be merged")
            holder.merged += several
            holder.key = None
        else:
            holder.value[holder.key] = value
            holder.key = None


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted word means by the core schema of YAML 1.2."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if len(text) < MOST_DIGITS and _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if len(text) < MOST_DIGITS and _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Builder(ElementTree.TreeBuilder):
    """An element tree, unless there is a document type: so no entities."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise Invalid("it has a document type")


def xml_root(text: bytes, source: str) -> ElementTree.Element:
    """The root element; Invalid for what is no XML, is too large, or has a document type."""
    if len(text) > MOST_BYTES:
        raise Invalid(f"{source}: more than {MOST_BYTES >> 20} MiB of XML")
    try:
        parser = ElementTree.XMLParser(target=_Builder())  # noqa: S314 - so no entities
        return ElementTree.fromstring(text, parser)  # noqa: S314
    except Invalid as error:
        raise Invalid(f"{source}: {error.message}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise Invalid(f"{source}: not XML: {error}") from None


def elements(root: ElementTree.Element, path: str) -> Iterator[ElementTree.Element]:
    """Those at `path` ("devices/disk"), whatever their name space."""
    first, _, rest = path.partition("/")
    for child in root:
        if child.tag.rpartition("}")[2] == first:
            if rest:
                yield from elements(child, rest)
            else:
                yield child
