"""`.dockerignore`: which paths of a context are left out, by moby/patternmatcher's rules.

Patterns are relative to the context's root; a leading slash means nothing. `*` and `?` stay within
a component, `**` matches any number of them, `[…]` is a class, `\\` escapes, `!` takes back what an
earlier line left out; the last pattern that matches a path, or one of its parents, decides.
"""

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid

_MOST = 10_000
_MOST_DEEP = 2
"""Times `**` stands within a component (a**b): the time grows with that power of the length."""

_SLASH_INSIDE = re.compile(r"\[[^\]]*/|\\/")
Matcher = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line."""

    text: str
    keep: bool
    """An exception (`!`)."""
    matches: Matcher


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


def matcher(pattern: str) -> Matcher:
    """What tells whether a whole path matches; ValueError for a malformed pattern."""
    parts = pattern.split("/")
    odd = any("**" in part and part != "**" for part in parts)
    if odd or _SLASH_INSIDE.search(pattern):
        compiled = re.compile(regex(pattern), re.DOTALL)
        return lambda path: compiled.fullmatch(path) is not None
    steps = [None if part == "**" else re.compile(regex(part), re.DOTALL) for part in parts]

    def matches(path: str) -> bool:
        names = path.split("/")
        count = len(names)
        places = {0}
        for number, step in enumerate(steps, 1):
            if step is not None:
                places = {
                    at + 1 for at in places if at < count and step.fullmatch(names[at]) is not None
                }
            elif number == len(steps):
                return any(at < count for at in places)
            else:
                places = set(range(min(places), count + 1))
            if not places:
                return False
        return count in places

    return matches


def regex(pattern: str) -> str:
    """A pattern as a regular expression for a whole path; ValueError for a malformed one.

    Within a component no choice is tried twice: what stands between two stars is taken where it
    first fits. That leaves `**`, of which there may be few.
    """
    if pattern.count("**") > _MOST_DEEP:
        raise ValueError(f"more than {_MOST_DEEP} times ** within components")
    out: list[str] = []
    parts = [""]  # of the component that is being read, between its stars
    at, end = 0, len(pattern)

    def close() -> None:
        out.append(parts[0])
        out.extend(f"(?>[^/]*?{part})" for part in parts[1:-1])
        if len(parts) > 1:
            out.append(f"[^/]*{parts[-1]}")
        parts[:] = [""]

    while at < end:
        character = pattern[at]
        at += 1
        if character == "*":
            if pattern[at : at + 1] == "*":
                at += 1
                if pattern[at : at + 1] == "/":
                    at += 1
                close()
                out.append(".*" if at >= end else "(.*/)?")
            elif parts[-1] or len(parts) == 1:
                parts.append("")
        elif character == "/":
            close()
            out.append("/")
        elif character == "?":
            parts[-1] += "[^/]"
        elif character == "\\":
            if at >= end:
                raise ValueError("syntax error in pattern: trailing backslash")
            parts[-1] += re.escape(pattern[at])
            at += 1
        elif character == "[":
            text, at = _class(pattern, at)
            parts[-1] += text
        else:
            parts[-1] += re.escape(character)
    close()
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
                compiled = matcher(body)
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
            if any(rule.matches(one) for one in above):
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
