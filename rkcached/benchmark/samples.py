"""Statistics of a few timed runs. Pure; no shape of their distribution is assumed."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

EXACT_RUNS = 20
"""Up to so many runs on each side the test below counts all orders; above, their number is as good as normal."""


def p95(samples: Sequence[float]) -> float:
    """Interpolated between order statistics; of few samples it is nearly their maximum."""
    return statistics.quantiles(samples, n=20, method="inclusive")[-1] if len(samples) > 1 else samples[0]


def spread(samples: Sequence[float]) -> str:
    """Quartiles, and the 95 % confidence interval of the median from order statistics."""
    ordered, count = sorted(samples), len(samples)
    if count < 6:  # fewer have no such interval
        return f"from {number(ordered[0])} to {number(ordered[-1])}, n={count}"
    half = 1.96 * math.sqrt(count) / 2
    low, high = ordered[max(0, math.floor(count / 2 - half))], ordered[min(count - 1, math.ceil(count / 2 + half))]
    first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return f"quartiles {number(first)} to {number(third)}, 95 % CI {number(low)} to {number(high)}, n={count}"


def relative_spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median; 0 where that says nothing."""
    middle = statistics.median(samples) if samples else 0.0
    if len(samples) < 2 or middle <= 0:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / middle


def chance(left: Sequence[float], right: Sequence[float]) -> float:
    """How probable so clear an order of both is if nothing differs: the two-sided rank test of Mann and Whitney."""
    n, m = len(left), len(right)
    if not n or not m:
        return 1.0
    wins = sum((a > b) + (a == b) / 2 for a in left for b in right)
    low = min(wins, n * m - wins)
    if max(n, m) > EXACT_RUNS:
        sigma = math.sqrt(n * m * (n + m + 1) / 12)
        return min(1.0, math.erfc((n * m / 2 - low) / sigma / math.sqrt(2)))
    orders = sum(_orders(n, m, wins) for wins in range(math.floor(low) + 1))
    return min(1.0, 2 * orders / math.comb(n + m, n))


def least_chance(n: int, m: int) -> float:
    """What `chance` says of so many runs when all of one side are above all of the other."""
    return chance([1.0] * n, [0.0] * m)


@functools.cache
def _orders(n: int, m: int, wins: int) -> int:
    """Orders of n and m runs in which one of the n is above one of the m exactly `wins` times."""
    if wins < 0:
        return 0
    if not n or not m:
        return int(wins == 0)
    return _orders(n - 1, m, wins - m) + _orders(n, m - 1, wins)


def number(value: float) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:z,.{digits}f}"
