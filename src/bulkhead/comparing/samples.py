"""Statistics of small samples: medians with intervals, and slopes; no assumption on the spread.

The interval of a median is made of order statistics (binomial, no normal distribution assumed),
then widened by √2: it says where another run's median is expected, not only where the true one is,
since that is what somebody who measures again wants to know.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""At least; what small samples cannot give is given by all they have, least to greatest."""

_RESAMPLED = 400


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval in which a repetition is expected."""

    value: float
    low: float
    high: float


def _rank(count: int) -> int:
    """The r such that [x(r), x(n+1-r)] holds the median with CONFIDENCE; at least 1."""
    rest, below = (1 - CONFIDENCE) / 2, 0.0
    for rank in range(count // 2 + 1):
        below += math.comb(count, rank) / 2**count
        if below > rest:
            return max(rank, 1)
    return max(count // 2, 1)


def median(values: Sequence[float]) -> Estimate:
    """The median with its interval; ValueError without values. One value: no interval at all."""
    if not values:
        raise ValueError("a median needs values")
    ordered = sorted(values)
    middle = statistics.median(ordered)
    rank = _rank(len(ordered))
    low, high = ordered[rank - 1], ordered[len(ordered) - rank]
    return Estimate(
        middle, middle - math.sqrt(2) * (middle - low), middle + math.sqrt(2) * (high - middle)
    )


def slope(points: Sequence[tuple[float, float]]) -> Estimate:
    """What y grows by with each x (Theil and Sen: the median of all pairs' slopes).

    The interval is that of resampled points (a fixed seed: equal points give equal intervals).
    ValueError with fewer than two different x.
    """
    value = _theil_sen(points)
    if value is None:
        raise ValueError("a slope needs two different places")
    # The same choice each time, and nothing secret: no cryptographic generator.
    draw = random.Random(0)  # noqa: S311
    found = [
        one
        for _ in range(_RESAMPLED)
        if (one := _theil_sen(draw.choices(points, k=len(points)))) is not None
    ]
    found.sort()
    edge = int(len(found) * (1 - CONFIDENCE) / 2)
    low, high = min(found[edge], value), max(found[-1 - edge], value)
    return Estimate(value, low, high)


def _theil_sen(points: Sequence[tuple[float, float]]) -> float | None:
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2) if a[0] != b[0]
    ]
    return statistics.median(slopes) if slopes else None


def interleaved(
    actions: Mapping[str, Callable[[], float]], rounds: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """`rounds` samples of each action, in turn, in a rotating order; `warm` rounds first, dropped.

    What drifts on the host (clock rate, other work) then meets all of them alike.
    """
    names = list(actions)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = actions[name]()
            if turn >= warm:
                found[name].append(value)
    return found
