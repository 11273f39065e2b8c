"""From facts to a boundary, with everything that led there.

Rules exclude boundaries and give points to the others; most points win, at a tie the lightest.
The policy excludes too. If nothing is left, or facts deny each other, the needs contradict and no
boundary is named.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bulkhead.choosing import rules
from bulkhead.choosing.facts import FIRM, Facts, Statement, gather, keys, statement
from bulkhead.choosing.policy import BOUNDARIES, NONE, Policy
from bulkhead.choosing.rules import Rule
from bulkhead.errors import Conflict, Invalid

_REGULATED = frozenset({"hipaa", "pci-dss", "fedramp", "other"})
HARDWARE = frozenset({"microvm", "vm"})
"""Boundaries whose wall is the processor's, where there is KVM."""


@dataclass(frozen=True, slots=True)
class Reason:
    """A rule that fired, or a line of the policy."""

    rule: str
    facts: tuple[str, ...]
    excludes: tuple[str, ...]
    points: dict[str, int]
    reason: str
    source: str
    limits: str = ""
    refuse: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A fact that would change the answer."""

    fact: str
    boundary: str
    """The answer then; "" if the needs would contradict each other."""
    stated: bool
    """Whether the fact as it is was stated; else it is only assumed."""


@dataclass(slots=True)
class Advice:
    """The answer. `boundary` is "" if the needs contradict each other: `conflicts` says how."""

    boundary: str
    facts: Facts
    reasons: list[Reason] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    """Of the boundaries that were not excluded."""
    alternative: str = ""
    against: str = ""
    """Why the alternative was not chosen."""
    conflicts: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    edition: int = 0
    """The version of the rules."""

    @property
    def why(self) -> list[Reason]:
        """The reasons that speak for the chosen boundary."""
        chosen = self.boundary
        return [
            one
            for one in self.reasons
            if one.points.get(chosen, 0) > 0 or (one.excludes and chosen not in one.excludes)
        ]


def advise(
    statements: Iterable[Statement], policy: Policy = NONE, *, changes: bool = True
) -> Advice:
    """What these statements ask for under this policy."""
    facts = gather([*statements, *_needs(policy)])
    answer = _decide(facts, policy)
    if changes and answer.boundary:
        answer.changes = _changes(facts, policy, answer.boundary)
    return answer


def advise_here(
    statements: Iterable[Statement],
    policy: Policy,
    kvm: Callable[[], Statement],
    *,
    changes: bool = True,
) -> Advice:
    """The same on this host: `kvm`, which takes its time, is asked only if it could matter."""
    stated = list(statements)
    answer = advise(stated, policy, changes=False)
    if answer.boundary != "container" or _BY_KVM & set(answer.facts.values):
        stated.append(kvm())
        answer = advise(stated, policy, changes=False)
    if changes and answer.boundary:
        answer.changes = _changes(answer.facts, policy, answer.boundary)
    return answer


_BY_KVM = frozenset({"latency", "work"})
"""Facts of which KVM decides what they mean for a container too."""


def _needs(policy: Policy) -> list[Statement]:
    found = []
    for key, value in policy.needs.items():
        for one in [value] if isinstance(value, str) else value:
            found.append(statement(f"{key}={one}", f"{policy.source}: needs"))
    return found


def _fired(facts: Facts, policy: Policy) -> list[Reason]:
    found = [_reason(rule, facts) for rule in rules.load().rules if rule.fires(facts)]
    return [*found, *_by_policy(facts, policy)]


def _reason(rule: Rule, facts: Facts) -> Reason:
    return Reason(
        rule.name, tuple(rule.cites(facts)),
        tuple(one for one in BOUNDARIES if one in rule.excludes), dict(rule.points),
        rule.reason, rule.source, rule.limits, rule.refuse,
    )  # fmt: skip


def _by_policy(facts: Facts, policy: Policy) -> list[Reason]:
    found = []

    def add(key: str, cites: tuple[str, ...], excludes: Iterable[str], reason: str) -> None:
        out = tuple(excludes)
        if out:
            found.append(Reason(f"policy.{key}", cites, out, {}, reason, policy.source))

    trust, regulated = facts.value("trust"), facts.value("compliance")
    if policy.untrusted and trust == "untrusted":
        add("untrusted", (f"trust={trust}",), weaker(policy.untrusted),
            f"The policy asks for {policy.untrusted} or more for untrusted code.")  # fmt: skip
    if policy.regulated and regulated in _REGULATED:
        add("regulated", (f"compliance={regulated}",), weaker(policy.regulated),
            f"The policy asks for {policy.regulated} or more for what is regulated.")  # fmt: skip
    least = policy.tenants[policy.tenant].boundary if policy.tenant else ""
    if least:
        add("tenants", (), weaker(least),
            f"The policy gives tenant {policy.tenant} {least} or more.")  # fmt: skip
    add("allow", (), (one for one in BOUNDARIES if one not in policy.allow),
        f"The policy allows {', '.join(policy.allow)} only.")  # fmt: skip
    if policy.require_kvm and facts.value("kvm") == "no":
        add("require-kvm", ("kvm=no",), (one for one in BOUNDARIES if one in HARDWARE),
            "The policy asks for KVM behind a guest, and this host has none.")  # fmt: skip
    if policy.default != "container":
        said = f"The policy's default is {policy.default}."
        found.append(Reason("policy.default", (), (), {policy.default: 1}, said, policy.source))
    return found


def weaker(boundary: str) -> tuple[str, ...]:
    """The boundaries that separate less than this one."""
    return BOUNDARIES[: BOUNDARIES.index(boundary)]


def _decide(facts: Facts, policy: Policy) -> Advice:
    reasons = _fired(facts, policy)
    left = [one for one in BOUNDARIES if not any(one in why.excludes for why in reasons)]
    points = {one: sum(why.points.get(one, 0) for why in reasons) for one in left}
    answer = Advice("", facts, reasons, points, edition=rules.load().version)
    answer.conflicts = [one.text() for one in facts.clashes]
    answer.conflicts += [
        f"{' and '.join(one.facts)}: {one.reason}" for one in reasons if one.refuse
    ]
    if not left:
        answer.conflicts.append(_empty(reasons))
    if answer.conflicts:
        return answer
    order = sorted(left, key=lambda one: (-points[one], BOUNDARIES.index(one)))
    answer.boundary = order[0]
    answer.alternative, answer.against = _second(answer, order)
    answer.warnings = [
        f"{why.rule}: {why.limits}" for why in reasons if why.limits and why in answer.why
    ]
    if answer.boundary == "container" and "trust" not in facts.values:
        answer.warnings.append("nobody said whose code it is: for untrusted code it is too little")
    if facts.value("kvm") == "no" and answer.boundary in HARDWARE:
        answer.warnings.append(
            "this host has no KVM: the guest's processor is emulated, which is slower, and its "
            "wall is the emulator in its jail, not the hardware (docs/security.md)"
        )
    return answer


def _empty(reasons: list[Reason]) -> str:
    """Which few reasons together leave nothing: as few as there are, named."""
    best = [one for one in reasons if one.excludes]
    for one in list(best):
        rest = [other for other in best if other is not one]
        if set(BOUNDARIES) <= {name for other in rest for name in other.excludes}:
            best = rest
    said = "; ".join(
        f"{' and '.join(one.facts) or one.rule} rules out {', '.join(one.excludes)} ({one.reason})"
        for one in best
    )
    return f"no boundary meets all of it: {said}"


def _second(answer: Advice, order: list[str]) -> tuple[str, str]:
    """The strongest alternative, and what stood against it."""
    if len(order) > 1:
        second = order[1]
        if answer.points[second] == answer.points[order[0]]:
            return second, f"as many points, but {order[0]} is lighter"
        return second, f"{answer.points[second]} points instead of {answer.points[order[0]]}"
    for second in sorted(
        (one for one in BOUNDARIES if one != order[0]),
        key=lambda one: (
            sum(one in why.excludes for why in answer.reasons),
            abs(BOUNDARIES.index(one) - BOUNDARIES.index(order[0])),
        ),
    ):
        rule = next(why for why in answer.reasons if second in why.excludes)
        return second, f"ruled out by {rule.rule}: {rule.reason}"
    return "", ""


def _changes(facts: Facts, policy: Policy, boundary: str) -> list[Change]:
    """Single facts that would lead elsewhere; those only assumed come first."""
    found = []
    for key in keys().values():
        if key.name == "kvm":
            continue
        stated = key.name in facts.values
        for value in key.values:
            if value == facts.value(key.name):
                continue
            other = _decide(facts.with_(Statement(key.name, value)), policy).boundary
            if other != boundary:
                found.append(Change(f"{key.name}={value}", other, stated))
    return sorted(found, key=lambda one: (not one.boundary, one.stated))


def require(answer: Advice) -> str:
    """The boundary; Conflict in one line if the needs contradict each other."""
    if not answer.boundary:
        raise Conflict("the needs contradict each other: " + "; ".join(answer.conflicts))
    return answer.boundary


def flag(key: str, value: str) -> Statement:
    """What a flag of the command line states; Invalid for a value that there is not."""
    if key not in keys():
        raise Invalid(f"there is no fact {key}")
    return statement(f"{key}={value}", f"--{key}", FIRM)
