"""Band, averages, α, its state, the meter; and the published calibration, number by number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcpo.method.band import DisentanglementBand, Dynamics, Movement
from rcpo.method.calibration import (
    DynamicsMeter,
    RewardCalibrator,
    StepCalibration,
    average_logs,
    log_numbers,
)
from rcpo.method.geometry import ScoreGeometry, head_scores
from rcpo.method.incentives import incentives
from rcpo.method.logps import sequence_logps, token_logps, token_weights
from rcpo.method.objectives import Objective, get_objective
from rcpo.method.types import PairLogps

REFERENCE = json.loads((Path(__file__).parent / "reference" / "calibration.json").read_text())


def dynamics(d_w: float, d_l: float, s_w: float, s_l: float, cosine: float = 0.5) -> Dynamics:
    return Dynamics(d_w, d_l, ScoreGeometry(s_w, s_l, cosine))


# --- Band ---------------------------------------------------------------------------------------------------


def test_band_edges_for_a_positive_cosine() -> None:
    # ρ = ½, r* = 2: 1 ≤ r ≤ 4
    band = DisentanglementBand(center=2.0, cosine=0.5)
    assert (band.lower, band.upper) == (1.0, 4.0)
    assert [r in band for r in (0.999, 1.0, 2.0, 4.0, 4.001)] == [False, True, True, True, False]


@pytest.mark.parametrize("cosine", [0.0, -0.5, -1.0])
def test_every_positive_ratio_is_inside_for_other_cosines(cosine: float) -> None:
    band = DisentanglementBand(center=2.0, cosine=cosine)
    assert band.lower == 2 * cosine and band.upper is None
    assert all(r in band for r in (1e-9, 1.0, 1e9))


@given(center=st.floats(0.01, 100), cosine=st.floats(0.001, 1))
def test_the_center_is_the_geometric_mean_of_the_edges(center: float, cosine: float) -> None:
    band = DisentanglementBand(center, cosine)
    assert band.upper is not None
    assert math.sqrt(band.lower * band.upper) == pytest.approx(center, rel=1e-12)


def test_dynamics_by_hand() -> None:
    # r = 3/2, r* = 4/2 = 2, ρ = ½: band [1, 4]
    assert dynamics(3, 2, 2, 4).metrics() == {
        "dynamics/incentive_chosen": 3,
        "dynamics/incentive_rejected": 2,
        "dynamics/score_norm_chosen": 2,
        "dynamics/score_norm_rejected": 4,
        "dynamics/score_cosine": 0.5,
        "dynamics/incentive_ratio": 1.5,
        "dynamics/band_center": 2.0,
        "dynamics/band_lower": 1.0,
        "dynamics/band_upper": 4.0,
        "dynamics/in_band": True,
    }
    assert dynamics(1, 2, 2, 4).metrics()["dynamics/in_band"] is False  # r = ½
    assert dynamics(9, 2, 2, 4).metrics()["dynamics/in_band"] is False  # r = 4.5
    assert dynamics(9, 2, 2, 4, cosine=-0.1).metrics()["dynamics/in_band"] is True
    assert dynamics(9, 2, 2, 4, cosine=-0.1).metrics()["dynamics/band_upper"] is None


UNDEFINED = ("incentive_ratio", "band_center", "band_lower", "band_upper", "in_band")


@pytest.mark.parametrize("incentives", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_no_ratio_without_two_positive_incentives(incentives: tuple[float, float]) -> None:
    metrics = dynamics(*incentives, 2, 4).metrics()
    assert [metrics[f"dynamics/{key}"] for key in UNDEFINED] == [None] * 5
    assert metrics["dynamics/score_norm_rejected"] == 4


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_no_band_where_a_score_vanishes(norms: tuple[float, float]) -> None:
    metrics = dynamics(3, 2, *norms).metrics()
    assert metrics["dynamics/incentive_ratio"] == 1.5
    assert [metrics[f"dynamics/{key}"] for key in UNDEFINED[1:]] == [None] * 4


# --- α ------------------------------------------------------------------------------------------------------


def test_the_first_value_starts_the_averages() -> None:
    # r = 8/2 = 4, r* = 9/1 = 9: α = sqrt(9/4) = 3/2, whatever the decay
    for ema in (0.0, 0.9, 0.98):
        calibrator = RewardCalibrator(ema=ema)
        assert calibrator.alpha == 1
        calibrator.update(dynamics(8, 2, 1, 9))
        assert calibrator.alpha == pytest.approx(1.5, rel=1e-14)


@given(d_w=st.floats(1e-3, 1e3), d_l=st.floats(1e-3, 1e3), s_w=st.floats(1e-3, 1e3), s_l=st.floats(1e-3, 1e3))
def test_alpha_moves_the_ratio_to_the_center(d_w: float, d_l: float, s_w: float, s_l: float) -> None:
    calibrator = RewardCalibrator(ema=0.5, alpha_max=None)
    calibrator.update(dynamics(d_w, d_l, s_w, s_l))
    alpha = calibrator.alpha
    new_w, new_l = alpha * d_w, d_l / alpha
    assert new_w / new_l == pytest.approx(s_l / s_w, rel=1e-9)  # r = r*
    assert new_w * new_l == pytest.approx(d_w * d_l, rel=1e-12)  # the product stays
    assert new_w * s_w == pytest.approx(new_l * s_l, rel=1e-9)  # equal strength


def test_three_steps_of_the_average_by_hand() -> None:
    # decay ½, powers of two, so that logs base 2 can be written down:
    #   log2   d_w  d_l  s_w  s_l        averages
    #   step 1  3    1    0    2         3     1    0     2     α = 2^½[(2 − 0) − (3 − 1)]         = 2^0
    #   step 2  1    1    2    2         2     1    1     2     α = 2^½[(2 − 1) − (2 − 1)]         = 2^0
    #   step 3 −2    3    1    6         0     2    1     4     α = 2^½[(4 − 1) − (0 − 2)]         = 2^2.5
    calibrator = RewardCalibrator(ema=0.5)
    found = []
    for logs in [(3, 1, 0, 2), (1, 1, 2, 2), (-2, 3, 1, 6)]:
        calibrator.update(dynamics(*(2.0**log for log in logs)))
        found.append(calibrator.alpha)
    assert found == pytest.approx([1, 1, 2**2.5], rel=1e-13)
    state = calibrator.state_dict()
    assert [log / math.log(2) for log in state["rule"]["log_incentives"]] == pytest.approx([0, 2], abs=1e-13)
    assert [log / math.log(2) for log in state["rule"]["log_norms"]] == pytest.approx([1, 4], abs=1e-13)
    assert (calibrator.skipped, calibrator.clamped) == (0, 0)


def test_the_decay_weighs_the_past() -> None:
    # log r: 0, then 1 at decay 0.9: 0.1; r* = 1: α = e^(−0.05)
    calibrator = RewardCalibrator(ema=0.9)
    calibrator.update(dynamics(1, 1, 1, 1))
    calibrator.update(dynamics(math.e, 1, 1, 1))
    assert calibrator.alpha == pytest.approx(math.exp(-0.05), rel=1e-13)


@pytest.mark.parametrize(
    "incentives", [(-1.0, 2.0), (2.0, -1.0), (0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)]
)
def test_a_side_without_incentive_moves_neither_incentive_average(
    incentives: tuple[float, float],
) -> None:
    calibrator = RewardCalibrator(ema=0.5)
    calibrator.update(dynamics(*incentives, 1, 4))
    assert (calibrator.alpha, calibrator.skipped) == (1, 1)  # nothing known yet
    calibrator.update(dynamics(2, 1, 1, 4))  # r = 2, r* = 4
    assert calibrator.alpha == pytest.approx(math.sqrt(2), rel=1e-13)
    before = calibrator.state_dict()["rule"]["log_incentives"]
    calibrator.update(dynamics(*incentives, 1, 64))
    assert calibrator.alpha == pytest.approx(math.sqrt(2), rel=1e-13)
    assert calibrator.skipped == 2 and calibrator.state_dict()["rule"]["log_incentives"] == before
    # the norms did move: log2 r* = ½·2 + ½·6 = 4, then with 2^4 again 4; r stays 2: α = sqrt(16/2)
    calibrator.update(dynamics(2, 1, 1, 16))
    assert calibrator.alpha == pytest.approx(math.sqrt(8), rel=1e-13)
    assert calibrator.skipped == 2


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_a_vanished_score_moves_neither_norm_average(norms: tuple[float, float]) -> None:
    calibrator = RewardCalibrator(ema=0.5)
    calibrator.update(dynamics(2, 1, *norms))
    assert (calibrator.alpha, calibrator.skipped) == (1, 1)
    calibrator.update(dynamics(2, 1, 1, 8))  # r = 2, r* = 8
    calibrator.update(dynamics(2, 1, *norms))
    assert calibrator.alpha == pytest.approx(2, rel=1e-13)
    assert calibrator.skipped == 2


@pytest.mark.parametrize(
    "values",
    [
        *((bad, 1.0, 1.0, 2.0) for bad in (math.nan, math.inf, 0.0, -1.0)),
        *((1.0, bad, 1.0, 2.0) for bad in (math.nan, math.inf, 0.0)),
        *((1.0, 1.0, bad, 2.0) for bad in (math.nan, math.inf, 0.0)),
        (1.0, 1.0, 1.0, math.nan),
        (1e300, 1e-300, 1.0, 2.0),  # r overflows
    ],
)
def test_what_is_not_known_is_neither_inside_the_band_nor_outside(values: tuple[float, ...]) -> None:
    found = dynamics(*values)
    record = found.metrics()
    assert record["dynamics/in_band"] is None and found.band is None
    assert all(record[f"dynamics/band_{name}"] is None for name in ("lower", "center", "upper"))
    ratio = record["dynamics/incentive_ratio"]
    assert ratio is None or math.isfinite(ratio)
    step = StepCalibration(RewardCalibrator())
    step.observe(
        (torch.tensor([values[0]]), torch.tensor([values[1]])), torch.tensor([[[values[2]]], [[values[3]]]])
    )
    if values[0] < 1e300:  # fp32 has no such numbers
        row = step.end()
        assert row["rc/in_band"] is None and row["dynamics/in_band"] is None
    uncertain = Dynamics(1.0, 1.0, ScoreGeometry(1.0, 2.0, math.nan)).metrics()
    assert uncertain["dynamics/in_band"] is None and uncertain["dynamics/incentive_ratio"] == 1.0


def test_the_clamp_and_its_count() -> None:
    far = [dynamics(1, 1, 1, 1e6), dynamics(1, 1, 1e6, 1)]  # r* = 10^±6: α = 10^±3
    calibrator = RewardCalibrator(ema=0.0, alpha_max=10.0)
    for expected, batch in zip((10, 0.1), far, strict=True):
        calibrator.update(batch)
        assert calibrator.alpha == pytest.approx(expected, rel=1e-13)
    assert calibrator.clamped == 2
    calibrator.update(dynamics(1, 1, 1, 81))  # α = 9
    assert calibrator.alpha == pytest.approx(9, rel=1e-13) and calibrator.clamped == 2
    free = RewardCalibrator(ema=0.0, alpha_max=None)
    for expected, batch in zip((1e3, 1e-3), far, strict=True):
        free.update(batch)
        assert free.alpha == pytest.approx(expected, rel=1e-12)
    assert free.clamped == 0


def test_the_clamp_does_not_enter_the_averages() -> None:
    # decay ½: log10 r* = 6, then ½·6 + ½·(−6) = 0: α = 1, as without a clamp
    calibrator = RewardCalibrator(ema=0.5, alpha_max=10.0)
    calibrator.update(dynamics(1, 1, 1, 1e6))
    calibrator.update(dynamics(1, 1, 1e6, 1))
    assert calibrator.alpha == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("settings", [{"ema": 1.0}, {"ema": -0.1}, {"alpha_max": 0.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"rc\.{next(iter(settings))}="):
        RewardCalibrator(**settings)


def test_calibrating_needs_a_rejected_side() -> None:
    with pytest.raises(ValueError, match="rc=on needs a rejected side"):
        RewardCalibrator().calibrate(PairLogps(torch.zeros(2)))


def test_calibration_scales_gradients_only() -> None:
    z = torch.tensor([-1.0, -2.0], dtype=torch.float64).requires_grad_()
    calibrator = RewardCalibrator()
    calibrator.alpha = 4.0
    out = calibrator.calibrate(PairLogps(z, 3 * z, z.detach(), z.detach(), chosen_means=5 * z))
    assert out.chosen_means is not None
    for side, gradient in ((out.chosen, 4.0), (out.losers, 3 / 4), (out.chosen_means, 20.0)):
        assert torch.autograd.grad(side.sum(), z, retain_graph=True)[0].tolist() == [gradient] * 2
    assert out.chosen.tolist() == [-1, -2] and out.losers.tolist() == [-3, -6]
    assert out.ref_chosen is not None and torch.equal(out.ref_chosen, z.detach())


VALUES = st.floats(-0.5, 3)


@given(
    steps=st.lists(st.tuples(VALUES, VALUES, st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=8),
    cut=st.integers(0, 8),
)
def test_a_restored_calibrator_continues_as_if_uninterrupted(
    steps: list[tuple[float, float, float, float]], cut: int
) -> None:
    straight, first, second = (RewardCalibrator(ema=0.8, alpha_max=1.5) for _ in range(3))
    for step in steps:
        straight.update(dynamics(*step))
    for step in steps[:cut]:
        first.update(dynamics(*step))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[cut:]:
        second.update(dynamics(*step))
    assert second.state_dict() == straight.state_dict()
    assert (second.alpha, second.skipped, second.clamped) == (
        straight.alpha,
        straight.skipped,
        straight.clamped,
    )


def test_a_saved_state_does_not_move_with_the_calibrator() -> None:
    calibrator = RewardCalibrator()
    calibrator.update(dynamics(1, 2, 3, 4))
    saved = calibrator.state_dict()
    copy = json.loads(json.dumps(saved))
    calibrator.update(dynamics(4, 3, 2, 1))
    assert saved == copy


# --- The meter ----------------------------------------------------------------------------------------------


def test_batch_means_by_hand() -> None:
    # d: means of (1, 2, 6) and (3, 3, 0); scores: sums (3, 4)·3 and (0, 5)·3 over 3 pairs; cos = 4/5
    meter = DynamicsMeter()
    assert meter.empty
    double = torch.float64
    meter.observe(
        (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])), torch.tensor([[6, 8], [0, 10]], dtype=double)
    )
    meter.observe((torch.tensor([6.0]), torch.tensor([0.0])), torch.tensor([[3, 4], [0, 5]], dtype=double))
    assert not meter.empty
    assert meter.collect() == dynamics(3, 2, 5, 5, pytest.approx(0.8, rel=1e-14))
    assert meter.empty
    meter.observe((torch.ones(1), torch.ones(1)), torch.ones(2, 4, dtype=double))
    assert meter.collect() == dynamics(1, 1, 2, 2, 1.0)  # nothing is left of the step before


def test_movements_are_means_of_the_log_ratios_that_count() -> None:
    # winners (1 + 2 + 6) / 3 = 3; losers (−1 − 4) / 2 = −2.5: the second has weight 0, the third counts whole
    meter, scores = DynamicsMeter(), torch.ones(2, 4, dtype=torch.float64)
    ones, parts = torch.ones(2), (torch.ones(2), torch.tensor([1.0, 0.0]))
    meter.observe((ones, ones), scores, parts, (torch.tensor([1.0, 2.0]), torch.tensor([-1.0, math.nan])))
    last = torch.ones(1), torch.tensor([0.5])
    meter.observe(last, scores, last, (torch.tensor([6.0]), torch.tensor([-4.0])))
    assert meter.collect().movement == Movement(3.0, -2.5)
    for weights, readings in (
        ((ones, torch.zeros(2)), (ones, ones)),
        ((torch.zeros(2), ones), (ones, ones)),
        (None, None),
    ):
        meter.observe((ones, ones), scores, weights, readings)
        assert meter.collect().movement is None  # not of one side alone


def test_norms_are_of_the_mean_score_and_not_means_of_norms() -> None:
    meter = DynamicsMeter()
    for sign in (1.0, -1.0):
        meter.observe((torch.ones(1), torch.ones(1)), torch.tensor([[sign, 0.0], [1.0, 0.0]]))
    assert meter.collect() == dynamics(1, 1, 0, 1, 0.0)  # the winner's scores cancel


@pytest.mark.parametrize("pairs", [1, 50])
def test_a_step_takes_one_reduction_of_a_size_that_the_batch_does_not_change(pairs: int) -> None:
    # two sides of k·D scores; d_w, d_l, two log-ratios and four counts, in three words of fp32 each
    sizes = []
    meter = DynamicsMeter()
    meter.observe((torch.rand(pairs), torch.rand(pairs)), torch.rand(2, 32, 8))
    meter.collect(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    assert sizes == [4 * (2 * 32 * 8 + 3 * 8)]


def test_sums_are_reduced_in_fp64_beside_scores_in_fp32() -> None:
    meter = DynamicsMeter()
    incentive = torch.tensor([1 / 3, 1e-9], dtype=torch.float64)
    meter.observe((incentive, 2 * incentive), torch.ones(2, 4))
    assert meter.collect().incentive_chosen == (1 / 3 + 1e-9) / 2  # fp32 would be off by 1e-8


@given(data=st.data(), pairs=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_any_split_of_a_batch_gives_the_same_dynamics(data: st.DataObject, pairs: int, seed: int) -> None:
    """Into micro-batches, and over two ranks whose sums are added: the same r, norms, ρ and so the same α."""
    generator = torch.Generator().manual_seed(seed)
    d_w, d_l = torch.rand(2, pairs, generator=generator, dtype=torch.float64)
    scores = torch.randn(pairs, 2, 3, 4, generator=generator, dtype=torch.float64)  # per pair

    def feed(meter: DynamicsMeter, first: int, last: int) -> None:
        meter.observe((d_w[first:last], d_l[first:last]), scores[first:last].sum(0))

    whole = DynamicsMeter()
    feed(whole, 0, pairs)
    cuts = sorted(data.draw(st.lists(st.integers(0, pairs), max_size=5)))
    bounds = [0, *cuts, pairs]
    ranks = [DynamicsMeter(), DynamicsMeter()]
    for piece, (first, last) in enumerate(pairwise(bounds)):  # some pieces are empty
        feed(ranks[data.draw(st.integers(0, 1)) if piece else 0], first, last)
    feed(ranks[1], 0, 0)
    contributions: list[Tensor] = []  # of rank 1, in the order of its reductions
    ranks[1].collect(lambda tensor: contributions.append(tensor.clone()) or tensor)
    split = ranks[0].collect(lambda tensor: tensor + contributions.pop(0))
    expected = whole.collect()

    close = {"rel": 1e-10, "abs": 1e-12}
    assert split.incentive_chosen == pytest.approx(expected.incentive_chosen, **close)
    assert split.incentive_rejected == pytest.approx(expected.incentive_rejected, **close)
    assert split.scores.norm_chosen == pytest.approx(expected.scores.norm_chosen, **close)
    assert split.scores.norm_rejected == pytest.approx(expected.scores.norm_rejected, **close)
    assert split.scores.cosine == pytest.approx(expected.scores.cosine, rel=1e-8, abs=1e-10)


# --- Two ranks in microbatch mode ---------------------------------------------------------------------------


def on_two_ranks(first: Dynamics | None, second: Dynamics | None) -> tuple[Dynamics | None, Dynamics | None]:
    """`average_logs` as both ranks see it: each adds what the other sent."""
    total = numbers(first) + numbers(second)
    results = [average_logs(numbers(mine), lambda _: total) for mine in (first, second)]
    return results[0], results[1]


def numbers(mine: Dynamics | None) -> Tensor:
    """What a rank with one pair of these dynamics sends."""
    if mine is None:
        return log_numbers(torch.zeros(8, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    readings = 0 if mine.movement is None else 1
    moved = [mine.movement.winner, mine.movement.loser] if mine.movement else [0.0, 0.0]
    sums = [mine.incentive_chosen, mine.incentive_rejected, 1, 1, *moved, readings, readings]
    s_w, s_l = mine.scores.norm_chosen, mine.scores.norm_rejected
    products = [s_w**2, s_l**2, mine.scores.cosine * s_w * s_l]
    return log_numbers(*(torch.tensor(part, dtype=torch.float64) for part in (sums, products)))


def test_a_rank_sends_the_logs_of_its_means() -> None:
    # two pairs: d = 6/2, 8/2, norms √16 / 2 and √100 / 2, cos = 12 / (4 · 10), movements 1/2 and −3/2
    sums = torch.tensor([6.0, 8.0, 2.0, 2.0, 1.0, -3.0, 2.0, 2.0], dtype=torch.float64)
    sent = log_numbers(sums, torch.tensor([16.0, 100.0, 12.0], dtype=torch.float64))
    logs = [math.log(value) for value in (3, 4, 2, 5)]
    expected = torch.tensor([*logs, 0, 0, 0, 0, 0.3, 0.5, -1.5, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(sent, expected, rtol=1e-14, atol=0)


def test_ranks_agree_on_the_geometric_mean() -> None:
    # sqrt(2·8) = 4, sqrt(1·9) = 3, sqrt(4·4) = 4, sqrt(1·25) = 5; (0.2 + 0.6)/2 = 0.4
    a, b = on_two_ranks(dynamics(2, 1, 4, 1, 0.2), dynamics(8, 9, 4, 25, 0.6))
    assert a == b and a is not None
    values = [a.incentive_chosen, a.incentive_rejected, a.scores.norm_chosen, a.scores.norm_rejected]
    assert [*values, a.scores.cosine] == pytest.approx([4, 3, 4, 5, 0.4], rel=1e-13)


def test_averaging_logs_of_ranks_averages_their_log_alphas() -> None:
    # α is a ratio of the four, so its log is the mean of the ranks' log α: 4 and 1 → 2
    calibrator = RewardCalibrator()
    common, _ = on_two_ranks(dynamics(1, 4, 1, 4), dynamics(1, 1, 2, 2))
    assert common is not None
    calibrator.update(common)
    assert calibrator.alpha == pytest.approx(2, rel=1e-13)


def test_movements_of_ranks_are_averaged_over_those_that_have_readings() -> None:
    ranks = [dynamics(1, 1, 1, 1) for _ in range(3)]
    ranks[0] = replace(ranks[0], movement=Movement(1.0, -1.0))
    ranks[1] = replace(ranks[1], movement=Movement(3.0, -5.0))
    found = average_logs(torch.stack([numbers(rank) for rank in ranks]).sum(0), lambda total: total)
    assert found is not None and found.movement == Movement(2.0, -3.0)
    found = average_logs(numbers(ranks[2]), lambda total: total)
    assert found is not None and found.movement is None


def test_a_rank_without_pairs_has_no_say() -> None:
    mine = dynamics(2, 1, 4, 1, 0.2)
    for a, b in (on_two_ranks(mine, None), on_two_ranks(None, mine)):
        assert a == b and a is not None
        assert a.incentive_chosen == pytest.approx(2) and a.scores.cosine == pytest.approx(0.2)
    assert on_two_ranks(None, None) == (None, None)


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan])
def test_a_side_without_incentive_on_one_rank_is_skipped_on_all(bad: float) -> None:
    a, b = on_two_ranks(dynamics(bad, 1, 4, 1), dynamics(2, 1, 4, 1))
    assert a == b and a is not None
    assert (a.incentive_chosen, a.incentive_rejected) == (0, pytest.approx(1))
    calibrator = RewardCalibrator()
    calibrator.update(a)
    assert (calibrator.alpha, calibrator.skipped) == (1, 1)


# --- The published calibration, microbatch by microbatch ----------------------------------------------------
#
# `reference/calibration.json` was made in float64, except that the published code casts each side's head
# gradient to float32 before it takes ‖s‖ and <s_w, s_l>, and keeps log ‖s‖ and its average in float32 too. So
# losses, incentives and the average of log r agree to 1e-12, but norms only to a float32's rounding (6e-8),
# and α, which is made of them, as well. To hold every stage to 1e-9 nevertheless, each stage below gets the
# reference's own input of that stage: rounded norms, rounded averages, the published α. Two tests show that
# the rounding is the whole difference: repeated in float32, it gives the stored numbers.

FLOAT32 = 2.0**-23  # one unit in the last place, relatively


def objectives() -> dict[str, Objective]:
    hyper = REFERENCE["hyper"]
    return {
        "DPO": get_objective("dpo", reduction="mean", beta=hyper["beta"]),
        "BCE": get_objective("bce"),
        "CPO": get_objective("cpo", beta=hyper["cpo_beta"], lambda_nll=hyper["cpo_lambda_nll"]),
        "UKL": get_objective("ukl"),
    }


NAMES = list(REFERENCE["trajectories"])
LENGTHS = [torch.tensor(batch["lengths"]) for batch in REFERENCE["inputs"]]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Published:
    """One micro-batch of 4 pairs through the head alone: log-probs, pairs and exact head scores."""

    def __init__(self, index: int) -> None:
        batch, lengths = REFERENCE["inputs"][index], LENGTHS[index]
        sequences = torch.repeat_interleave(torch.arange(8), lengths)
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        hidden = double(batch["hidden"])[sequences, positions]
        labels = torch.tensor(batch["labels"])[sequences, positions]
        self.weight = double(REFERENCE["W"]).requires_grad_()
        logps, _ = token_logps(hidden, self.weight, labels)
        ref_logps, _ = token_logps(hidden, double(REFERENCE["W_ref"]), labels)
        c = token_weights(logps, sequences, lengths, "mean")
        z, r = (sequence_logps(values, c, sequences, 8).view(2, 4) for values in (logps, ref_logps))
        self.pairs = PairLogps(*z, *r)
        sides = [sequences // 4 == side for side in range(2)]
        self.scores = torch.stack(
            [head_scores(hidden[side], self.weight, labels[side], c[side]) for side in sides]
        )

    def dynamics(self, objective: Objective) -> Dynamics:
        meter = DynamicsMeter()
        meter.observe(incentives(objective, self.pairs), self.scores.clone())
        return meter.collect()


@pytest.fixture(scope="module")
def batches() -> list[Published]:
    return [Published(index) for index in range(len(LENGTHS))]


def test_the_reference_holds_the_four_objectives() -> None:
    assert set(NAMES) == set(objectives())
    assert all(len(trajectory) == len(LENGTHS) == 5 for trajectory in REFERENCE["trajectories"].values())


@pytest.mark.parametrize("name", NAMES)
def test_published_losses_and_incentives(name: str, batches: list[Published]) -> None:
    for batch, stored in zip(batches, REFERENCE["trajectories"][name], strict=True):
        objective = objectives()[name]
        found = batch.dynamics(objective)
        assert objective(batch.pairs).mean().item() == pytest.approx(stored["loss"], rel=1e-9)
        assert found.incentive_chosen == pytest.approx(stored["incentive_w"], rel=1e-9)
        assert found.incentive_rejected == pytest.approx(stored["incentive_l"], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_published_norms_up_to_their_rounding(name: str, batches: list[Published]) -> None:
    for batch, stored in zip(batches, REFERENCE["trajectories"][name], strict=True):
        scores = batch.dynamics(objectives()[name]).scores
        for ours, published in ((scores.norm_chosen, "norm_w"), (scores.norm_rejected, "norm_l")):
            # stored values are float32 numbers; ours, rounded, is the same one or its neighbour
            assert double(stored[published]).float().item() == stored[published]
            assert double(ours).float().item() == pytest.approx(stored[published], rel=FLOAT32)
        product = scores.norm_chosen * scores.norm_rejected
        # <s_w, s_l> cancels, so its error goes by what is summed: at most ‖s_w‖‖s_l‖
        assert scores.cosine * product == pytest.approx(stored["dot"], abs=FLOAT32 * product)
        assert scores.cosine == pytest.approx(stored["rho"], abs=2 * FLOAT32)


def test_the_rounding_of_the_gradients_explains_the_stored_norms(batches: list[Published]) -> None:
    """Our head scores, cast to float32 as published, and summed there."""
    exact = 0
    for batch, stored in zip(batches, REFERENCE["trajectories"]["DPO"], strict=True):
        w, v = (batch.scores / 4).float()
        found = [(w * w).sum().sqrt(), (v * v).sum().sqrt(), (w * v).sum()]
        expected = [stored["norm_w"], stored["norm_l"], stored["dot"]]
        exact += sum(a.item() == b for a, b in zip(found, expected, strict=True))
        assert [a.item() for a in found[:2]] == pytest.approx(expected[:2], rel=FLOAT32)
    # All 15 bit by bit where it was measured; the order of a sum is the machine's.
    assert exact >= 8


@pytest.mark.parametrize("name", NAMES)
def test_published_average_of_the_log_ratio(name: str, batches: list[Published]) -> None:
    calibrator = RewardCalibrator(ema=0.9, alpha_max=None)
    for batch, stored in zip(batches, REFERENCE["trajectories"][name], strict=True):
        calibrator.update(batch.dynamics(objectives()[name]))
        log_d_w, log_d_l = calibrator.state_dict()["rule"]["log_incentives"]
        assert log_d_w - log_d_l == pytest.approx(stored["log_r_ema"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_published_average_of_the_log_center(name: str) -> None:
    """From the stored norms: ours is the float64 average, the stored one the float32 average."""
    calibrator = RewardCalibrator(ema=0.9, alpha_max=None)
    exact: list[float] | None = None
    rounded: Tensor | None = None
    for stored in REFERENCE["trajectories"][name]:
        norms = (stored["norm_w"], stored["norm_l"])
        calibrator.update(dynamics(stored["incentive_w"], stored["incentive_l"], *norms))
        logs = [math.log(norm) for norm in norms]
        exact = logs if exact is None else [0.9 * a + 0.1 * b for a, b in zip(exact, logs, strict=True)]
        single = torch.tensor(norms, dtype=torch.float32).log()
        rounded = single if rounded is None else 0.9 * rounded + 0.1 * single

        assert calibrator.state_dict()["rule"]["log_norms"] == pytest.approx(exact, rel=1e-12)
        # logs are up to 1 in size: a unit in the last place is 6e-8, and a machine's log may be off by one
        center = float(rounded[1]) - float(rounded[0])
        assert center == pytest.approx(stored["log_r_star_ema"], abs=FLOAT32)
        assert exact[1] - exact[0] == pytest.approx(stored["log_r_star_ema"], abs=3 * FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_published_alpha(name: str, batches: list[Published]) -> None:
    """Whole chain to a float32's rounding; α from the stored averages to 1e-9."""
    chain = RewardCalibrator(ema=0.9, alpha_max=None)
    for batch, stored in zip(batches, REFERENCE["trajectories"][name], strict=True):
        chain.update(batch.dynamics(objectives()[name]))
        assert chain.alpha == pytest.approx(stored["alpha"], rel=1e-7)
        single = RewardCalibrator(alpha_max=None)
        single.update(dynamics(math.exp(stored["log_r_ema"]), 1, 1, math.exp(stored["log_r_star_ema"])))
        assert single.alpha == pytest.approx(stored["alpha"], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_published_head_gradient(name: str, batches: list[Published]) -> None:
    """Backward through the fused log-probs with the stored α, to 1e-9; the loss keeps its value."""
    for batch, stored in zip(batches, REFERENCE["trajectories"][name], strict=True):
        calibrator = RewardCalibrator()
        calibrator.alpha = stored["alpha"]
        objective = objectives()[name]
        loss = objective(calibrator.calibrate(batch.pairs)).mean()
        assert loss.item() == pytest.approx(stored["loss"], rel=1e-9)
        (gradient,) = torch.autograd.grad(loss, batch.weight, retain_graph=True)
        assert gradient.norm().item() == pytest.approx(stored["head_grad_norm"], rel=1e-9)
        # a softmax has no net pull: each column of the gradient sums to 0
        assert abs(gradient.sum().item()) < 1e-13 and abs(stored["head_grad_sum"]) < 1e-13


def test_unpaired_sides_keep_their_parts_of_the_gradient() -> None:
    # three winners and one loser, two "pairs": d_w = (1+2+3)/2, s_w = 6/3, d_l = 4/2, s_l = 5/1
    meter = DynamicsMeter()
    scores = torch.tensor([[[6.0]], [[5.0]]])
    meter.observe((torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])), scores)
    dynamics = meter.collect()
    assert (dynamics.incentive_chosen, dynamics.incentive_rejected) == (3.0, 2.0)
    assert (dynamics.scores.norm_chosen, dynamics.scores.norm_rejected) == (2.0, 5.0)
    # the sum Σ d_i s_i is 2 · 6 where every d_i is its mean 2: pairs · d_w · s_w = 2 · 3 · 2
    assert 2 * dynamics.incentive_chosen * dynamics.scores.norm_chosen == 12.0


def test_step_calibration_uses_this_steps_alpha_and_sets_the_next() -> None:
    calibrator = RewardCalibrator(ema=0.0)
    step = StepCalibration(calibrator)
    # r = 1/4, r* = 4/1: α = sqrt(4 ÷ ¼) = 4
    step.observe((torch.tensor([1.0]), torch.tensor([4.0])), torch.tensor([[[1.0]], [[4.0]]]))
    first = step.end()
    assert first["rc/alpha"] == 1.0 and first["rc/calibrated_ratio"] == 0.25
    assert calibrator.alpha == pytest.approx(4.0, rel=1e-12)
    step.observe((torch.tensor([1.0]), torch.tensor([4.0])), torch.tensor([[[1.0]], [[4.0]]]))
    assert step.end()["rc/calibrated_ratio"] == pytest.approx(4.0, rel=1e-12)


def test_microbatch_updates_reach_the_micro_batch_that_made_them() -> None:
    calibrator = RewardCalibrator(ema=0.0)
    step = StepCalibration(calibrator, update="microbatch")
    step.observe((torch.tensor([1.0]), torch.tensor([4.0])), torch.tensor([[[1.0]], [[4.0]]]))
    assert calibrator.alpha == pytest.approx(4.0, rel=1e-12)
    calibrator = RewardCalibrator(ema=0.5)
    step = StepCalibration(calibrator, update="microbatch")
    step.observe((torch.tensor([1.0]), torch.tensor([4.0])), torch.tensor([[[1.0]], [[4.0]]]))
    step.observe((torch.tensor([1.0]), torch.tensor([1.0])), torch.tensor([[[1.0]], [[1.0]]]))
    step.end()  # whose means would ask for 2.5
    assert calibrator.alpha == pytest.approx(2.0, rel=1e-12)  # √(4 · 1)
    with pytest.raises(ValueError, match=r"rc\.update=epoch"):
        StepCalibration(calibrator, update="epoch")


# --- Weights ------------------------------------------------------------------------------------------------


@given(weights=st.lists(st.integers(1, 4), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_a_whole_weight_counts_as_so_many_pairs(weights: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_w, d_l = torch.rand(2, len(weights), generator=generator, dtype=torch.float64)
    scores = torch.randn(len(weights), 2, 3, 4, generator=generator, dtype=torch.float64)  # per pair
    parts = torch.tensor(weights, dtype=torch.float64)
    weighted, repeated = DynamicsMeter(), DynamicsMeter()
    weighted.observe((d_w, d_l), (parts[:, None, None, None] * scores).sum(0), (parts, parts))
    times = torch.tensor(weights)
    d = d_w.repeat_interleave(times), d_l.repeat_interleave(times)
    repeated.observe(d, scores.repeat_interleave(times, 0).sum(0))
    repeated_metrics = repeated.collect().metrics()
    for name, value in weighted.collect().metrics().items():
        other = repeated_metrics[name]
        assert value == (other if value is None else pytest.approx(other, rel=1e-9, abs=1e-12)), name


def test_weights_below_one_are_not_taken_for_no_pair() -> None:
    # Σ w = 0.2: d = (0.1·1 + 0.1·3)/0.2 = 2, s_w = 0.1·(3, 4)·2 / 0.2
    meter, parts = DynamicsMeter(), torch.tensor([0.1, 0.1], dtype=torch.float64)
    scores = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    meter.observe((torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])), scores, (parts, parts))
    found = meter.collect()
    assert (found.incentive_chosen, found.incentive_rejected) == pytest.approx((2, 2), rel=1e-12)
    assert (found.scores.norm_chosen, found.scores.norm_rejected) == pytest.approx((5, 5), rel=1e-12)
