"""Statistics of few runs: when a difference is more than noise."""

from __future__ import annotations

import itertools

import pytest

from rkcached.cli.bench.samples import EXACT_RUNS, chance, least_chance, p95, relative_spread


def test_chance_counts_all_orders() -> None:
    """The two-sided rank test equals the share of arrangements as clear, counted one by one."""
    left, right = [3.0, 4.0, 6.0, 9.0], [1.0, 2.0, 5.0, 7.0, 8.0]
    pool = sorted(left + right)

    def wins(of: tuple[float, ...]) -> int:
        rest = [value for value in pool if value not in of]
        return sum(a > b for a in of for b in rest)

    half = len(left) * len(right) / 2
    seen = abs(wins(tuple(left)) - half)
    orders = list(itertools.combinations(pool, len(left)))
    expected = sum(abs(wins(order) - half) >= seen for order in orders) / len(orders)
    assert chance(left, right) == pytest.approx(expected)


def test_few_runs_cannot_tell() -> None:
    """Five against five can be beyond a chance of 0.01, four against four cannot.

    Equal runs are pure chance.
    """
    assert least_chance(5, 5) == pytest.approx(2 / 252)
    assert least_chance(4, 4) > 0.01
    assert chance([1.0] * 5, [1.0] * 5) == 1.0
    assert chance([], [1.0]) == 1.0


def test_many_runs_go_over_into_the_normal_distribution() -> None:
    """No jump where counting ends."""
    exact = chance([float(n) for n in range(EXACT_RUNS)], [n + 5.5 for n in range(EXACT_RUNS)])
    normal = chance(
        [float(n) for n in range(EXACT_RUNS + 1)], [n + 5.5 for n in range(EXACT_RUNS + 1)]
    )
    assert normal == pytest.approx(exact, rel=0.3)


def test_spread() -> None:
    assert p95([4.0]) == 4.0
    assert relative_spread([10.0, 10.0, 10.0]) == 0
    assert relative_spread([8.0, 10.0, 12.0]) == pytest.approx(0.2)
