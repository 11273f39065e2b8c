"""From a description in words to facts: a documented vocabulary, no guessing.

The words, the patterns and what they state are data (vocabulary.toml, whose head explains them).
The same text gives the same facts, always; what is said twice in other words gives them too as far
as the vocabulary knows the words. `advise` shows which words stated what.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from bulkhead.choosing.data import toml
from bulkhead.choosing.facts import FIRM, SAID, Statement

MOST_TEXT = 20_000
"""Characters of a description that are read."""
_BEFORE = 5
"""How many words before a match a negation reaches over."""
_NEGATORS = frozenset(
    str.split(
        "no not never without none neither nor nobody nothing hardly scarcely barely lack lacking"
    )
)
"""As `normal` leaves them, like all words here."""
_BOUNDS = frozenset(str.split(", but however although though whereas while yet and because since"))
_AUXILIARIES = frozenset(
    str.split(
        "is are was were be been do doe did need must shall should may can will would has have an"
    )
)
_GAP = 3
_SAFE = ("trust=", "tenancy=")
"""What a negation behind it does not take back."""
_SENTENCE = re.compile(r"[.;:!?](?:\s|$)|\n\s*\n|—|–")
_WORD = re.compile(r",|/?[a-z0-9][a-z0-9/._+#]*|/[a-z0-9][a-z0-9/._-]*")
_SHORT = (
    ("can't", "can not"), ("cannot", "can not"), ("won't", "will not"), ("n't", " not"),
    ("out of scope", "not"), ("no one", "nobody"), ("rather than", "not"), ("instead of", "not"),
    ("free of", "without"), ("throw-away", "throwaway"), ("virtualization", "virtualisation"),
    ("real time", "realtime"), ("cpus", "cpu"), ("gpus", "gpu"), ("_", " "),
)  # fmt: skip
_GONE = "·"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the vocabulary, ready for use."""

    pattern: re.Pattern[str]
    says: str
    denied: str
    firm: bool
    firm_denial: bool
    free: bool
    takes: bool
    negators: frozenset[str]
    """Negating words that are part of the pattern itself."""


def normal(word: str) -> str:
    """A word without the ending of its plural or genitive."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" and "/" not in word:
        return word[:-1]
    return word


def sentences(text: str) -> Iterator[list[str]]:
    """The words of each sentence, normalised; a comma is a word."""
    text = text[:MOST_TEXT].lower().replace("’", "'")
    for short, long in _SHORT:
        text = text.replace(short, long)
    for sentence in _SENTENCE.split(text):
        plain = sentence.replace("'s ", " ").replace("s' ", "s ").replace("'", "").replace("-", " ")
        words = [normal(word.rstrip("./")) for word in _WORD.findall(plain)]
        if words:
            yield words


def _alternatives(token: str, sets: dict[str, str]) -> str:
    options = []
    for word in token.split("|"):
        if word.startswith("@"):
            options.append(_alternatives(sets[word[1:]], sets))
            continue
        parts = [part if part.endswith("*") else normal(part) for part in word.split("_")]
        escaped = [
            re.escape(part[:-1]) + r"[^ ]*" if part.endswith("*") else re.escape(part)
            for part in parts
        ]
        options.append(" ".join(escaped))
    return "(?:" + "|".join(options) + ")"


def _compile(pattern: str, sets: dict[str, str]) -> re.Pattern[str]:
    made = "(?<= )"
    for token in pattern.split():
        if token == "..":  # noqa: S105 - a gap
            made += rf"(?:[^ ]+ ){{0,{_GAP}}}"
        elif token.startswith("?"):
            made += f"(?:{_alternatives(token[1:], sets)} )?"
        else:
            made += _alternatives(token, sets) + " "
    return re.compile(made)


@functools.cache
def vocabulary() -> tuple[Entry, ...]:
    """The vocabulary, compiled once."""
    data = toml("vocabulary.toml")
    return tuple(
        Entry(
            _compile(row["pattern"], data["sets"]),
            row.get("says", ""),
            row.get("denied", ""),
            row.get("firm", False),
            row.get("firm_denial", False),
            row.get("free", False),
            row.get("takes", False),
            frozenset(re.split(r"[ |_?]+", row["pattern"])) & _NEGATORS,
        )
        for row in data["words"]
    )


def read(text: str) -> list[Statement]:
    """The facts that a description states, each with the words that state it."""
    found: dict[tuple[str, str], Statement] = {}
    for words in sentences(text):
        line = " " + " ".join(words) + " "
        for entry in vocabulary():
            line = _apply(entry, line, found)
    return list(found.values())


def _apply(entry: Entry, line: str, found: dict[tuple[str, str], Statement]) -> str:
    position = 0
    while match := entry.pattern.search(line, position):
        position = match.end() - 1
        negated = not entry.free and _negated(entry, line, match)
        stated = entry.denied if negated else entry.says
        if stated:
            key, _, value = stated.partition("=")
            firm = entry.firm_denial if negated else entry.firm
            strength = FIRM if firm else SAID
            known = found.get((key, value))
            if known is None or known.strength < strength:
                words = match.group().strip()
                found[key, value] = Statement(
                    key, value, strength, ("not: " if negated else "") + f'"{words}"'
                )
        if entry.takes:
            start, end = match.span()
            gone = " ".join(_GONE for _ in match.group().split()) + " "
            line = line[:start] + gone + line[end:]
            position = start + len(gone) - 1
    return line


def _negated(entry: Entry, line: str, match: re.Match[str]) -> bool:
    before = line[: match.start()].split()
    reach: list[str] = []
    for word in reversed(before):
        if word in _BOUNDS or len(reach) == _BEFORE:
            break
        reach.append(word)
    if _NEGATORS.intersection(reach):
        return True
    if _NEGATORS.intersection(match.group().split()) - entry.negators:
        return True
    if not entry.denied and entry.says.startswith(_SAFE):
        return False  # "customers' code must not…" speaks of customers' code
    after = line[match.end() :].split()[:4]
    for at, word in enumerate(after):
        if word in ("not", "never", "unnecessary", "irrelevant", "absent", "unneeded"):
            return at > 0
        if word not in _AUXILIARIES:
            return False
    return False
