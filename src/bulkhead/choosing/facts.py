"""Facts: what is known of a workload, from where, and how firmly.

A fact is a key of facts.toml with one of its values. Several sources may speak of one: what a
description says, flags, the image, a Compose file. The most demanding value counts, unless somebody
firmly said less: then the sources contradict each other, which is told and not settled.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bulkhead.choosing.data import toml
from bulkhead.errors import Invalid

HINT, SAID, FIRM = 0, 1, 2
"""How firmly something is stated: a hint gives way to a firm word, SAID does not."""


@dataclass(frozen=True, slots=True)
class Key:
    """A thing that is asked of workloads; its values, the least demanding first."""

    name: str
    question: str
    values: dict[str, str]
    """Value: what it means."""

    @property
    def assumed(self) -> str:
        """What is taken where nobody spoke of it."""
        return next(iter(self.values))

    def rank(self, value: str) -> int:
        """How demanding a value is."""
        return list(self.values).index(value)


@dataclass(frozen=True, slots=True)
class Statement:
    """A fact as one source states it."""

    key: str
    value: str
    strength: int = SAID
    source: str = ""
    """Where it is stated, in a few words."""


@dataclass(frozen=True, slots=True)
class Clash:
    """Two statements that deny each other."""

    first: Statement
    second: Statement

    def text(self) -> str:
        """In one line."""
        one, two = self.first, self.second
        return f"{one.key} is both {one.value} ({one.source}) and {two.value} ({two.source})"


@dataclass(slots=True)
class Facts:
    """What counts of all statements."""

    values: dict[str, Statement] = field(default_factory=dict)
    clashes: list[Clash] = field(default_factory=list)
    given: list[Statement] = field(default_factory=list)

    def value(self, key: str) -> str:
        """The value in force, the assumed one where nothing was stated."""
        found = self.values.get(key)
        return found.value if found else keys()[key].assumed

    def with_(self, statement: Statement) -> "Facts":
        """The same with one fact replaced."""
        changed = dict(self.values)
        changed[statement.key] = statement
        return Facts(changed, [], [])


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every fact there is, by name."""
    data = toml("facts.toml")
    return {
        name: Key(name, row["question"], {k: v for k, v in row.items() if k != "question"})
        for name, row in data.items()
        if isinstance(row, dict)
    }


def statement(text: str, source: str, strength: int = FIRM) -> Statement:
    """`key=value` as somebody typed it; Invalid with what there is."""
    name, equals, value = text.partition("=")
    name, value = name.strip().lower(), value.strip().lower()
    known = keys().get(name)
    if known is None or not equals:
        raise Invalid(f"{text!r} is no fact: write KEY=VALUE with one of {', '.join(keys())}")
    if value not in known.values:
        raise Invalid(f"{name}: there is no {value!r}, only {', '.join(known.values)}")
    return Statement(name, value, strength, source)


def gather(statements: Iterable[Statement]) -> Facts:
    """What counts: of each key the most demanding value that no firm word denies."""
    facts = Facts(given=list(statements))
    by_key: dict[str, list[Statement]] = {}
    for one in facts.given:
        by_key.setdefault(one.key, []).append(one)
    for name, several in by_key.items():
        key = keys()[name]
        firm = [one for one in several if one.strength == FIRM]
        if firm:
            several = [one for one in several if one.strength > HINT]
        best = max(several, key=lambda one: (key.rank(one.value), one.strength))
        facts.values[name] = best
        denied = next((one for one in firm if one.value != best.value), None)
        if denied is not None:
            facts.clashes.append(Clash(denied, best))
    return facts
