"""Disentanglement band and reward calibration (arXiv 2604.18239, §1 of the README's mathematics).

Under gradient flow the winner does not fall and the loser does not rise exactly when the incentive ratio
r = d_w/d_l lies in the band ρ r* ≤ r ≤ r*/ρ, r* = ‖s_l‖/‖s_w‖, ρ = cos(s_w, s_l). Reward calibration moves r
to the band's centre r* by α = sqrt(r*/r): d_w → α d_w, d_l → d_l/α.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcpo.geometry import ScoreGeometry
from rcpo.types import PairLogps

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


def _alone(tensor: Tensor) -> Tensor:
    return tensor


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
class Dynamics:
    """Incentives and score geometry of one batch: batch means over all ranks and micro-batches.

    >>> dynamics = Dynamics(1.0, 2.0, ScoreGeometry(norm_chosen=1.0, norm_rejected=2.0, cosine=0.5))
    >>> dynamics.incentive_ratio, dynamics.band
    (0.5, DisentanglementBand(center=2.0, cosine=0.5))
    """

    incentive_chosen: float
    incentive_rejected: float
    scores: ScoreGeometry

    @property
    def incentive_ratio(self) -> float | None:
        """r = d_w/d_l; None where a side has no positive, finite incentive, so that r says nothing."""
        if not (0 < self.incentive_chosen < math.inf and 0 < self.incentive_rejected < math.inf):
            return None  # NaN is neither
        ratio = self.incentive_chosen / self.incentive_rejected
        return ratio if 0 < ratio < math.inf else None

    @property
    def band(self) -> DisentanglementBand | None:
        """The band; None where r is None, or a score vanishes or is not finite."""
        scores = self.scores
        if self.incentive_ratio is None or not (scores.norm_chosen > 0 and scores.norm_rejected > 0):
            return None
        band = DisentanglementBand(scores.norm_rejected / scores.norm_chosen, scores.cosine)
        return band if 0 < band.center < math.inf and math.isfinite(band.cosine) else None

    def metrics(self) -> dict[str, Any]:
        """The `dynamics/*` entries of a metrics row; None where a value is not defined.

        `in_band` is None wherever r or the band is: what is not known is neither inside nor outside.
        """
        band, ratio = self.band, self.incentive_ratio
        return {
            "dynamics/incentive_chosen": self.incentive_chosen,
            "dynamics/incentive_rejected": self.incentive_rejected,
            "dynamics/score_norm_chosen": self.scores.norm_chosen,
            "dynamics/score_norm_rejected": self.scores.norm_rejected,
            "dynamics/score_cosine": self.scores.cosine,
            "dynamics/incentive_ratio": ratio,
            "dynamics/band_center": band.center if band else None,
            "dynamics/band_lower": band.lower if band else None,
            "dynamics/band_upper": band.upper if band else None,
            "dynamics/in_band": ratio in band if band and ratio is not None else None,
        }


class DynamicsMeter:
    """Accumulates incentives and scores over micro-batches; one reduction over ranks gives the batch's.

    `observe` takes the incentives of each chosen and each rejected response, for a loss that is the mean over
    pairs, and the sides' summed scores (2, …). Where responses are not paired the sides may differ in length:
    incentives are then per (n_w + n_l)/2 and scores per response of their own side, so that d·s stays each
    side's part of the loss's gradient. `weights` are the responses' parts in the loss's mean (None: all 1),
    by which the scores are summed already: one of weight 2 counts as two.

    >>> meter = DynamicsMeter()
    >>> meter.observe((torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])), torch.tensor([[[4.0]], [[6.0]]]))
    >>> meter.collect().scores
    ScoreGeometry(norm_chosen=2.0, norm_rejected=3.0, cosine=1.0)
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._scores: Tensor | None = None

    def observe(
        self, incentives: tuple[Tensor, Tensor], scores: Tensor, weights: tuple[Tensor, Tensor] | None = None
    ) -> None:
        d = [side.double() for side in incentives]
        parts = [torch.ones_like(side) for side in d] if weights is None else [w.double() for w in weights]
        weighted = [(part * side).sum() for part, side in zip(parts, d, strict=True)]
        sums = torch.stack([*weighted, *(part.sum() for part in parts)])
        self._sums = sums if self._sums is None else self._sums + sums
        # a copy, for the next call adds to it
        self._scores = scores.detach().clone() if self._scores is None else self._scores.add_(scores.detach())

    @property
    def empty(self) -> bool:
        return self._sums is None

    def collect(self, reduce: Reduce = _alone) -> Dynamics:
        """The dynamics of everything observed since the last call, over all ranks; then starts anew."""
        assert self._sums is not None and self._scores is not None, "nothing was observed"
        words = _in_words(self._sums, self._scores.dtype)
        total = reduce(torch.cat([self._scores.flatten(), words.flatten()]))
        scores = total[: self._scores.numel()].view_as(self._scores)
        d_w, d_l, *counts = total[self._scores.numel() :].view_as(words).double().sum(0).tolist()
        self._sums = self._scores = None
        n_w, n_l = (count or 1.0 for count in counts)
        pairs = sum(counts) / 2 or 1.0
        geometry = ScoreGeometry.of(scores)
        mean = ScoreGeometry(geometry.norm_chosen / n_w, geometry.norm_rejected / n_l, geometry.cosine)
        return Dynamics(d_w / pairs, d_l / pairs, mean)


class RewardCalibrator:
    """Reward calibration: the smoothed weight α and the stop-gradient that applies it.

    Exponential moving averages, in the log domain, of the batch means d_w, d_l, ‖s_w‖, ‖s_l‖; the first
    value starts each average. `update(dynamics)` moves them, `calibrate(logps)` uses α. A batch whose mean
    incentive (or score) is not positive on some side says nothing about r (or r*): those averages and α stay
    as they are and `skipped` counts it. α is clamped to [1/alpha_max, alpha_max] (None: not), counted in
    `clamped`.

    >>> calibrator = RewardCalibrator(ema=0.0)
    >>> calibrator.update(Dynamics(1.0, 4.0, ScoreGeometry(norm_chosen=1.0, norm_rejected=4.0, cosine=0.5)))
    >>> round(calibrator.alpha, 6)  # sqrt(r*/r) = sqrt(4 ÷ ¼)
    4.0
    """

    def __init__(self, *, ema: float = 0.9, alpha_max: float | None = 10.0) -> None:
        if not 0 <= ema < 1:
            raise ValueError(f"rc.ema={ema}: a decay in [0, 1) is expected")
        if alpha_max is not None and alpha_max < 1:
            raise ValueError(f"rc.alpha_max={alpha_max}: at least 1 is expected, or null for no clamp")
        self.ema = ema
        self.alpha_max = alpha_max
        self.alpha = 1.0
        self.skipped = 0
        self.clamped = 0
        self._log_incentives: list[float] | None = None
        self._log_norms: list[float] | None = None

    def calibrate(self, logps: PairLogps) -> PairLogps:
        """The same values, with gradients scaled by α on the chosen and 1/α on the rejected side."""
        if logps.rejected is None:
            raise ValueError("rc=on needs a rejected side; this objective has none: use rc=off")
        means = logps.chosen_means
        return logps.replace(
            chosen=_scale_gradient(logps.chosen, self.alpha),
            rejected=_scale_gradient(logps.rejected, 1 / self.alpha),
            chosen_means=None if means is None else _scale_gradient(means, self.alpha),
        )

    def update(self, dynamics: Dynamics) -> None:
        """Moves the averages by one batch and sets α for what comes next."""
        incentives = [dynamics.incentive_chosen, dynamics.incentive_rejected]
        norms = [dynamics.scores.norm_chosen, dynamics.scores.norm_rejected]
        usable = [min(pair) > 0 and all(map(math.isfinite, pair)) for pair in (incentives, norms)]
        if usable[0]:
            self._log_incentives = self._average(self._log_incentives, incentives)
        if usable[1]:
            self._log_norms = self._average(self._log_norms, norms)
        if not all(usable) or self._log_incentives is None or self._log_norms is None:
            self.skipped += 1
            return
        self._set_alpha(self._log_incentives, self._log_norms)

    def _average(self, old: list[float] | None, values: list[float]) -> list[float]:
        logs = [math.log(value) for value in values]
        if old is None:
            return logs
        return [self.ema * a + (1 - self.ema) * b for a, b in zip(old, logs, strict=True)]

    def _set_alpha(self, incentives: list[float], norms: list[float]) -> None:
        log_alpha = 0.5 * ((norms[1] - norms[0]) - (incentives[0] - incentives[1]))
        limit = math.inf if self.alpha_max is None else math.log(self.alpha_max)
        if abs(log_alpha) > limit:
            self.clamped += 1
            log_alpha = math.copysign(limit, log_alpha)
        self.alpha = math.exp(log_alpha)

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "skipped": self.skipped,
            "clamped": self.clamped,
            "log_incentives": self._log_incentives,
            "log_norms": self._log_norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.skipped, self.clamped = state["alpha"], state["skipped"], state["clamped"]
        self._log_incentives, self._log_norms = state["log_incentives"], state["log_norms"]


class StepCalibration:
    """The statistics of one optimizer step, over its micro-batches and all ranks, and the α that follows.

    `update="step"`: the global batch's statistics, reduced once in `end`, set the α of the next step.
    `update="microbatch"` (the published way): each micro-batch's, averaged over the ranks, set the α that the
    same micro-batch uses. Without a calibrator it only measures. `reduce` sums a tensor over all ranks.

    >>> calibrator = RewardCalibrator(ema=0.0)
    >>> step = StepCalibration(calibrator)
    >>> step.observe((torch.ones(1), torch.full((1,), 4.0)), torch.tensor([[[1.0]], [[4.0]]]))
    >>> step.end()["rc/alpha"], round(calibrator.alpha, 6)  # what this step used, what the next one will
    (1.0, 4.0)
    """

    def __init__(
        self, calibrator: RewardCalibrator | None, *, update: str = "step", reduce: Reduce = _alone
    ) -> None:
        if update not in ("step", "microbatch"):
            raise ValueError(f"rc.update={update}: step or microbatch is expected")
        self.calibrator = calibrator
        self.by_microbatch = calibrator is not None and update == "microbatch"
        self._reduce = reduce
        self._meter = DynamicsMeter()

    def observe(
        self, incentives: tuple[Tensor, Tensor], scores: Tensor, weights: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """A micro-batch, as `DynamicsMeter.observe` takes it; a rank without responses joins the sums too."""
        if self.by_microbatch and self.calibrator is not None:
            local: Dynamics | None = None
            if len(incentives[0]) and len(incentives[1]):
                alone = DynamicsMeter()
                alone.observe(incentives, scores, weights)
                local = alone.collect()
            common = average_logs(local, self._reduce)
            if common is not None:
                self.calibrator.update(common)
        self._meter.observe(incentives, scores, weights)

    def end(self) -> dict[str, Any]:
        """Closes the step over all ranks: its `dynamics/*` and `rc/*` metrics; sets the next step's α."""
        dynamics = self._meter.collect(self._reduce)
        if self.calibrator is None:
            return dynamics.metrics()
        alpha, ratio, band = self.calibrator.alpha, dynamics.incentive_ratio, dynamics.band
        if not self.by_microbatch:
            self.calibrator.update(dynamics)
        calibrated = None if ratio is None else alpha**2 * ratio
        return dynamics.metrics() | {
            "rc/alpha": alpha,
            "rc/calibrated_ratio": calibrated,
            "rc/in_band": calibrated in band if band is not None and calibrated is not None else None,
            "rc/skipped": self.calibrator.skipped,
            "rc/clamped": self.calibrator.clamped,
        }


def _in_words(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in fp64 (n,) as sums of three in `dtype`, exactly: (3, n). A message holds them and scores."""
    words = []
    for _ in range(3):
        words.append(sums.to(dtype))
        sums = sums - words[-1].double()
    return torch.stack(words)


def average_logs(dynamics: Dynamics | None, reduce: Reduce) -> Dynamics | None:
    """One rank's dynamics → the geometric mean over the ranks that have any, so that all ranks agree.

    For updates every micro-batch. A rank without pairs gives None; a non-positive statistic on any rank makes
    it 0 for all, which the calibrator skips. The cosine is the plain mean.
    """
    values = [0.0] * 4 if dynamics is None else _four(dynamics)
    logs = [math.log(value) if value > 0 else 0.0 for value in values]
    bad = [0.0 if dynamics is None or value > 0 else 1.0 for value in values]
    present = 0.0 if dynamics is None else 1.0
    cosine = 0.0 if dynamics is None else dynamics.scores.cosine
    total = reduce(torch.tensor([*logs, *bad, cosine, present], dtype=torch.float64)).tolist()
    if not total[9]:
        return None
    means = [0.0 if total[4 + i] else math.exp(total[i] / total[9]) for i in range(4)]
    return Dynamics(means[0], means[1], ScoreGeometry(means[2], means[3], total[8] / total[9]))


def _four(dynamics: Dynamics) -> list[float]:
    scores = dynamics.scores
    return [
        dynamics.incentive_chosen,
        dynamics.incentive_rejected,
        scores.norm_chosen,
        scores.norm_rejected,
    ]


def _scale_gradient(z: Tensor, scale: float) -> Tensor:
    """z in the forward pass, exactly; its gradient times `scale`: α z + (1−α) sg(z) without its rounding."""
    return _ScaledGradient.apply(z, scale)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
