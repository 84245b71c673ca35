"""Reward calibration (arXiv 2604.18239): statistics over micro-batches and ranks, α, and its use.

The gradients of the chosen side are multiplied by α and those of the rejected side by 1/α; values stay. Rules
(`rules`, `loop`) say which α: by default the paper's, α = √(r*/r), which moves the incentive ratio
r to the center r* of the disentanglement band.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rcpo.method.band import SAMPLE_METRICS, Dynamics, Movement
from rcpo.method.geometry import ScoreGeometry, score_products
from rcpo.method.loop import LoopRule
from rcpo.method.rules import BandRule, FixedRule, Rule
from rcpo.method.samples import CrossSamples
from rcpo.method.types import PairLogps

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""

STEP_SUMS = 8
"""Numbers that a step's reduction carries beside the scores: four sums and their counts."""

RANK_NUMBERS = 13
"""Numbers in fp64 that ranks exchange for each micro-batch with updates every micro-batch."""

RULES = ("center", "edge", "loop", "fixed")
BANDS = ("batch", "samples")


def _alone(tensor: Tensor) -> Tensor:
    return tensor


class DynamicsMeter:
    """Accumulates incentives and scores over micro-batches; one reduction over ranks gives the batch's.

    `samples` gets the mean scores of every batch that is collected, and its geometry becomes part of the
    batch's dynamics.

    >>> meter = DynamicsMeter()
    >>> meter.observe((torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])), torch.tensor([[[4.0]], [[6.0]]]))
    >>> meter.collect().scores
    ScoreGeometry(norm_chosen=2.0, norm_rejected=3.0, cosine=1.0)
    """

    def __init__(self, samples: CrossSamples | None = None) -> None:
        self._samples = samples
        self._sums: Tensor | None = None
        self._scores: Tensor | None = None

    def observe(
        self,
        incentives: tuple[Tensor, Tensor],
        scores: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
        logratios: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add a micro-batch.

        `incentives` are those of each chosen (n_w,) and each rejected (n_l,) response, for a loss that is the
        mean over pairs; `scores` (2, …) the sides' summed scores. `weights` are the responses' parts in the
        loss's mean (None: all 1), by which the scores are summed already: one of weight 2 counts as two.
        `logratios` are the responses' mean log-ratios per token. A weight of 0 leaves a response out. Where
        responses are not paired n_w and n_l differ: incentives are then per (n_w + n_l)/2 and scores per
        response of their own side, so that d·s stays each side's part of the loss's gradient.
        """
        sums = statistics(incentives, weights, logratios)
        self._sums = sums if self._sums is None else self._sums + sums
        self._scores = scores.detach() if self._scores is None else self._scores + scores.detach()

    @property
    def empty(self) -> bool:
        """Whether nothing was observed since the last `collect`."""
        return self._sums is None

    def collect(self, reduce: Reduce = _alone) -> Dynamics:
        """The dynamics of everything observed since the last call, over all ranks; then starts anew."""
        assert self._sums is not None and self._scores is not None, "nothing was observed"
        words = _in_words(self._sums, self._scores.dtype)
        total = reduce(torch.cat([self._scores.flatten(), words.flatten()]))
        scores = total[: self._scores.numel()].view_as(self._scores)
        sums = total[self._scores.numel() :].view_as(words).double().sum(0)
        self._sums = self._scores = None
        products = [score_products(scores)]
        if self._samples is not None:
            sizes = torch.where(sums[2:4] == 0, 1.0, sums[2:4]).to(scores.dtype)
            means = scores / sizes.view(2, *[1] * (scores.dim() - 1))
            products.append(self._samples.products(means))
        found = torch.cat([sums, *products]).tolist()  # one wait for the device
        dynamics = _dynamics(found[:STEP_SUMS], found[STEP_SUMS : STEP_SUMS + 3])
        if self._samples is None:
            return dynamics
        return replace(dynamics, samples=self._samples.take(means, found[STEP_SUMS + 3 :]))


def statistics(
    incentives: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    logratios: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """What a micro-batch adds to a step's sums, as `DynamicsMeter.observe` takes it: (8,) in fp64.

    d_w, d_l, n_w, n_l; of readings the sides' log-ratios and how many they are.
    """
    d = [side.detach().double() for side in incentives]
    parts = [torch.ones_like(side) for side in d] if weights is None else [w.double() for w in weights]
    weighted = [torch.where(part == 0, 0.0, part * side).sum() for part, side in zip(parts, d, strict=True)]
    sums = [*weighted, *(part.sum() for part in parts)]
    if logratios is None:
        return torch.stack([*sums, *[torch.zeros_like(sums[0])] * 4])
    moved = [u.detach().double() for u in logratios]
    there = [part != 0 for part in parts]
    sums += [torch.where(real, u, 0.0).sum() for real, u in zip(there, moved, strict=True)]
    return torch.stack([*sums, *(real.double().sum() for real in there)])


def _dynamics(sums: list[float], products: list[float]) -> Dynamics:
    """The batch's dynamics from its sums and the products of its scores."""
    d_w, d_l, n_w, n_l, u_w, u_l, readings_w, readings_l = sums
    pairs = (n_w + n_l) / 2 or 1.0
    geometry = ScoreGeometry.of_products(*products)
    mean = ScoreGeometry(
        geometry.norm_chosen / (n_w or 1.0), geometry.norm_rejected / (n_l or 1.0), geometry.cosine
    )
    movement = Movement(u_w / readings_w, u_l / readings_l) if readings_w and readings_l else None
    return Dynamics(d_w / pairs, d_l / pairs, mean, movement=movement)


class RewardCalibrator:
    """The weight α of a rule and the stop-gradient that applies it.

    `update(dynamics)` moves the rule's averages and α, `calibrate(logps)` uses α. The rule is the band's
    `center` (the paper's), its nearest `edge` (α = 1 inside), a `fixed` `alpha`, or the closed `loop` that
    holds fresh winners at `target` nats per token; `band` is the batch's own or the one across samples, and
    `ema` the decay of the averages. α is 1 at first, unless it is fixed. A batch that says nothing leaves α
    as it is and is counted in `skipped`. α is clamped to [1/alpha_max, alpha_max] (None: not), counted in
    `clamped`.

    Raises ValueError for settings that do not exist or are out of range.

    >>> calibrator = RewardCalibrator(ema=0.0)
    >>> calibrator.update(Dynamics(1.0, 4.0, ScoreGeometry(norm_chosen=1.0, norm_rejected=4.0, cosine=0.5)))
    >>> round(calibrator.alpha, 6)  # √(r*/r) = √(4 ÷ ¼)
    4.0
    """

    def __init__(
        self,
        rule: str = "center",
        *,
        band: str = "batch",
        ema: float = 0.9,
        alpha_max: float | None = 10.0,
        alpha: float | None = None,
        target: float = 0.0,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rc.rule={rule}: one of {', '.join(RULES)} is expected")
        if band not in BANDS:
            raise ValueError(f"rc.band={band}: one of {', '.join(BANDS)} is expected")
        if not 0 <= ema < 1:
            raise ValueError(f"rc.ema={ema}: a decay in [0, 1) is expected")
        if alpha_max is not None and alpha_max < 1:
            raise ValueError(f"rc.alpha_max={alpha_max}: at least 1 is expected, or null for no clamp")
        if rule == "fixed" and (alpha is None or not 0 < alpha < math.inf):
            raise ValueError(f"rc.alpha={alpha}: rc.rule=fixed needs a positive number")
        self._limit = math.inf if alpha_max is None else math.log(alpha_max)
        self.rule: Rule
        start = 0.0
        if rule == "fixed" and alpha is not None:
            self.rule, start = FixedRule(alpha), math.log(alpha)
        elif rule == "loop":
            self.rule = LoopRule(target=target, limit=self._limit)
        else:
            self.rule = BandRule(edge=rule == "edge", samples=band == "samples", ema=ema)
        self.alpha = math.exp(max(-self._limit, min(self._limit, start)))
        self.skipped = 0
        self.clamped = 0

    def calibrate(self, logps: PairLogps) -> PairLogps:
        """The same values, with gradients scaled by α on the chosen and 1/α on the rejected side.

        Raises ValueError where `logps` has no rejected side.
        """
        return scale_gradients(logps, self.alpha)

    def update(self, dynamics: Dynamics) -> None:
        """Move the rule's averages by one batch and set α for what comes next."""
        log_alpha = self.rule(dynamics)
        if log_alpha is None:
            self.skipped += 1
        else:
            self._set(log_alpha)

    def follow(self, movement: Movement) -> None:
        """Move the loop by a reading of held-out pairs. Raises ValueError for another rule."""
        if not isinstance(self.rule, LoopRule):
            raise ValueError("a reading of held-out pairs is for rc.rule=loop")
        self._set(self.rule.follow(movement))

    def _set(self, log_alpha: float) -> None:
        if abs(log_alpha) > self._limit:
            self.clamped += 1
            log_alpha = math.copysign(self._limit, log_alpha)
        self.alpha = math.exp(log_alpha)

    def metrics(self) -> dict[str, Any]:
        """The `rc/*` entries of a metrics row that say how α came about."""
        return {"rc/skipped": self.skipped, "rc/clamped": self.clamped, **self.rule.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """α, counts and the rule's averages, ready for JSON."""
        return {
            "alpha": self.alpha,
            "skipped": self.skipped,
            "clamped": self.clamped,
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken of a calibrator with the same settings."""
        self.alpha, self.skipped, self.clamped = state["alpha"], state["skipped"], state["clamped"]
        self.rule.load_state_dict(state["rule"])


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
        self.samples = CrossSamples()
        self._reduce = reduce
        self._meter = DynamicsMeter(self.samples)
        self._micro_batches = 1

    def begin(
        self, micro_batches: int = 1, *, new_epoch: bool = False, movement: Movement | None = None
    ) -> None:
        """Start a step of so many micro-batches; examples may be seen again in a new epoch.

        `movement` is a reading of held-out pairs, for the loop: α follows at once.
        """
        self._micro_batches = micro_batches
        if new_epoch:
            self.samples.forget()
        if movement is not None and self.calibrator is not None:
            self.calibrator.follow(movement)

    def observe(
        self,
        incentives: tuple[Tensor, Tensor],
        scores: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
        logratios: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A micro-batch, as `DynamicsMeter.observe` takes it; a rank without responses joins the sums too."""
        if self.by_microbatch and self.calibrator is not None:
            own = log_numbers(statistics(incentives, weights, logratios), score_products(scores.detach()))
            common = average_logs(own, self._reduce)
            if common is not None:
                steps = 1 / self._micro_batches
                moved = common.movement and replace(common.movement, steps=steps)
                self.calibrator.update(replace(common, samples=self.samples.geometry(), movement=moved))
        self._meter.observe(incentives, scores, weights, logratios)

    def end(self) -> dict[str, Any]:
        """Close the step over all ranks: its `dynamics/*` and `rc/*` metrics; set the next step's α."""
        dynamics = self._meter.collect(self._reduce)
        # rows have the same names from the first step on, which has no step before it
        metrics = dict.fromkeys(SAMPLE_METRICS) | dynamics.metrics()
        if self.calibrator is None:
            return metrics
        alpha, ratio, band = self.calibrator.alpha, dynamics.incentive_ratio, dynamics.band
        if not self.by_microbatch:
            self.calibrator.update(dynamics)
        calibrated = None if ratio is None else alpha**2 * ratio
        return metrics | {
            "rc/alpha": alpha,
            "rc/calibrated_ratio": calibrated,
            "rc/in_band": calibrated in band if band is not None and calibrated is not None else None,
            **self.calibrator.metrics(),
        }


def _in_words(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in fp64 (n,) as sums of three in `dtype`, exactly: (3, n). A message holds them and scores."""
    words = []
    for _ in range(3):
        words.append(sums.to(dtype))
        sums = sums - words[-1].double()
    return torch.stack(words)


def log_numbers(sums: Tensor, products: Tensor) -> Tensor:
    """What a rank tells the others of a micro-batch: `RANK_NUMBERS` in fp64, on their device.

    From its `statistics` (8,) and `score_products` (3,): the logs of d_w, d_l, ‖s_w‖ and ‖s_l‖, whether each
    is none; the cosine and the movement; whether there are responses on both sides, and readings. A rank
    without responses adds 0 everywhere.
    """
    d, n, moved, readings = sums.view(4, 2)
    ones = torch.ones_like(n)
    norms = products[:2].sqrt()
    values = torch.cat([d / torch.where(n.sum() == 0, ones, n.mean()), norms / torch.where(n == 0, ones, n)])
    positive = values > 0
    product = norms.prod()
    cosine = torch.where(product == 0, 0.0, products[2] / product)
    moving = (readings > 0).all()
    movement = torch.where(moving, moved / torch.where(readings == 0, ones, readings), 0.0)
    present = (n > 0).all()
    logs = torch.where(positive, values, 1.0).log()
    numbers = torch.cat(
        [logs, (~positive).double(), cosine[None], movement, torch.stack([present, moving]).double()]
    )
    return torch.where(present, numbers, 0.0)


def average_logs(numbers: Tensor, reduce: Reduce) -> Dynamics | None:
    """All ranks' `log_numbers` → the geometric mean over those that have any, so that all ranks agree.

    For updates every micro-batch. A non-positive statistic on any rank makes it 0 for all, which the
    calibrator skips. The cosine and the movement are plain means. None where no rank has pairs.
    """
    total = reduce(numbers).tolist()
    ranks, moving = total[11:]
    if not ranks:
        return None
    means = [0.0 if total[4 + i] else math.exp(total[i] / ranks) for i in range(4)]
    geometry = ScoreGeometry(means[2], means[3], total[8] / ranks)
    movement = Movement(total[9] / moving, total[10] / moving) if moving else None
    return Dynamics(means[0], means[1], geometry, movement=movement)


def scale_gradients(logps: PairLogps, alpha: float | Tensor) -> PairLogps:
    """The same values, with gradients × α on the chosen and ÷ α on the rejected side; α a number or (B,).

    Raises ValueError where `logps` has no rejected side.
    """
    if logps.rejected is None:
        raise ValueError("rc=on needs a rejected side; this objective has none: use rc=off")
    means = logps.chosen_means
    return logps.replace(
        chosen=_scale_gradient(logps.chosen, alpha),
        rejected=_scale_gradient(logps.rejected, 1 / alpha),
        chosen_means=None if means is None else _scale_gradient(means, alpha),
    )


def _scale_gradient(z: Tensor, scale: float | Tensor) -> Tensor:
    """z in the forward pass, exactly; its gradient times `scale`: α z + (1−α) sg(z) without its rounding."""
    return _ScaledGradient.apply(z, scale)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
