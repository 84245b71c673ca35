"""Win rates of judged answers: pure functions from verdicts to the flat names of evaluation.json.

A verdict is 1 where our answer is preferred, 0 where the other is, 0.5 for a tie. Each pair of answers has
two: with ours shown first, and second. Its preference is their mean, the win rate the mean preference, with a
tie as half a win (AlpacaEval, https://github.com/tatsu-lab/alpaca_eval).

Axes: B pairs of answers, R resamples. Everything is NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rcpo.evaluation.preference import (
    RESAMPLES,
    Floats,
    interval_of,
    means_with_intervals,
    prompt_groups,
    resampled_counts,
)

PREFIX = "eval/judge/"
RIDGE = 0.01  # prior precision of the length coefficient: finite where length tells all, else hardly moved
_NEWTON_STEPS = 200
_HALVINGS = 40


@dataclass(frozen=True)
class JudgedPairs:
    """B pairs of answers with their verdicts.

    `verdicts` (B, 2): ours first, ours second; `asked` (B,) is false where both answers are the same, a tie
    that nobody was asked about. `longer` (B,) is our answer's length less the other's, in characters.
    `labels` (B,) are a person's preferences for ours, 0 to 1, NaN where there is none. `prompts` (B,) are
    equal where the instructions are.
    """

    ids: Sequence[str]
    verdicts: Floats
    asked: NDArray[np.bool_]
    longer: Floats
    labels: Floats
    prompts: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.ids)
        assert self.verdicts.shape == (count, 2), self.verdicts.shape
        assert self.asked.shape == self.longer.shape == self.labels.shape == self.prompts.shape == (count,)

    @property
    def preferences(self) -> Floats:
        """Preference for our answer, (B,): 0, ¼, ½, ¾ or 1."""
        return cast(Floats, self.verdicts.mean(axis=1))


def judge_metrics(judged: JudgedPairs, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The record of a judgement; what is not defined is left out.

    `win_rate` and `length_controlled_win_rate` with 95 % bootstrap intervals over prompts, from the same
    resamples; `wins`, `losses` and `ties` as shares of pairs; `agreement` and `kappa` (Cohen's) of the two
    orders and `first_position_rate`, the share of decided verdicts for what was shown first (½: no bias),
    over the pairs that were asked about; with labels `label_agreement`, `label_kappa` and `labelled` pairs.
    """
    preferences = judged.preferences
    record: dict[str, Any] = {
        f"{PREFIX}examples": len(preferences),
        **means_with_intervals({"judge/win_rate": preferences}, seed, resamples, judged.prompts),
        **_length_controlled(judged, seed, resamples),
    }
    outcomes = _outcome(preferences)
    for name, outcome in (("wins", 1), ("losses", -1), ("ties", 0)):
        record[PREFIX + name] = float((outcomes == outcome).mean())
    verdicts = judged.verdicts[judged.asked]
    record |= _agreement("", _outcome(verdicts[:, 0]), _outcome(verdicts[:, 1]))
    favoured = np.concatenate([verdicts[:, 0], 1 - verdicts[:, 1]])
    decided = favoured[favoured != 0.5]
    if len(decided):
        record[f"{PREFIX}first_position_rate"] = float(decided.mean())
    labelled = ~np.isnan(judged.labels)
    if labelled.any():
        record[f"{PREFIX}labelled"] = int(labelled.sum())
        record |= _agreement("label_", outcomes[labelled], _outcome(judged.labels[labelled]))
    return record


def _outcome(preferences: Floats) -> NDArray[np.int64]:
    """1 for ours, −1 for the other, 0 for a tie."""
    return np.sign(preferences - 0.5).astype(np.int64)


def _agreement(prefix: str, one: NDArray[np.int64], other: NDArray[np.int64]) -> dict[str, float]:
    if not len(one):
        return {}
    found = {f"{PREFIX}{prefix}agreement": float((one == other).mean())}
    kappa = cohens_kappa(one, other)
    return found if kappa is None else {**found, f"{PREFIX}{prefix}kappa": kappa}


def cohens_kappa(one: NDArray[np.int64], other: NDArray[np.int64]) -> float | None:
    """Agreement beyond chance, (observed − expected) / (1 − expected); None where chance explains all.

    Expected from each side's own shares (Cohen, "A coefficient of agreement for nominal scales", 1960).
    """
    observed = float((one == other).mean())
    expected = sum(float((one == kind).mean() * (other == kind).mean()) for kind in np.unique(one))
    return None if expected == 1 else (observed - expected) / (1 - expected)


def _length_controlled(judged: JudgedPairs, seed: int, resamples: int) -> dict[str, float]:
    preferences, longer = judged.preferences, judged.longer
    groups = prompt_groups(len(preferences), judged.prompts)
    name = f"{PREFIX}length_controlled_win_rate"
    everyone = length_controlled_win_rates(preferences, longer, np.ones((1, len(preferences))))
    if everyone is None:
        return {}
    rates = [
        length_controlled_win_rates(preferences, longer, counts[:, groups].astype(np.float64))
        for counts in resampled_counts(int(groups.max()) + 1, seed, resamples)
    ]
    low, high = interval_of(np.concatenate([part for part in rates if part is not None])[:, None])
    return {name: float(everyone[0]), f"{name}/low": float(low[0]), f"{name}/high": float(high[0])}


def length_controlled_win_rates(preferences: Floats, longer: Floats, weights: Floats) -> Floats | None:
    """What the win rate would be if all answers were as long as the others', for each weighting (R, B): (R,).

    The logistic regression of AlpacaEval 2 (Dubois et al., "Length-Controlled AlpacaEval", arXiv 2404.04475),
    P(ours) = σ(θ + φ tanh(Δ / std Δ)), Δ the difference of lengths in characters, at Δ = 0: σ(θ). Left out is
    its term for an instruction's difficulty, which needs many models' judgements of the same instructions.
    Maximum likelihood with preferences between 0 and 1, and a Gaussian prior of precision `RIDGE` on φ in
    the place of a cross-validated penalty. None where lengths differ everywhere by the same: then length and
    quality cannot be told apart.
    """
    if not longer.any():
        return cast(Floats, weights @ preferences / weights.sum(axis=1))
    spread = float(longer.std(ddof=1)) if len(longer) > 1 else 0.0
    if spread == 0:
        return None
    mean = weights @ preferences / weights.sum(axis=1)
    rates = mean.copy()
    open_ = (mean > 0) & (mean < 1)  # else the likelihood has no maximum: all won, or all lost
    if open_.any():
        theta = _maximise(preferences, np.tanh(longer / spread), weights[open_], mean[open_])
        rates[open_] = _sigmoid(theta)
    return cast(Floats, rates)


def _maximise(preferences: Floats, feature: Floats, weights: Floats, mean: Floats) -> Floats:
    """θ of each weighting (R, B), by Newton's method; a step that does not climb is halved."""
    theta = np.stack([np.log(mean) - np.log1p(-mean), np.zeros_like(mean)])  # (2, R)
    value = _likelihood(theta, preferences, feature, weights)
    for _ in range(_NEWTON_STEPS):
        chance = _sigmoid(theta[0][:, None] + theta[1][:, None] * feature)  # (R, B)
        residual = weights * (preferences - chance)
        gradient = np.stack([residual.sum(axis=1), residual @ feature - RIDGE * theta[1]])
        if np.abs(gradient).max() < 1e-10 * math.sqrt(weights.shape[1]):
            break
        curvature = weights * chance * (1 - chance)
        a, b, c = curvature.sum(axis=1), curvature @ feature, curvature @ feature**2 + RIDGE
        step = np.stack([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]])
        step /= np.maximum(a * c - b * b, np.finfo(np.float64).tiny)
        for _ in range(_HALVINGS):
            moved = _likelihood(theta + step, preferences, feature, weights)
            worse = ~(moved >= value - 1e-12 * np.abs(value))
            if not worse.any():
                break
            step[:, worse] /= 2
        theta, value = theta + step, np.maximum(moved, value)
    return cast(Floats, theta[0])


def _likelihood(theta: Floats, preferences: Floats, feature: Floats, weights: Floats) -> Floats:
    """The penalised log-likelihood of each weighting, (R,)."""
    logits = theta[0][:, None] + theta[1][:, None] * feature
    terms = preferences * logits - np.logaddexp(0, logits)
    return cast(Floats, (weights * terms).sum(axis=1) - RIDGE / 2 * theta[1] ** 2)


def _sigmoid(logits: Floats) -> Floats:
    return cast(Floats, np.exp(-np.logaddexp(0, -logits)))
