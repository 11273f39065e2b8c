"""The rules as data (rules.toml): read, checked, and tried against facts."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bulkhead.choosing.data import toml
from bulkhead.choosing.facts import Facts, keys
from bulkhead.choosing.policy import BOUNDARIES
from bulkhead.errors import Internal


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. It fires when every fact of `when` was stated so."""

    name: str
    when: Mapping[str, tuple[str, ...]]
    reason: str
    source: str
    """Where the reason comes from, in words."""
    excludes: frozenset[str]
    points: Mapping[str, int]
    refuse: bool = False
    limits: str = ""

    def fires(self, facts: Facts) -> bool:
        """Whether it holds."""
        for key, values in self.when.items():
            found = facts.values.get(key)
            if (found.value if found else f"~{keys()[key].assumed}") not in values:
                return False
        return True

    def cites(self, facts: Facts) -> list[str]:
        """The facts that made it fire, as key=value."""
        return [f"{key}={facts.value(key)}" for key in self.when]


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules, and which edition they are."""

    version: int
    date: str
    rules: tuple[Rule, ...]


@functools.cache
def load() -> Rules:
    """The rules of the package."""
    return parse(toml("rules.toml"))


def parse(data: Mapping[str, Any]) -> Rules:
    """The rules in `data`; Internal for any that nobody could follow: they are ours."""
    sources = data["sources"]
    return Rules(
        data["version"],
        data["date"],
        tuple(_rule(name, row, sources) for name, row in data["rules"].items()),
    )


def _values(text: str) -> tuple[str, ...]:
    """`~value` stands for the value itself and for silence."""
    found = text.split("|")
    return (*found, *(one[1:] for one in found if one.startswith("~")))


_MEMBERS = frozenset({"when", "only", "never", "for", "refuse", "reason", "source", "limits"})


def _rule(name: str, row: Mapping[str, object], sources: Mapping[str, str]) -> Rule:
    try:
        unknown = set(row) - _MEMBERS
        if unknown:
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        when = {key: _values(text) for key, text in dict(row["when"]).items()}  # type: ignore[call-overload]
        for key, values in when.items():
            missing = {one.removeprefix("~") for one in values} - set(keys()[key].values)
            if missing:
                raise ValueError(f"{key} is never {', '.join(missing)}")
        only, never = row.get("only"), row.get("never", [])
        points: dict[str, int] = dict(row.get("for", {}))  # type: ignore[call-overload]
        excludes = set(never) | (set(BOUNDARIES) - set(only) if only else set())  # type: ignore[call-overload]
        named = excludes | set(points) | set(only or ())  # type: ignore[call-overload]
        if named - set(BOUNDARIES):
            raise ValueError("a boundary that there is not")
        return Rule(
            name,
            when,
            str(row["reason"]),
            sources[str(row["source"])],
            frozenset(excludes),
            points,
            bool(row.get("refuse", False)),
            str(row.get("limits", "")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Internal(f"rule {name}: {error}") from error
