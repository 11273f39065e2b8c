"""Variables and quotes in words, by BuildKit's rules: $NAME, ${NAME}, ${NAME:-word} and the rest.

${NAME-word} ${NAME:-word}    word if unset (or empty)
${NAME+word} ${NAME:+word}    word if set (and not empty)
${NAME?text} ${NAME:?text}    error if unset (or empty)
${NAME#glob} ${NAME##glob}    without the shortest (longest) prefix
${NAME%glob} ${NAME%%glob}    without the shortest (longest) suffix
${NAME/glob/text} ${NAME//glob/text}    with the first (every) match replaced
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bulkhead.build.text import Spanned

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEEPEST = 64
_LONGEST = 1 << 20
_LONGEST_MATCHED = 4096
"""Characters of a value that is matched against a glob: the time is its square."""


@dataclass(slots=True)
class _Out:
    """A word being made; `words` where white space from a variable splits."""

    parts: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, text: str) -> None:
        self.parts.append(text)
        self.size += len(text)


class _Word:
    """One pass over a text."""

    def __init__(
        self, text: Spanned, environment: Mapping[str, str], escape: str, *, raw: bool = False
    ) -> None:
        self._spanned = text
        self._text = text.text
        self._at = 0
        self._environment = environment
        self._escape = escape
        self._raw = raw
        """Quotes and escapes stay (heredoc bodies)."""
        self._depth = 0
        self.used: set[str] = set()

    def run(self) -> str:
        return self._until("")

    def _fail(self, message: str, first: int) -> Exception:
        return self._spanned.error(message, first, max(first + 1, self._at))

    def _until(self, stop: str) -> str:
        """Up to one of the characters `stop`, which is left."""
        out = _Out()
        while self._at < len(self._text):
            character = self._text[self._at]
            if stop and character in stop:
                break
            if out.size > _LONGEST:
                raise self._fail("the text becomes too long", 0)
            if character == "$":
                out.add(self._dollar())
            elif self._raw:
                out.add(self._raw_character(character))
            elif character == "'":
                out.add(self._single())
            elif character == '"':
                out.add(self._double())
            elif character == self._escape:
                self._at += 1
                if self._at < len(self._text):
                    out.add(self._text[self._at])
                    self._at += 1
            else:
                out.add(character)
                self._at += 1
        return "".join(out.parts)

    def _raw_character(self, character: str) -> str:
        self._at += 1
        following = self._text[self._at : self._at + 1]
        if character == self._escape and following in ("$", self._escape):
            self._at += 1
            return following
        return character

    def _single(self) -> str:
        first = self._at
        end = self._text.find("'", first + 1)
        if end < 0:
            self._at = len(self._text)
            raise self._fail("unexpected end of statement while looking for matching quote", first)
        self._at = end + 1
        return self._text[first + 1 : end]

    def _double(self) -> str:
        first, out = self._at, _Out()
        self._at += 1
        while self._at < len(self._text):
            character = self._text[self._at]
            if out.size > _LONGEST:
                raise self._fail("the text becomes too long", first)
            if character == '"':
                self._at += 1
                return "".join(out.parts)
            if character == "$":
                out.add(self._dollar())
                continue
            self._at += 1
            following = self._text[self._at : self._at + 1]
            if character == self._escape and following and following in f'"${self._escape}':
                character = following
                self._at += 1
            out.add(character)
        raise self._fail("unexpected end of statement while looking for matching quote", first)

    def _dollar(self) -> str:
        first = self._at
        self._at += 1
        following = self._text[self._at : self._at + 1]
        if following == "{":
            self._at += 1
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self._fail("variables are nested too deeply", first)
            value = self._braced(first)
            self._depth -= 1
            return value
        match = _NAME.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
            return self._value(match[0]) or ""
        if following.isdigit() or (following and following in "@*#?-!"):
            self._at += 1
            return ""
        return "$"

    def _value(self, name: str) -> str | None:
        self.used.add(name)
        return self._environment.get(name)

    def _braced(self, first: int) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._fail("bad substitution", first)
        name, self._at = match[0], match.end()
        value = self._value(name)
        rest = self._text[self._at : self._at + 2]
        if rest.startswith("}"):
            self._at += 1
            return value or ""
        colon = rest.startswith(":")
        operator = rest[1:2] if colon else rest[:1]
        self._at += 2 if colon else 1
        absent = value is None or (colon and not value)
        if operator and operator in "-+?":
            word = self._until("}")
            self._close(first)
            if operator == "+":
                return "" if absent else word
            if operator == "?" and absent:
                raise self._fail(f"{name}: {word or 'parameter null or not set'}", first)
            return word if absent else value or ""
        if not colon and operator and operator in "#%/":
            return self._edited(operator, value or "", first)
        raise self._fail(f"unsupported modifier ({rest}) in substitution", first)

    def _edited(self, operator: str, value: str, first: int) -> str:
        double = self._text[self._at : self._at + 1] == operator
        self._at += double
        glob = self._until("}/" if operator == "/" else "}")
        if glob.count("*") and len(value) > _LONGEST_MATCHED:
            raise self._fail(f"a value of more than {_LONGEST_MATCHED} characters", first)
        if operator != "/":
            self._close(first)
            return _trim(value, glob, suffix=operator == "%", greedy=double)
        if self._text[self._at : self._at + 1] != "/":
            raise self._fail("bad substitution: missing '/'", first)
        self._at += 1
        word = self._until("}")
        self._close(first)
        if not glob:
            return value
        pattern = re.compile(_regex(glob), re.DOTALL)
        if double and len(word) * sum(1 for _ in pattern.finditer(value)) > _LONGEST:
            raise self._fail("the text becomes too long", first)
        return pattern.sub(lambda _: word, value, count=0 if double else 1)

    def _close(self, first: int) -> None:
        if self._text[self._at : self._at + 1] != "}":
            raise self._fail("syntax error: missing '}'", first)
        self._at += 1


def _regex(glob: str) -> str:
    """A glob as a regular expression that never tries a choice twice.

    Every part between two stars is taken where it first fits, for good; only the last star is
    greedy. For globs of single characters and stars that finds the same matches.
    """
    parts, at = [""], 0
    while at < len(glob):
        character = glob[at]
        if character == "*":
            if parts[-1] or len(parts) == 1:
                parts.append("")
        elif character == "?":
            parts[-1] += "."
        elif character == "\\" and at + 1 < len(glob):
            at += 1
            parts[-1] += re.escape(glob[at])
        else:
            parts[-1] += re.escape(character)
        at += 1
    if len(parts) == 1:
        return parts[0]
    middle = "".join(f"(?>.*?{part})" for part in parts[1:-1])
    return f"{parts[0]}{middle}.*{parts[-1]}"


def _trim(value: str, glob: str, *, suffix: bool, greedy: bool) -> str:
    """Without the shortest or longest part at an end that the glob matches."""
    pattern = re.compile(_regex(glob), re.DOTALL)
    places = range(len(value) + 1)
    if suffix:
        for start in places if greedy else reversed(places):
            if pattern.fullmatch(value, start):
                return value[:start]
        return value
    for end in reversed(places) if greedy else places:
        if pattern.fullmatch(value, 0, end):
            return value[end:]
    return value


def word(
    text: Spanned,
    environment: Mapping[str, str],
    escape: str = "\\",
    used: Callable[[set[str]], None] | None = None,
) -> str:
    """`text` with variables put in and quotes taken away; `used` is told the names it asked for."""
    if not any(c in text.text for c in ("$", "'", '"', escape)):
        return text.text
    run = _Word(text, environment, escape)
    result = run.run()
    if used is not None:
        used(run.used)
    return result


def body(text: Spanned, environment: Mapping[str, str], escape: str = "\\") -> str:
    """`text` with variables put in; quotes stay."""
    if "$" not in text.text and escape not in text.text:
        return text.text
    return _Word(text, environment, escape, raw=True).run()
