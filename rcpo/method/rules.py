"""How log α follows from what is measured: from a band, from nothing (fixed), or from the outcome (`loop`).

A rule is called with a batch's `Dynamics`. It returns log α, or None where the batch says nothing, and keeps
its own averages.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from rcpo.method.band import Dynamics


class Rule(Protocol):
    """log α from a batch; None where it says nothing."""

    def __call__(self, dynamics: Dynamics) -> float | None: ...
    def metrics(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedRule:
    """A constant α."""

    def __init__(self, alpha: float) -> None:
        self._log_alpha = math.log(alpha)

    def __call__(self, dynamics: Dynamics) -> float | None:
        return self._log_alpha

    def metrics(self) -> dict[str, Any]:
        """Nothing: α is logged by the calibrator."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class BandRule:
    """α moves r to the band's center (`edge=False`, the paper's rule) or to its nearest edge (`edge=True`).

    α² r is then r*, or the edge; inside the band the edge rule gives α = 1. d_w, d_l, ‖s_w‖ and ‖s_l‖ are
    averaged in the log domain with decay `ema`, the cosine as it is; the first value starts each average. A
    batch without two positive incentives leaves their averages alone and says nothing, and likewise for the
    norms. With `samples` the band is the one across samples, whose averages `CrossSamples` keeps.
    """

    def __init__(self, *, edge: bool, samples: bool, ema: float) -> None:
        self._edge = edge
        self._samples = samples
        self._ema = ema
        self._log_incentives: list[float] | None = None
        self._log_norms: list[float] | None = None
        self._cosine: list[float] | None = None

    def __call__(self, dynamics: Dynamics) -> float | None:
        incentives = [dynamics.incentive_chosen, dynamics.incentive_rejected]
        usable = _positive(incentives)
        if usable:
            self._log_incentives = self._average(self._log_incentives, _logs(incentives))
        band = self._across_samples(dynamics) if self._samples else self._of_batches(dynamics)
        if not usable or band is None or self._log_incentives is None:
            return None
        log_center, cosine = band
        distance = log_center - (self._log_incentives[0] - self._log_incentives[1])
        return 0.5 * (_beyond(distance, cosine) if self._edge else distance)

    def _of_batches(self, dynamics: Dynamics) -> tuple[float, float] | None:
        """log r* and ρ of the averages; None for a batch without two positive norms."""
        scores = dynamics.scores
        norms = [scores.norm_chosen, scores.norm_rejected]
        if not _positive(norms):
            return None
        self._log_norms = self._average(self._log_norms, _logs(norms))
        self._cosine = self._average(self._cosine, [scores.cosine])
        return self._log_norms[1] - self._log_norms[0], self._cosine[0]

    def _across_samples(self, dynamics: Dynamics) -> tuple[float, float] | None:
        band = dynamics.sample_band
        return None if band is None else (math.log(band.center), band.cosine)

    def metrics(self) -> dict[str, Any]:
        """Nothing: the dynamics hold what the rule goes by."""
        return {}

    def _average(self, old: list[float] | None, values: list[float]) -> list[float]:
        if old is None:
            return values
        return [self._ema * a + (1 - self._ema) * b for a, b in zip(old, values, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The averages, ready for JSON."""
        return {
            "log_incentives": self._log_incentives,
            "log_norms": self._log_norms,
            "cosine": self._cosine,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._log_incentives, self._log_norms = state["log_incentives"], state["log_norms"]
        self._cosine = state["cosine"]


def _beyond(distance: float, cosine: float) -> float:
    """What is left of log r* − log r outside the band, whose half-width in logs is −log ρ; 0 inside."""
    if cosine <= 0:
        return 0.0
    return math.copysign(max(abs(distance) + math.log(min(cosine, 1.0)), 0.0), distance)


def _positive(values: list[float]) -> bool:
    return all(0 < value < math.inf for value in values)


def _logs(values: list[float]) -> list[float]:
    return [math.log(value) for value in values]
