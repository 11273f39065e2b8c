"""A comparison from its beginning to its end."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from bulkhead.comparing import cases, machine, prepare
from bulkhead.comparing.metrics import METRICS
from bulkhead.comparing.model import VERSION, Comparison
from bulkhead.comparing.spawn import FailedError
from bulkhead.errors import Invalid, Unavailable
from bulkhead.home import Home

ROUNDS = 11
QUICK_ROUNDS = 6
"""The fewest whose extremes hold the median with 95 %."""


def compare(
    home: Home,
    *,
    image: str = "",
    command: Sequence[str] = (),
    boundaries: Sequence[str] = prepare.DEFAULT,
    peers: bool = False,
    rounds: int = ROUNDS,
    only: Sequence[str] = (),
    count: int = 0,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Measure; needs root, since caches are dropped and filters read (else those are gaps).

    `only` names groups (cases.CASES). Invalid for unknown words, Unavailable if nothing can be
    measured at all. Everything that was started or made is gone afterwards, after a failure too.
    """
    wrong = [name for name in only if name not in cases.CASES]
    if wrong:
        raise Invalid(f"no such group: {wrong[0]} (there are: {', '.join(cases.CASES)})")
    if rounds < QUICK_ROUNDS:
        raise Invalid(f"{rounds} rounds make no interval: at least {QUICK_ROUNDS}")
    if command and not image:
        raise Invalid("a command needs an image to run in")
    boundaries = prepare.boundaries(boundaries)
    begin = time.monotonic()
    found = Comparison(
        VERSION, datetime.now(UTC).isoformat(timespec="seconds"), 0.0, machine.facts(), image,
        list(command), {}, list(METRICS),
    )  # fmt: skip
    try:
        with prepare.stage(home, image, boundaries, peers=peers) as stage:
            for name, reason in stage.missing.items():
                found.miss(name, "", reason)
            rig = cases.Rig(stage, found, rounds, tell, command, count)
            cases.check(rig)
            for name, case in cases.CASES.items():
                if not only or name in only:
                    case(rig)
    except FailedError as error:
        raise Unavailable(f"the comparison ended: {error}") from None
    found.seconds = time.monotonic() - begin
    return found
