"""A Dockerfile's text with positions: errors name file, line, column, and show a caret."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from bulkhead.errors import Invalid


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a file; both count from 1, columns in characters."""

    line: int
    column: int


class DockerfileError(Invalid):
    """A mistake in a Dockerfile; `details` has file, line and column."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file's name, as the user gave it, and its lines without their ends."""

    name: str
    lines: tuple[str, ...]

    @classmethod
    def of(cls, name: str, data: bytes) -> "Source":
        """Decode UTF-8, dropping a byte order mark; what is no UTF-8 is kept as surrogates."""
        text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        lines = text.split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return cls(name, tuple(line.removesuffix("\r") for line in lines))

    def error(self, message: str, at: Position, length: int = 1) -> DockerfileError:
        """The error to raise for `length` characters from `at`."""
        return DockerfileError(
            f"{self.name}:{at.line}:{at.column}: {message}\n{self.excerpt(at, length)}",
            file=self.name,
            line=at.line,
            column=at.column,
        )

    def excerpt(self, at: Position, length: int = 1) -> str:
        """The line with a caret below it."""
        line = self.lines[at.line - 1] if 0 < at.line <= len(self.lines) else ""
        shown = "".join(c if c.isprintable() else "?" for c in line.expandtabs(1))
        number = f"{at.line:>4} | "
        start = min(at.column - 1, len(shown))
        carets = "^" * max(1, min(length, len(shown) - start))
        return f"{number}{shown}\n{' ' * (len(number) - 2)}| {' ' * start}{carets}"


@dataclass(frozen=True, slots=True)
class Spanned:
    """Text put together from pieces of several lines, which knows where each piece came from."""

    source: Source
    text: str
    starts: tuple[int, ...] = field(default=(0,))
    places: tuple[Position, ...] = field(default=(Position(1, 1),))

    def at(self, offset: int) -> Position:
        """Where the character at `offset` stands in the file."""
        index = max(bisect_right(self.starts, offset) - 1, 0)
        place = self.places[index]
        return Position(place.line, place.column + offset - self.starts[index])

    def cut(self, first: int, last: int | None = None) -> "Spanned":
        """The part from `first` to `last`."""
        last = len(self.text) if last is None else last
        starts, places = [0], [self.at(first)]
        for start, place in zip(self.starts, self.places, strict=True):
            if first < start < last:
                starts.append(start - first)
                places.append(place)
        return Spanned(self.source, self.text[first:last], tuple(starts), tuple(places))

    def stripped(self) -> "Spanned":
        """Without white space around it."""
        first = len(self.text) - len(self.text.lstrip())
        return self.cut(first, max(first, len(self.text.rstrip())))

    def error(self, message: str, first: int = 0, last: int | None = None) -> DockerfileError:
        """The error to raise for the characters from `first` to `last`."""
        last = len(self.text) if last is None else last
        return self.source.error(message, self.at(first), max(1, last - first))

    def split(self) -> list["Spanned"]:
        """The words between white space."""
        found: list[Spanned] = []
        at = 0
        for word in self.text.split():
            first = self.text.index(word, at)
            at = first + len(word)
            found.append(self.cut(first, at))
        return found


def join(source: Source, pieces: Sequence[tuple[str, Position]]) -> Spanned:
    """Put pieces of lines together."""
    starts, places, length = [], [], 0
    for text, place in pieces:
        starts.append(length)
        places.append(place)
        length += len(text)
    return Spanned(
        source, "".join(text for text, _ in pieces), tuple(starts) or (0,),
        tuple(places) or (Position(1, 1),),
    )  # fmt: skip
