"""Geometry across samples: what a step does to text that is not in it.

A batch's own norms hold its self-influence: E‖ŝ_w‖² = ‖S_w‖² + tr Σ_w/B, S_w = E∇z_w. What a step does to
unseen text is governed by W = ‖S_w‖², L = ‖S_l‖² and X = ⟨S_w, S_l⟩ alone, and products *between different
batches* are unbiased estimates of the three. They can be negative, so W, L and X themselves are averaged, not
their logarithms, and a band is stated only once W and L stand clear of their noise:

    X/W ≤ r ≤ L/X,   with center r̄* = √(L/W) and cosine ρ̄ = X/√(W L)

Axes: k sketch, D hidden (or 1 and P for the geometry of all parameters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcpo.method.geometry import inner

MEMORY = 0.95
"""Of the averages, per product: about 20 steps, over which the policy hardly moves."""

CLEAR = 3.0
"""Standard errors by which W and L have to exceed 0 before a band is stated."""

FEWEST = 8
"""Products before a standard error means anything."""

NAMES = (
    *("winner", "loser", "cross", "winner_error", "loser_error", "cross_error"),
    *("cosine", "self_influence"),
)
"""What is logged of the geometry itself; the band's edges follow from it."""


@dataclass(frozen=True)
class SampleGeometry:
    """Averages of W, L and X with their standard errors (None before there are two products).

    `self_influence` is 1 − W/‖ŝ_w‖²: the share of a batch's own squared norm that is its own noise.

    >>> found = SampleGeometry(4.0, 1.0, 1.9, 0.1, 0.1, 0.1, self_influence=0.5, products=20)
    >>> found.clear, found.center, found.cosine  # √(1/4), 1.9/√(4·1)
    (True, 0.5, 0.95)
    """

    winner: float
    loser: float
    cross: float
    winner_error: float | None
    loser_error: float | None
    cross_error: float | None
    self_influence: float | None
    products: int

    @property
    def clear(self) -> bool:
        """Whether W and L stand clear of their noise."""
        if self.products < FEWEST or self.winner_error is None or self.loser_error is None:
            return False
        return self.winner > CLEAR * self.winner_error and self.loser > CLEAR * self.loser_error

    @property
    def center(self) -> float | None:
        """r̄* = √(L/W); None while it is noise."""
        return math.sqrt(self.loser / self.winner) if self.clear else None

    @property
    def cosine(self) -> float | None:
        """ρ̄ = X/√(W L); None while it is noise."""
        return self.cross / math.sqrt(self.winner * self.loser) if self.clear else None

    def metrics(self) -> dict[str, Any]:
        """Names of `dynamics/samples/*` and their values, but for the band's."""
        return {name: getattr(self, name) for name in NAMES}


class CrossSamples:
    """W, L and X from the products of each step's mean scores with those of the step before it.

    `observe` takes the mean scores of a step, (2, k, D), the same on all ranks. `forget` drops the step
    before: call it where the next batch may hold examples of the last one, as at the start of an epoch.

    >>> samples = CrossSamples()
    >>> samples.observe(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])) is None  # nothing to multiply it with yet
    True
    >>> found = samples.observe(torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]))
    >>> found.winner, found.loser, found.cross  # 1·2, 0+1, ½(0 + 2)
    (2.0, 1.0, 1.0)
    """

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self._moments = _Moments(3)
        self._norm = _Moments(1)

    def observe(self, scores: Tensor) -> SampleGeometry | None:
        """Add a step; return what is known so far, or None before the first product.

        A step with scores that are not finite is left out.
        """
        return self.take(scores, self.products(scores).tolist())

    def products(self, scores: Tensor) -> Tensor:
        """Of a step's mean scores with those of the step before, and with themselves: (5,) on the device."""
        new = scores.detach()
        old = new if self.previous is None else self.previous
        products = [(new[0], old[0]), (new[1], old[1]), (new[0], old[1]), (new[1], old[0]), (new[0], new[0])]
        return torch.stack([inner(a, b) for a, b in products])

    def take(self, scores: Tensor, found: list[float]) -> SampleGeometry | None:
        """Add a step by its `products`, which were read meanwhile, as `observe` does."""
        new = scores.detach()
        if not all(map(math.isfinite, found)):
            return self.geometry()
        if self.previous is not None:
            self._moments.add([found[0], found[1], 0.5 * (found[2] + found[3])])
            self._norm.add([found[4]])
        self.previous = new
        return self.geometry()

    def forget(self) -> None:
        """Drop the step before; the averages stay."""
        self.previous = None

    def geometry(self) -> SampleGeometry | None:
        """What is known so far; None before the first product."""
        moments = self._moments
        if not moments.count:
            return None
        [norm] = self._norm.means()
        means, errors = moments.means(), moments.errors()
        share = 1 - means[0] / norm if norm > 0 else None
        return SampleGeometry(
            *(means[0], means[1], means[2]), *(errors[0], errors[1], errors[2]), share, moments.count
        )

    def state_dict(self) -> dict[str, Any]:
        """The averages, ready for JSON; `previous` is a tensor of its own."""
        return {"moments": self._moments.state_dict(), "norm": self._norm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; set `previous` too."""
        self._moments.load_state_dict(state["moments"])
        self._norm.load_state_dict(state["norm"])


class _Moments:
    """Exponentially weighted means of several series, with standard errors."""

    def __init__(self, series: int) -> None:
        self.count = 0
        self._weight = 0.0  # Σ w_i
        self._squares = 0.0  # Σ w_i²
        self._first = [0.0] * series
        self._second = [0.0] * series

    def add(self, values: list[float]) -> None:
        self.count += 1
        self._weight = MEMORY * self._weight + 1
        self._squares = MEMORY**2 * self._squares + 1
        self._first = [MEMORY * old + value for old, value in zip(self._first, values, strict=True)]
        self._second = [MEMORY * old + value**2 for old, value in zip(self._second, values, strict=True)]

    def means(self) -> list[float]:
        return [total / self._weight for total in self._first]

    def errors(self) -> list[float | None]:
        """Of the means. Consecutive products share a step, which at most doubles a mean's variance."""
        share = self._squares / self._weight**2  # 1 / effective count
        if self.count < 2:
            return [None] * len(self._first)
        means, squares = self.means(), [total / self._weight for total in self._second]
        variances = [max(square - mean**2, 0.0) / (1 - share) for mean, square in zip(means, squares)]
        return [math.sqrt(2 * variance * share) for variance in variances]

    def state_dict(self) -> list[Any]:
        return [self.count, self._weight, self._squares, self._first, self._second]

    def load_state_dict(self, state: list[Any]) -> None:
        self.count, self._weight, self._squares, self._first, self._second = state
