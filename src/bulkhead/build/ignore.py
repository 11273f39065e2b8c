"""`.dockerignore`: which paths of a context are left out, by moby/patternmatcher's rules.

Patterns are relative to the context's root; a leading slash means nothing. `*` and `?` stay within
a component, `**` matches any number of them, `[…]` is a class, `\\` escapes, `!` takes back what an
earlier line left out; the last pattern that matches a path, or one of its parents, decides.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid

_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """One line."""

    text: str
    keep: bool
    """An exception (`!`)."""
    pattern: "re.Pattern[str]"


def _cleaned(line: str) -> str:
    """filepath.Clean and no slash in front, as the reader does."""
    line = posixpath.normpath(line.strip())
    line = line.lstrip("/") if len(line) > 1 else line
    return "" if line == "/" else line


def lines(text: str) -> list[str]:
    """The patterns of a file: without comments, blanks and a byte order mark."""
    found = []
    for number, raw in enumerate(text.splitlines()):
        line = raw.removeprefix("\ufeff") if number == 0 else raw
        if line.startswith("#"):
            continue
        line = line.strip()
        if not line:
            continue
        invert = line.startswith("!")
        body = line[1:].strip() if invert else line
        if body:
            body = _cleaned(body)
        found.append(f"!{body}" if invert else body)
    return found


def regex(pattern: str) -> str:
    """A pattern as a regular expression for a whole path; ValueError for a malformed one."""
    out, at, end = [], 0, len(pattern)
    while at < end:
        character = pattern[at]
        at += 1
        if character == "*":
            if pattern[at : at + 1] == "*":
                at += 1
                if pattern[at : at + 1] == "/":
                    at += 1
                out.append(".*" if at >= end else "(.*/)?")
            else:
                out.append("[^/]*")
        elif character == "?":
            out.append("[^/]")
        elif character == "\\":
            if at >= end:
                raise ValueError("syntax error in pattern: trailing backslash")
            out.append(re.escape(pattern[at]))
            at += 1
        elif character == "[":
            text, at = _class(pattern, at)
            out.append(text)
        else:
            out.append(re.escape(character))
    return "".join(out)


def _class(pattern: str, at: int) -> tuple[str, int]:
    out, end = ["["], len(pattern)
    if pattern[at : at + 1] == "^":
        out.append("^/")
        at += 1
    first = at
    while at < end and (pattern[at] != "]" or at == first):
        character = pattern[at]
        if character == "\\" and at + 1 < end:
            at += 1
            out.append(re.escape(pattern[at]))
        elif character == "-" and at > first and pattern[at + 1 : at + 2] not in ("", "]"):
            out.append("-")
        else:
            out.append(re.escape(character))
        at += 1
    if at >= end:
        raise ValueError("syntax error in pattern: missing ]")
    return "".join(out) + "]", at + 1


class Ignore:
    """The rules of one context."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Invalid for a malformed pattern."""
        self.rules: list[Rule] = []
        if len(patterns) > _MOST:
            raise Invalid(f".dockerignore has more than {_MOST} patterns")
        for text in patterns:
            keep = text.startswith("!")
            body = text[1:] if keep else text
            if not body:
                if keep:
                    raise Invalid('illegal exclusion pattern: "!"')
                continue
            try:
                compiled = re.compile(regex(body), re.DOTALL)
            except (ValueError, re.error) as error:
                raise Invalid(f"error parsing .dockerignore pattern {text!r}: {error}") from None
            self.rules.append(Rule(body, keep, compiled))
        self.has_exceptions = any(rule.keep for rule in self.rules)

    @classmethod
    def read(cls, data: bytes) -> "Ignore":
        """The rules in a file's bytes."""
        return cls(lines(data.decode("utf-8", "surrogateescape")))

    def ignored(self, path: str) -> bool:
        """Whether `path` (relative, no slash at the ends) is left out."""
        if not self.rules:
            return False
        parts = path.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        out = False
        for rule in self.rules:
            if rule.keep != out:
                continue
            if any(rule.pattern.fullmatch(one) for one in above):
                out = not rule.keep
        return out

    def prunes(self, path: str) -> bool:
        """Whether the directory `path` is left out with all below it, so need not be read."""
        if not self.ignored(path):
            return False
        if not self.has_exceptions:
            return True
        below = f"{path}/"
        for rule in self.rules:
            if not rule.keep:
                continue
            literal = re.split(r"[*?\[\\]", rule.text, maxsplit=1)[0]
            if literal.startswith(below) or below.startswith(literal):
                return False
        return True
