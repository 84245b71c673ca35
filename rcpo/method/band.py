"""The disentanglement band, and one batch's incentives and geometry (arXiv 2604.18239).

Under gradient flow the winner does not fall and the loser does not rise exactly when the incentive ratio
r = d_w/d_l lies in the band ρ r* ≤ r ≤ r*/ρ, with r* = ‖s_l‖/‖s_w‖ and ρ = cos(s_w, s_l).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rcpo.method.geometry import ScoreGeometry
from rcpo.method.samples import NAMES, SampleGeometry

BAND = ("band_center", "band_lower", "band_upper", "in_band")
SAMPLE_METRICS = tuple(f"dynamics/samples/{name}" for name in (*NAMES, *BAND))
"""The names of the geometry across samples in a metrics row."""


@dataclass(frozen=True)
class DisentanglementBand:
    """The incentive ratios that lower the loser without lowering the winner.

    >>> band = DisentanglementBand(center=2.0, cosine=0.5)
    >>> band.lower, band.upper, 1.5 in band, 0.9 in band
    (1.0, 4.0, True, False)
    """

    center: float
    cosine: float

    @property
    def lower(self) -> float:
        """ρ r*: below it the winner falls."""
        return self.cosine * self.center

    @property
    def upper(self) -> float | None:
        """r*/ρ: above it the loser rises; None (no bound) for ρ ≤ 0."""
        return self.center / self.cosine if self.cosine > 0 else None

    def __contains__(self, ratio: float) -> bool:
        return self.lower <= ratio and (self.upper is None or ratio <= self.upper)


@dataclass(frozen=True)
class Movement:
    """How far responses that the policy has not been trained on have moved: nats per token, batch means.

    `winner` and `loser` are mean log-ratios per token against the policy that training started from, `steps`
    the optimizer steps since the last reading.

    >>> Movement(winner=-0.02, loser=-0.05)  # both fell
    Movement(winner=-0.02, loser=-0.05, steps=1.0)
    """

    winner: float
    loser: float
    steps: float = 1.0


@dataclass(frozen=True)
class Dynamics:
    """Incentives and score geometry of one batch: batch means over all ranks and micro-batches.

    `samples` is the geometry across samples and `movement` that of fresh responses, where they are known.

    >>> dynamics = Dynamics(1.0, 2.0, ScoreGeometry(norm_chosen=1.0, norm_rejected=2.0, cosine=0.5))
    >>> dynamics.incentive_ratio, dynamics.band
    (0.5, DisentanglementBand(center=2.0, cosine=0.5))
    """

    incentive_chosen: float
    incentive_rejected: float
    scores: ScoreGeometry
    samples: SampleGeometry | None = None
    movement: Movement | None = None

    @property
    def incentive_ratio(self) -> float | None:
        """r = d_w/d_l; None where a side has no positive, finite incentive, so that r says nothing."""
        if not (0 < self.incentive_chosen < math.inf and 0 < self.incentive_rejected < math.inf):
            return None  # NaN is neither
        ratio = self.incentive_chosen / self.incentive_rejected
        return ratio if 0 < ratio < math.inf else None

    @property
    def band(self) -> DisentanglementBand | None:
        """The batch's own band; None where r is None, or a score vanishes or is not finite."""
        scores = self.scores
        if self.incentive_ratio is None or not (scores.norm_chosen > 0 and scores.norm_rejected > 0):
            return None
        band = DisentanglementBand(scores.norm_rejected / scores.norm_chosen, scores.cosine)
        return band if 0 < band.center < math.inf and math.isfinite(band.cosine) else None

    @property
    def sample_band(self) -> DisentanglementBand | None:
        """The band across samples, X/W ≤ r ≤ L/X; None while W and L do not stand clear of their noise."""
        samples = self.samples
        if samples is None or samples.cosine is None or samples.center is None:
            return None
        return DisentanglementBand(samples.center, min(samples.cosine, 1.0))  # above 1 it is noise

    def metrics(self) -> dict[str, Any]:
        """The `dynamics/*` entries of a metrics row; None where a value is not defined.

        `in_band` is None wherever r or the band is: what is not known is neither inside nor outside.
        """
        ratio = self.incentive_ratio
        own = {
            "dynamics/incentive_chosen": self.incentive_chosen,
            "dynamics/incentive_rejected": self.incentive_rejected,
            "dynamics/score_norm_chosen": self.scores.norm_chosen,
            "dynamics/score_norm_rejected": self.scores.norm_rejected,
            "dynamics/score_cosine": self.scores.cosine,
            "dynamics/incentive_ratio": ratio,
            **_band_metrics("dynamics", self.band, ratio),
        }
        if self.samples is None:
            return own
        values = {f"dynamics/samples/{name}": value for name, value in self.samples.metrics().items()}
        return own | values | _band_metrics("dynamics/samples", self.sample_band, ratio)


def _band_metrics(prefix: str, band: DisentanglementBand | None, ratio: float | None) -> dict[str, Any]:
    inside = ratio in band if band and ratio is not None else None
    values = (band.center, band.lower, band.upper, inside) if band else (None,) * 4
    return {f"{prefix}/{name}": value for name, value in zip(BAND, values, strict=True)}
