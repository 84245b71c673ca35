"""Sparklines: bounded memory, means over stretches, gaps."""

from __future__ import annotations

import math

import pytest

from rcpo.runs.sparkline import KEPT, LEVELS, History, extent, sparkline


def history(values: list[float | None]) -> History:
    found = History()
    for value in values:
        found.add(value)
    return found


def test_levels_go_from_low_to_high_and_gaps_are_spaces() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7) == LEVELS
    assert sparkline([-5.0, math.nan, 9.0], 0, 7) == "▁ █"
    assert sparkline([2.0, 2.0], 2, 2) == "▅▅"


def test_points_are_means_of_equal_stretches() -> None:
    assert history([1.0, 3.0, 5.0, None, 7.0]).points(3) == [2.0, 5.0, 7.0]
    assert history([1.0, 3.0]).points(8) == [1.0, 3.0]
    assert history([]).points(8) == []


def test_a_long_run_keeps_a_bounded_number_of_points() -> None:
    count = 40 * KEPT
    points = history([float(step) for step in range(count)]).points(10 * KEPT)
    assert KEPT <= len(points) < 2 * KEPT
    width = count // len(points)
    assert points[0] == pytest.approx((width - 1) / 2)  # the mean of 0, 1, …, width − 1
    assert points[-1] == pytest.approx(count - 1 - (width - 1) / 2)


def test_the_extent_is_that_of_what_is_known() -> None:
    assert extent([1.0, math.nan], [-2.0]) == (-2.0, 1.0)
    assert extent([math.nan], []) is None
