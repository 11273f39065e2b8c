"""The arithmetic of reservations: weights that keep promises, processors that are one's own. Pure.

A control group with weight w among groups that all want to run gets w / (sum of weights). So with
weights u + K·r for reservations r (of M, together R) and u for everybody without one, where all the
u add up to U, each reservation holds if K·(M - R) >= U.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HEADROOM = 0.05
"""The part of the processors that cannot be reserved: the host's own processes need some."""
IO_WHOLE, IO_SELLABLE = 100, 90
"""Percent of a disk's time."""
MARGIN = 1.25
"""How much more than what just holds: others' weights are counted, not measured."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Weights of one mechanism."""

    least: int
    usual: int
    """What a group has that asks for nothing."""
    most: int


CPU_V1 = Scale(2, 1024, 262144)
CPU_V2 = Scale(1, 100, 10000)
IO = Scale(10, 100, 1000)


def weights(
    reserved: Mapping[str, float], others: Mapping[str, int], whole: float, scale: Scale
) -> dict[str, int]:
    """The weight of every group, by name.

    `reserved` are parts of `whole`, which they do not fill; `others` are the weights that those
    without a reservation would have. These keep them as long as there are weights above them, and
    are all made smaller by one factor when there are not.
    """
    if not reserved:
        return dict(others)
    spare = whole - sum(reserved.values())
    if spare <= 0:
        raise ValueError("more is reserved than there is")
    factor = MARGIN * (sum(others.values()) + scale.usual * len(reserved)) / spare
    largest = scale.usual + factor * max(reserved.values())
    shrink = min(1.0, scale.most / largest)
    found = {
        name: _clamp((scale.usual + factor * part) * shrink, scale)
        for name, part in reserved.items()
    }
    for name, weight in others.items():
        found[name] = _clamp(weight * shrink, scale)
    return found


def _clamp(weight: float, scale: Scale) -> int:
    return max(scale.least, min(scale.most, round(weight)))


def cpu_sellable(count: int) -> int:
    """How many billionths of a processor can be reserved on a machine of `count` processors."""
    return round(count * (1 - HEADROOM) * 1_000_000_000)


def memory_sellable(total: int) -> int:
    """How many bytes of `total` can be reserved."""
    return max(0, total - max(256 << 20, total // 20))


def own_processors(wanted: int, every: Iterable[int], taken: Iterable[int]) -> list[int]:
    """Processors for one workload alone, [] if one for all the others would not remain.

    The highest numbers go first: interrupts and host daemons tend to the lowest.
    """
    free = sorted(set(every) - set(taken))
    if len(free) - wanted < 1:
        return []
    return free[-wanted:]


def as_list(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} as "0-2,5"."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
