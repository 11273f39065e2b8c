"""The boundary of a workload that is being made: named by somebody, or chosen by the rules."""

from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.choosing import policy
from bulkhead.engine import body
from bulkhead.images.catalog import Image, host_platform

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

AUTO = "auto"


def allowed(engine: "Engine", boundary: str) -> None:
    """Denied for a boundary that an enforced policy does not allow."""
    rules = policy.load(engine.home)
    if rules.enforce:
        from bulkhead.choosing import automatic

        automatic.allowed(rules, boundary)


def settle(
    engine: "Engine", named: str, request: body.CreateBody, image: Image
) -> tuple[str, dict[str, Any] | None]:
    """The boundary, and why if the rules chose it.

    `named` is what somebody asked for, "" if nobody did. Conflict if the needs contradict each
    other, Denied if an enforced policy asks for more than was named, Invalid for a policy that
    cannot be read: then nothing is made.
    """
    rules = policy.load(engine.home)
    wanted = named or rules.unnamed
    if wanted != AUTO and not rules.enforce:
        return wanted, None
    from bulkhead.choosing import automatic

    asked = msgspec.to_builtins(request)
    shown = {
        "Os": image.config.os,
        "Architecture": image.config.architecture,
        "Size": image.size,
        "Config": msgspec.to_builtins(image.config.container),
    }
    facts = automatic.Request(
        asked, asked.get("HostConfig") or {}, shown, host_platform().architecture,
        kvm=lambda: acceleration().name == "kvm",
    )  # fmt: skip
    if wanted != AUTO:
        automatic.allowed(rules, wanted)
        automatic.check(rules, wanted, facts)
        return wanted, None
    chosen = automatic.choose(rules, facts)
    return str(chosen["Boundary"]), chosen
