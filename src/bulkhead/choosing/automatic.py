"""`--boundary auto`: the same rules, for a workload that is being made, under the policy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bulkhead.choosing import docker, policy
from bulkhead.choosing.advice import Advice, Reason, advise_here, require
from bulkhead.choosing.facts import HINT, Statement
from bulkhead.choosing.items import statements
from bulkhead.choosing.policy import BOUNDARIES
from bulkhead.errors import Denied


@dataclass(frozen=True, slots=True)
class Request:
    """A workload that is being made: `config`, `host` and `image` are Docker's JSON."""

    config: Mapping[str, Any]
    host: Mapping[str, Any]
    image: Mapping[str, Any]
    machine: str
    """The host's architecture."""
    kvm: Callable[[], bool]
    """Whether the host has it; asked only if it matters."""

    def advice(self, rules: policy.Policy) -> Advice:
        """What the rules say."""
        item = docker.from_request("", self.config, {**self.host, "Runtime": ""})
        docker.add_image(item, self.image)
        stated = statements(item, self.machine)
        return advise_here(stated, rules.of(item.tenant), self._kvm, changes=False)

    def _kvm(self) -> Statement:
        return Statement("kvm", "yes" if self.kvm() else "no", HINT, "this host")


def choose(rules: policy.Policy, request: Request) -> dict[str, Any]:
    """The boundary, and why, as `inspect` shows it; Conflict if the needs contradict each other."""
    answer = request.advice(rules)
    require(answer)
    return record(answer, rules)


def allowed(rules: policy.Policy, boundary: str) -> None:
    """Denied for a boundary that is not in `allow`."""
    if boundary not in rules.allow:
        raise Denied(
            f"the policy {rules.source} allows {', '.join(rules.allow)} only, not {boundary}"
        )


def check(rules: policy.Policy, boundary: str, request: Request) -> None:
    """Denied if `boundary`, which somebody named, is less than an enforced policy asks for."""
    against = [one for one in request.advice(rules).reasons if boundary in one.excludes]
    walls = [one for one in against if _about_walls(one)]
    if walls:
        raise Denied(
            f"the policy {rules.source} is enforced, and {boundary} is too little here: "
            f"{walls[0].reason} Name another boundary, or auto"
        )


def _about_walls(reason: Reason) -> bool:
    """Whether it excludes the weakest boundaries: not what is merely impossible there."""
    count = len(reason.excludes)
    return 0 < count < len(BOUNDARIES) and reason.excludes == BOUNDARIES[:count]


def record(answer: Advice, rules: policy.Policy) -> dict[str, Any]:
    """What `inspect` keeps of an automatic choice."""
    return {
        "Boundary": answer.boundary,
        "Rules": answer.edition,
        "Policy": rules.source,
        "Facts": {
            key: {"Value": one.value, "Source": one.source}
            for key, one in answer.facts.values.items()
        },
        "Reasons": [
            {"Rule": one.rule, "Facts": list(one.facts), "Reason": one.reason, "Source": one.source}
            for one in answer.why
        ],
        "Alternative": answer.alternative,
        "Against": answer.against,
        "Warnings": answer.warnings,
    }
