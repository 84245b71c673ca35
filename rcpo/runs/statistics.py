"""Means over seeds, paired differences with their intervals, and rank correlation. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n − 1; None of a single value) of `count` runs."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of `count` paired differences with its 95 % t interval; a single pair has no interval."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation of values; None of no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def paired_difference(base: Mapping[Any, float], other: Mapping[Any, float]) -> Difference | None:
    """`other` − `base` over the keys (seeds) that both have; None where there is none."""
    differences = [other[key] - base[key] for key in base if key in other]
    found = spread(differences)
    if found is None:
        return None
    if found.deviation is None:
        return Difference(found.mean, None, None, 1)
    half = t_quantile((1 + CONFIDENCE) / 2, found.count - 1) * found.deviation / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's ρ, ties with their mean rank; None under three values or where one side is constant."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t for a probability in (0.5, 1) and whole degrees of freedom ≥ 1, by bisection.

    The distribution is closed-form there (Abramowitz and Stegun 26.7.3 and 26.7.4); good to 1e-9 relative.
    """
    low, high = 0.0, math.pi / 2  # of θ = atan(t / √degrees)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(theta: float, degrees: int) -> float:
    """P(|t| < √degrees tan θ)."""
    cosine = math.cos(theta)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (index - 1) / index
    return (2 / math.pi) * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
