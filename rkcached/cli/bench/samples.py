"""Statistics of a few timed runs. Pure; no shape of their distribution is assumed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

EXACT_RUNS = 20
"""Up to so many runs on each side the test below counts all orders; above, their number is as good
as normal."""

_QUARTILES = (0.25, 0.75)


def median(samples: Sequence[float]) -> float:
    return float(np.median(samples))


def p95(samples: Sequence[float]) -> float:
    """Interpolated between order statistics; of few samples it is nearly their maximum."""
    return float(np.quantile(samples, 0.95))


def spread(samples: Sequence[float]) -> str:
    """Quartiles, and the 95 % confidence interval of the median from order statistics."""
    ordered = np.sort(samples)
    count = len(samples)
    if count < 6:  # fewer have no such interval
        return f"from {number(ordered[0])} to {number(ordered[-1])}, n={count}"

    half = 1.96 * math.sqrt(count) / 2
    ranks = np.clip([math.floor(count / 2 - half), math.ceil(count / 2 + half)], 0, count - 1)
    low, high = ordered[ranks]

    first, third = np.quantile(ordered, _QUARTILES)
    return (
        f"quartiles {number(first)} to {number(third)}, 95 % CI {number(low)} to {number(high)}, "
        f"n={count}"
    )


def relative_spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median; 0 where that means nothing."""
    if len(samples) < 2 or (middle := median(samples)) <= 0:
        return 0.0
    first, third = np.quantile(samples, _QUARTILES)
    return float((third - first) / middle)


def chance(left: Sequence[float], right: Sequence[float]) -> float:
    """Probability of so clear an order by chance: the two-sided test of Mann and Whitney."""
    n = len(left)
    m = len(right)
    if not n or not m:
        return 1.0

    differences = np.subtract.outer(left, right)
    wins = float(np.count_nonzero(differences > 0) + np.count_nonzero(differences == 0) / 2)
    low = min(wins, n * m - wins)
    if max(n, m) > EXACT_RUNS:
        sigma = math.sqrt(n * m * (n + m + 1) / 12)
        return min(1.0, math.erfc((n * m / 2 - low) / sigma / math.sqrt(2)))

    orders = sum(_orders(n, m, wins) for wins in range(math.floor(low) + 1))
    return min(1.0, 2 * orders / math.comb(n + m, n))


def least_chance(n: int, m: int) -> float:
    """The result of `chance` for so many runs when all of one side are above all of the other."""
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
    digits = 0
    if not (abs(value) >= 1000):
        digits = 2
        if abs(value) >= 10:
            digits = 1
    return f"{value:z,.{digits}f}"
