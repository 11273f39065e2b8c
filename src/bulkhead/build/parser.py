"""Dockerfile to instructions: parser directives, continuation, comments, flags, heredocs.

The rules are those of BuildKit's frontend (docs.docker.com/reference/dockerfile). Nothing is
expanded or judged here; `instructions` does that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bulkhead.build.text import Position, Source, Spanned, join

_DIRECTIVE = re.compile(r"#[ \t]*([a-zA-Z][a-zA-Z0-9]*)[ \t]*=[ \t]*(.+?)[ \t]*\Z")
_HEREDOC = re.compile(r"(\d*)<<(-?)(['\"]?)([^<'\"\s]+)\3\Z")
_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_WITH_HEREDOCS = frozenset({"RUN", "COPY", "ADD"})
LARGEST = 4 << 20
"""Bytes of a Dockerfile."""

KEYWORDS = frozenset(
    str.split(
        "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL MAINTAINER ONBUILD RUN "
        "SHELL STOPSIGNAL USER VOLUME WORKDIR"
    )
)


@dataclass(frozen=True, slots=True)
class Heredoc:
    """A document in the file: its name, body (lines end with "\\n"), and how it was asked for.

    `expand`: its name was not quoted; `chomp`: leading tabs were taken away (<<-).
    """

    name: str
    body: str
    expand: bool
    chomp: bool
    fd: str
    at: Position


@dataclass(frozen=True, slots=True)
class Flag:
    """`--name=value` before an instruction's arguments; `value` None without "="."""

    name: str
    value: Spanned | None
    at: Spanned

    @property
    def text(self) -> str:
        """The value's text, "" without one."""
        return self.value.text if self.value is not None else ""


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction as it stands in the file; `keyword` is in capitals."""

    keyword: str
    flags: tuple[Flag, ...]
    rest: Spanned
    whole: Spanned
    heredocs: tuple[Heredoc, ...] = ()

    @property
    def at(self) -> Position:
        """Where it begins."""
        return self.whole.at(0)

    def error(self, message: str) -> Exception:
        """An error that points at the whole instruction."""
        return self.whole.error(message)


@dataclass(slots=True)
class Document:
    """A parsed file."""

    source: Source
    directives: dict[str, str] = field(default_factory=dict)
    escape: str = "\\"
    lines: list[Line] = field(default_factory=list)


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.document = Document(source)
        self.number = 0
        """Of lines read."""

    def read(self) -> Document:
        self._directives()
        while self.number < len(self.source.lines):
            self._instruction()
        return self.document

    def _directives(self) -> None:
        for number, line in enumerate(self.source.lines):
            match = _DIRECTIVE.match(line.strip(" \t"))
            if match is None or match[1].lower() not in _DIRECTIVES:
                return
            name, at = match[1].lower(), Position(number + 1, 1)
            if name in self.document.directives:
                message = f"only one {name} parser directive can be used"
                raise self.source.error(message, at, len(line))
            if name == "escape":
                if match[2] not in ("\\", "`"):
                    message = f"invalid ESCAPE '{match[2]}': must be ` or \\"
                    raise self.source.error(message, at, len(line))
                self.document.escape = match[2]
            self.document.directives[name] = match[2]
            self.number = number + 1

    def _instruction(self) -> None:
        """One logical line, or nothing if only comments and blanks are left."""
        pieces: list[tuple[str, Position]] = []
        while self.number < len(self.source.lines):
            line = self.source.lines[self.number]
            self.number += 1
            bare = line.lstrip()
            if not bare.rstrip() or bare.startswith("#"):
                if not pieces:
                    return
                continue
            indent = 0 if pieces else len(line) - len(bare)
            text, more = self._continued(line[indent:])
            pieces.append((text, Position(self.number, indent + 1)))
            if not more:
                break
        whole = join(self.source, pieces).stripped()
        if whole.text:
            self.document.lines.append(self._line(whole))

    def _continued(self, line: str) -> tuple[str, bool]:
        """The line without the escape at its end, and whether there was one."""
        bare = line.rstrip(" \t")
        escape = self.document.escape
        if bare.endswith(escape) and not bare.endswith(escape * 2):
            return bare[:-1], True
        return line, False

    def _line(self, whole: Spanned) -> Line:
        line = split(whole, self.document.escape)
        inner = line
        while inner.keyword == "ONBUILD" and inner.rest.text:
            inner = split(inner.rest, self.document.escape)
        if inner.keyword in _WITH_HEREDOCS and not inner.rest.text.startswith("["):
            found = [self._heredoc(*opening) for opening in openings(inner.rest)]
            if found:
                return Line(line.keyword, line.flags, line.rest, line.whole, tuple(found))
        return line

    def _heredoc(self, match: "re.Match[str]", at: Position) -> Heredoc:
        chomp, name = bool(match[2]), match[4]
        body: list[str] = []
        while self.number < len(self.source.lines):
            line = self.source.lines[self.number]
            self.number += 1
            if chomp:
                line = line.lstrip("\t")
            if line == name:
                text = "".join(f"{part}\n" for part in body)
                return Heredoc(name, text, not match[3], chomp, match[1], at)
            body.append(line)
        raise self.source.error(f"unterminated heredoc: no line {name!r}", at, len(match[0]))


def openings(rest: Spanned) -> list[tuple["re.Match[str]", Position]]:
    """The words that open heredocs, outside of quotes."""
    found = []
    if "<<" not in rest.text:
        return []
    for word in words(rest):
        match = _HEREDOC.match(word.text)
        if match is not None:
            found.append((match, word.at(0)))
    return found


def words(rest: Spanned, escape: str = "\\") -> list[Spanned]:
    """Words as a shell sees them, quotes and escapes left in; an open quote ends with the text."""
    found: list[Spanned] = []
    text, at, end = rest.text, 0, len(rest.text)
    while at < end:
        if text[at].isspace():
            at += 1
            continue
        first, quote = at, ""
        while at < end and (quote or not text[at].isspace()):
            character = text[at]
            if character == escape and quote != "'":
                at += 1
            elif quote:
                if character == quote:
                    quote = ""
            elif character in "'\"":
                quote = character
            at += 1
        at = min(at, end)
        found.append(rest.cut(first, at))
    return found


def split(whole: Spanned, escape: str) -> Line:
    """Keyword, flags and the rest of one logical line."""
    text = whole.text
    end = next((n for n, c in enumerate(text) if c.isspace()), len(text))
    keyword = text[:end].upper()
    rest = whole.cut(end).stripped()
    flags: list[Flag] = []
    while rest.text.startswith("--"):
        word = _flag_word(rest, escape)
        if word.text == "--":
            rest = rest.cut(2).stripped()
            break
        name, equals, _ = word.text[2:].partition("=")
        value = word.cut(len(name) + 3) if equals else None
        flags.append(Flag(name, _unquoted(value, escape) if value else None, word))
        rest = rest.cut(len(word.text)).stripped()
    return Line(keyword, tuple(flags), rest, whole)


def _flag_word(rest: Spanned, escape: str) -> Spanned:
    return words(rest, escape)[0]


def _unquoted(value: Spanned, escape: str) -> Spanned:
    """A flag's value with its quotes taken away, if it has any; `${…}` is expanded later."""
    if not any(quote in value.text for quote in "'\""):
        return value
    out: list[str] = []
    quote, at = "", 0
    text = value.text
    while at < len(text):
        character = text[at]
        if quote:
            if character == quote:
                quote = ""
            else:
                out.append(character)
        elif character in "'\"":
            quote = character
        elif character == escape and at + 1 < len(text):
            at += 1
            out.append(text[at])
        else:
            out.append(character)
        at += 1
    return Spanned(value.source, "".join(out), value.starts, value.places)


def parse(name: str, data: bytes) -> Document:
    """Read a file; DockerfileError for what cannot be one. Keywords are not checked here."""
    source = Source.of(name, data)
    if len(data) > LARGEST:
        raise source.error(f"a Dockerfile may have at most {LARGEST} bytes", Position(1, 1))
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise source.error("a NUL byte: this is not a Dockerfile", Position(line, 1))
    document = _Reader(source).read()
    if not document.lines:
        raise source.error("file with no instructions", Position(1, 1))
    return document


def distance(one: str, other: str) -> int:
    """Edits between two short words."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        before, row[0] = row[0], number
        for column, right in enumerate(other, 1):
            before, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, before + (left != right)),
            )
    return row[-1]


def closest(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant, or ""."""
    near = [
        (distance(word, other), word[:1] != other[:1], other) for other in known if len(word) < 30
    ]
    return min(near)[2] if near and min(near)[0] <= 2 else ""
