"""The distribution specification's texts: challenges, error bodies, ranges. No I/O."""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PARAMETER = re.compile(
    r"[\s,]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]+))"
)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:(\d{1,18})|\*)\Z")
_UPLOAD_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})\Z")
_LONGEST_ERROR = 500


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header (RFC 9110, 11.6.1); `scheme` in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def challenges(header: str) -> list[Challenge]:
    """The challenges in `header`; what does not follow the grammar ends the list."""
    found: list[Challenge] = []
    position, end = 0, len(header)
    while position < end:
        while position < end and header[position] in ", \t":
            position += 1
        scheme = _TOKEN.match(header, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        while (parameter := _PARAMETER.match(header, position)) is not None:
            quoted, plain = parameter[2], parameter[3]
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
        found.append(Challenge(scheme[0].lower(), parameters))
    return found


def error_text(body: bytes) -> tuple[str, str]:
    """Code and one line of text from a registry's error body; ("", "") if it has none."""
    try:
        document: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", ""
    if not isinstance(document, dict):
        return "", ""
    errors = document.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else document
    if not isinstance(first, dict):
        return "", ""
    code = str(first.get("code") or "")
    message = str(first.get("message") or first.get("details") or "")
    return _line(code), _line(message)


def _line(text: str) -> str:
    """`text` as one printable line of bounded length."""
    shown = "".join(char if char.isprintable() else " " for char in text[:_LONGEST_ERROR])
    return " ".join(shown.split())


def content_range_start(header: str | None) -> tuple[int, int | None] | None:
    """First byte and total size (None: not said) of a Content-Range; None if it cannot be read."""
    match = _CONTENT_RANGE.match(header or "")
    if match is None:
        return None
    return int(match[1]), int(match[3]) if match[3] else None


def upload_offset(header: str | None) -> int:
    """How many bytes an upload session has, by its Range header ("0-N", the last byte's index)."""
    match = _UPLOAD_RANGE.match(header or "")
    if match is None:
        return 0
    return int(match[1]) + 1 if int(match[1]) else 0
