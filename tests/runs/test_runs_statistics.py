"""Intervals, spreads, and ranks against tables and hand arithmetic."""

from __future__ import annotations

import math

import pytest

from rcpo.runs.statistics import Difference, Spread, paired_difference, rank_correlation, spread, t_quantile


# Abramowitz and Stegun, table 26.10, and Cauchy's closed form for one degree of freedom.
@pytest.mark.parametrize(
    ("degrees", "expected"), [(2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_t_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-4)


def test_one_degree_of_freedom_is_cauchy_and_many_are_normal() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(0.975, 100_000) == pytest.approx(1.95996, abs=1e-4)


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)), 3)
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) is None


def test_differences_are_paired_by_seed_and_the_rest_is_left_out() -> None:
    # 0.1, 0.2 and 0.3: mean 0.2, deviation 0.1, half-width 4.302653 * 0.1 / sqrt(3)
    found = paired_difference({1: 0.5, 2: 0.7, 3: 0.9, 4: 9.0}, {3: 1.2, 1: 0.6, 2: 0.9, 5: -9.0})
    assert found is not None and found.count == 3
    assert found.mean == pytest.approx(0.2)
    assert (found.high or 0) - found.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert found.mean - (found.low or 0) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_ranks_correlate_with_ties_at_their_mean() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5 of variances 4.5 and 5
    assert rank_correlation([0.1, 5.0, 5.0, 9.0], [1, 2, 30, 31]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 2], [2, 1]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_one_pair_has_no_interval_and_none_no_difference() -> None:
    assert paired_difference({1: 0.5}, {1: 0.75}) == Difference(0.25, None, None, 1)
    assert paired_difference({1: 0.5}, {2: 0.75}) is None
