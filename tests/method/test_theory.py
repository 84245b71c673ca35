"""Theory against reality: what a small step of plain SGD does to z_w and z_l, and what the formulas say.

A two-layer language model in float64, all parameters trained (`geometry=parameters`). For one pair

    z_w' = η d_l ‖s_w‖² (r − ρ r*)        z_l' = −η d_l ‖s_l‖² (1 − ρ r / r*)
    m'   = η (d_w ‖s_w‖² + d_l ‖s_l‖² − (d_w + d_l) <s_w, s_l>),   m = z_w − z_l

and the band ρ r* ≤ r ≤ r*/ρ is where the winner does not fall and the loser does not rise. For a batch the
same holds of the means once the covariance of d and s is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rcpo.method.calibration import DynamicsMeter, RewardCalibrator
from rcpo.method.geometry import ScoreGeometry, parameter_scores
from rcpo.method.incentives import incentives
from rcpo.method.logps import sequence_logps, token_logps, token_weights
from rcpo.method.objectives import get_objective, names, specification
from rcpo.method.types import PairLogps

V, D, PROMPT, LENGTH = 17, 8, 3, 4
Loss = Callable[[PairLogps], Tensor]


class TinyModel(nn.Module):
    """Next-token model: mean of the embeddings so far, two tanh layers, an untied head with a bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(0.6 * torch.randn(*size, generator=generator, dtype=torch.float64))

        self.embedding, self.first, self.second = weight(V, D), weight(D, D), weight(D, D)
        self.head, self.bias = weight(V, D), weight(V)

    def forward(self, rows: Tensor) -> Tensor:
        """(S, L) tokens → (S, L, D) hidden states."""
        counts = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64)[:, None]
        context = self.embedding[rows].cumsum(1) / counts
        return torch.tanh(torch.tanh(context @ self.first) @ self.second + context)


@dataclass
class Pairs:
    """`rows` (2B, L): chosen rows, then rejected; the last LENGTH tokens are the response."""

    rows: Tensor

    @property
    def count(self) -> int:
        return len(self.rows) // 2

    def score(self, model: TinyModel, reduction: str = "mean") -> PairLogps:
        hidden = model(self.rows)[:, PROMPT - 1 : -1].reshape(-1, D)
        labels = self.rows[:, PROMPT:].reshape(-1)
        logps, _ = token_logps(hidden, model.head, labels, bias=model.bias)
        sequences = torch.arange(len(self.rows)).repeat_interleave(LENGTH)
        lengths = torch.full((len(self.rows),), LENGTH)
        weights = token_weights(logps, sequences, lengths, reduction)
        z = sequence_logps(logps, weights, sequences, len(self.rows)).view(2, -1)
        reference = REFERENCE_LOGPS[:, : self.count]
        margins = torch.full((self.count,), 0.3, dtype=torch.float64)
        return PairLogps(
            *(*z, *reference, lengths[: self.count], lengths[self.count :]),
            margins=margins,
            gold_means=reference[0],
        )


REFERENCE_LOGPS = -2 - torch.rand(2, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def made_up_pairs(count: int, seed: int, shared: int = 0) -> Pairs:
    """Random tokens; the two responses of a pair agree in their prompt and first `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, V, (2, count, PROMPT + LENGTH), generator=generator)
    rows[1, :, : PROMPT + shared] = rows[0, :, : PROMPT + shared]
    return Pairs(rows.view(2 * count, -1))


def scores_of(model: TinyModel, pairs: Pairs) -> Tensor:
    """∇ of the summed z_w and z_l over all parameters, (2, P)."""
    logps = pairs.score(model)
    return parameter_scores(logps.chosen.sum(), logps.losers.sum(), list(model.parameters()))


def measured(model: TinyModel, pairs: Pairs, loss: Loss, rate: float) -> tuple[Tensor, Tensor]:
    """Changes of z_w and z_l, (B,) each, over one step of SGD on the batch mean of the loss, ÷ the rate."""
    before = pairs.score(model)
    gradients = torch.autograd.grad(loss(before).mean(), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= rate * gradient
        after = pairs.score(model)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter += rate * gradient
    changes = ((after.chosen - before.chosen) / rate, (after.losers - before.losers) / rate)
    return changes[0].detach(), changes[1].detach()


def linear(d_w: float, d_l: float) -> Loss:
    """The loss with exactly these incentives everywhere: −d_w z_w + d_l z_l."""
    return lambda logps: -d_w * logps.chosen + d_l * logps.losers


def flow(d_w: float, d_l: float, scores: ScoreGeometry) -> tuple[float, float, float]:
    """(z_w', z_l', m') by the formulas above, η = 1."""
    rho, center, ratio = scores.cosine, scores.norm_rejected / scores.norm_chosen, d_w / d_l
    winner = d_l * scores.norm_chosen**2 * (ratio - rho * center)
    loser = -d_l * scores.norm_rejected**2 * (1 - rho * ratio / center)
    inner = rho * scores.norm_chosen * scores.norm_rejected
    margin = d_w * scores.norm_chosen**2 + d_l * scores.norm_rejected**2 - (d_w + d_l) * inner
    return winner, loser, margin


# --- One pair -----------------------------------------------------------------------------------------------

OBJECTIVES = [
    name
    for name in names()
    if specification(name).loss.__module__ == "rcpo.method.losses"
    and specification(name).needs_rejected
    and not specification(name).needs_mismatched
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_pair_moves_as_the_formula_says(name: str) -> None:
    model, pairs = TinyModel(), made_up_pairs(1, seed=4, shared=1)
    objective = get_objective(name, reduction="mean")
    d_w, d_l = (side.item() for side in incentives(objective, pairs.score(model)))
    expected = flow(d_w, d_l, ScoreGeometry.of(scores_of(model, pairs)))
    rate = 1e-5 / max(1.0, abs(d_w), abs(d_l))  # cal_dpo's are 250
    z_w, z_l = (change.item() for change in measured(model, pairs, objective, rate))
    # 2 % is the bar of issue 2; a step this small leaves far less
    assert (z_w, z_l, z_w - z_l) == pytest.approx(expected, rel=0.02)
    assert (z_w, z_l, z_w - z_l) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_the_rest_is_second_order() -> None:
    model, pairs = TinyModel(), made_up_pairs(1, seed=4, shared=1)
    objective = get_objective("simpo")
    d_w, d_l = (side.item() for side in incentives(objective, pairs.score(model)))
    expected = flow(d_w, d_l, ScoreGeometry.of(scores_of(model, pairs)))
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        z_w, z_l = (change.item() for change in measured(model, pairs, objective, rate))
        errors.append([abs(z_w - expected[0]), abs(z_l - expected[1])])
    for larger, smaller in pairwise(errors):
        # a tenth of the step, a tenth of the error
        assert [b / a for a, b in zip(larger, smaller, strict=True)] == pytest.approx([0.1, 0.1], rel=0.25)


def pair_with_cosine(positive: bool) -> tuple[TinyModel, Pairs, ScoreGeometry]:
    """The first made-up pair whose scores are clearly aligned, or clearly opposed."""
    model = TinyModel()
    for seed in range(200):
        pairs = made_up_pairs(1, seed, shared=2 if positive else 0)
        scores = ScoreGeometry.of(scores_of(model, pairs))
        if (scores.cosine > 0.3) if positive else (scores.cosine < -0.05):
            return model, pairs, scores
    raise AssertionError("no such pair")


@pytest.mark.parametrize(
    ("place", "winner_rises", "loser_falls"),
    [
        ("0.5 below", False, True),
        ("0.99 below", False, True),
        ("1.01 below", True, True),
        ("center", True, True),
        ("0.99 above", True, True),
        ("1.01 above", True, False),
        ("2.0 above", True, False),
    ],
)
def test_the_signs_flip_at_the_edges_of_the_band(place: str, winner_rises: bool, loser_falls: bool) -> None:
    """r as a multiple of the lower ("below") or the upper edge ("above"), 1 % to either side of it."""
    model, pairs, scores = pair_with_cosine(positive=True)
    center = scores.norm_rejected / scores.norm_chosen
    factor, _, edge = place.rpartition(" ")
    ratio = (
        center
        * {
            "below": float(factor or 1) * scores.cosine,
            "above": float(factor or 1) / scores.cosine,
            "center": 1.0,
        }[edge]
    )
    z_w, z_l = (change.item() for change in measured(model, pairs, linear(ratio, 1.0), rate=1e-6))
    assert (z_w > 0, z_l < 0) == (winner_rises, loser_falls)
    meter = DynamicsMeter()
    one = torch.ones(1, dtype=torch.float64)
    meter.observe((ratio * one, one), scores_of(model, pairs))
    found = meter.collect()
    assert found.metrics()["dynamics/in_band"] is (winner_rises and loser_falls)
    assert (z_w, z_l) == pytest.approx(flow(ratio, 1.0, scores)[:2], rel=0.02)


@pytest.mark.parametrize("ratio", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_opposed_scores_have_no_edges(ratio: float) -> None:
    model, pairs, scores = pair_with_cosine(positive=False)
    rate = 1e-6 / max(ratio, 1)
    z_w, z_l = (change.item() for change in measured(model, pairs, linear(ratio, 1.0), rate))
    assert z_w > 0 and z_l < 0
    assert (z_w, z_l) == pytest.approx(flow(ratio, 1.0, scores)[:2], rel=0.02)


@pytest.mark.parametrize("side", ["below", "above"])
def test_calibration_brings_a_pair_back_into_its_band(side: str) -> None:
    """Outside, one of the two moves the wrong way; calibrated, both move right, and equally strongly."""
    model, pairs, scores = pair_with_cosine(positive=True)
    center = scores.norm_rejected / scores.norm_chosen
    ratio = center * (0.5 * scores.cosine if side == "below" else 2 / scores.cosine)
    loss = linear(ratio, 1.0)
    z_w, z_l = (change.item() for change in measured(model, pairs, loss, rate=1e-6))
    assert (z_w < 0) if side == "below" else (z_l > 0)

    calibrator = RewardCalibrator(alpha_max=None)
    meter = DynamicsMeter()
    one = torch.ones(1, dtype=torch.float64)
    meter.observe((ratio * one, one), scores_of(model, pairs))
    calibrator.update(meter.collect())
    z_w, z_l = (
        change.item()
        for change in measured(model, pairs, lambda logps: loss(calibrator.calibrate(logps)), rate=1e-6)
    )
    assert z_w > 0 and z_l < 0
    # both sides now pull with α d_w ‖s_w‖ = (d_l/α) ‖s_l‖ = sqrt(d_w d_l ‖s_w‖ ‖s_l‖), so by the formulas
    # z_w' = that · ‖s_w‖ (1 − ρ) and z_l' = −that · ‖s_l‖ (1 − ρ)
    a, b = scores.norm_chosen, scores.norm_rejected
    strength = (ratio * a * b) ** 0.5 * (1 - scores.cosine)
    assert (z_w, z_l) == pytest.approx((strength * a, -strength * b), rel=0.02)


# --- A batch ------------------------------------------------------------------------------------------------


def per_pair_scores(model: TinyModel, pairs: Pairs) -> Tensor:
    """s_w and s_l of each pair, (2, B, P)."""
    logps = pairs.score(model)
    parameters = list(model.parameters())
    rows = [parameter_scores(w, v, parameters) for w, v in zip(logps.chosen, logps.losers, strict=True)]
    return torch.stack(rows, dim=1)


def batch_flow(d: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean z_w' and z_l' (2,), of the batch means alone and of their covariance; d (2, B), s (2, B, P).

    θ' = mean_i(d_w s_w − d_l s_l), and mean_i(d_i s_i) = d̄ s̄ + cov(d, s).
    """
    mean_d, mean_s = d.mean(1, keepdim=True), s.mean(1)
    covariance = (d[..., None] * s).mean(1) - mean_d * mean_s
    of_means = mean_d[0] * mean_s[0] - mean_d[1] * mean_s[1]
    of_covariance = covariance[0] - covariance[1]
    return mean_s @ of_means, mean_s @ of_covariance


@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "lsif", "ddro", "cpo"])
def test_a_batch_moves_as_its_means_and_their_covariance_say(name: str) -> None:
    model, pairs = TinyModel(), made_up_pairs(12, seed=5, shared=1)
    objective = get_objective(name, reduction="mean", **({"beta": 2.0} if name == "dpo" else {}))
    d = torch.stack(incentives(objective, pairs.score(model)))
    s = per_pair_scores(model, pairs)
    of_means, of_covariance = batch_flow(d, s)
    changes = torch.stack(measured(model, pairs, objective, rate=1e-6)).mean(1)
    torch.testing.assert_close(changes, of_means + of_covariance, rtol=0.02, atol=0)
    # the part of the means is the one-pair formula on the batch's dynamics
    meter = DynamicsMeter()
    meter.observe((d[0], d[1]), s.sum(1))
    found = meter.collect()
    by_formula = flow(found.incentive_chosen, found.incentive_rejected, found.scores)[:2]
    assert of_means.tolist() == pytest.approx(by_formula, rel=1e-9)
    # d differs between pairs, so without the covariance the bar would be missed (cpo's d is nearly constant)
    share = (of_covariance / changes).abs()
    print(f"{name}: covariance ÷ movement of z_w, z_l = {(of_covariance / changes).tolist()}")
    assert (share > (1e-4 if name == "cpo" else 0.1)).all()


def test_without_spread_in_the_incentives_the_means_obey_the_formula_exactly() -> None:
    model, pairs = TinyModel(), made_up_pairs(12, seed=5, shared=1)
    d = torch.tensor([[1.5] * 12, [0.7] * 12], dtype=torch.float64)
    s = per_pair_scores(model, pairs)
    of_means, of_covariance = batch_flow(d, s)
    assert of_covariance.abs().max() < 1e-12 * of_means.abs().max()
    changes = torch.stack(measured(model, pairs, linear(1.5, 0.7), rate=1e-6)).mean(1)
    torch.testing.assert_close(changes, of_means, rtol=0.02, atol=0)
