"""What micro-batches and ranks tell each other, a calibrator's settings, and the loop's terms; by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rcpo.method.band import Dynamics, Movement
from rcpo.method.calibration import (
    DynamicsMeter,
    RewardCalibrator,
    StepCalibration,
    _in_words,
    average_logs,
    log_numbers,
    scale_gradients,
    statistics,
)
from rcpo.method.geometry import ScoreGeometry
from rcpo.method.loop import LoopRule
from rcpo.method.samples import CrossSamples
from rcpo.method.types import PairLogps

LIMIT = math.log(10)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- a micro-batch --------------------------------------------------------------------------------------


def test_sums_of_a_micro_batch() -> None:
    incentives = (vector(1, 3, math.nan), vector(2, 4, 8))
    plain = statistics((vector(1, 3), vector(2, 4)), None, None)
    assert plain.tolist() == [4, 6, 2, 2, 0, 0, 0, 0] and plain.dtype == torch.float64
    weights = (vector(0.5, 2, 0), vector(1, 0, 0.25))
    logratios = (vector(-0.5, 0.25, math.nan), vector(1, math.inf, 3))
    found = statistics(incentives, weights, logratios)
    # ½·1 + 2·3; 1·2 + ¼·8; ½ + 2; 1 + ¼; of readings plain sums and how many
    assert found.tolist() == [6.5, 4, 2.5, 1.25, -0.25, 4, 2, 2]


def test_a_meter_is_empty_until_something_is_observed_and_after_it_is_read() -> None:
    meter = DynamicsMeter()
    assert meter.empty
    with pytest.raises(AssertionError, match="nothing was observed"):
        meter.collect()
    for _ in range(2):
        meter.observe(
            (vector(1, 3), vector(2)), torch.tensor([[[6.0]], [[8.0]]]), None, (vector(1, 2), vector(4))
        )
    assert not meter.empty
    found = meter.collect()
    # four chosen and two rejected: incentives per 3 pairs, scores per response of their side
    assert (found.incentive_chosen, found.incentive_rejected) == (8 / 3, 4 / 3)
    assert found.scores == ScoreGeometry(12 / 4, 16 / 2, 1.0)
    assert found.movement == Movement(6 / 4, 8 / 2) and found.samples is None
    assert meter.empty


def test_a_batch_of_one_side_has_no_movement_and_divides_by_nothing_else() -> None:
    meter = DynamicsMeter()
    none = torch.zeros(0, dtype=torch.float64)
    meter.observe((vector(1, 3), none), torch.tensor([[[6.0]], [[0.0]]]), None, (vector(1, 2), none))
    found = meter.collect()
    assert (found.incentive_chosen, found.incentive_rejected, found.movement) == (4, 0, None)
    assert found.scores == ScoreGeometry(3.0, 0.0, 0.0)
    meter.observe((none, none), torch.zeros(2, 1, 1))
    found = meter.collect()
    assert (found.incentive_chosen, found.incentive_rejected) == (0, 0)
    assert found.scores == ScoreGeometry(0.0, 0.0, 0.0)


@pytest.mark.parametrize("counts", [(0, 2), (2, 0), (4, 2)])
def test_samples_get_means_per_response_of_a_side_also_where_one_is_empty(counts: tuple[int, int]) -> None:
    samples = CrossSamples()
    meter = DynamicsMeter(samples)
    sides = [torch.ones(count, dtype=torch.float64) for count in counts]
    totals = [8.0 if count else 0.0 for count in counts]
    meter.observe((sides[0], sides[1]), torch.tensor(totals).view(2, 1, 1))
    meter.collect()
    assert samples.previous is not None
    means = [8 / count if count else 0 for count in counts]
    assert samples.previous.flatten().tolist() == means


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_three_words_hold_a_number_as_well_as_their_type_allows(dtype: torch.dtype) -> None:
    numbers = vector(1 / 3, 1e6 + 0.1, -7)
    words = _in_words(numbers, dtype)
    assert words.shape == (3, 3) and words.dtype == dtype
    digits = {torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    tolerance = max(2.0 ** (-3 * digits), 2.0**-53)
    torch.testing.assert_close(words.double().sum(0), numbers, rtol=tolerance, atol=0)


# --- between ranks --------------------------------------------------------------------------------------


def test_a_rank_tells_logs_a_cosine_and_the_movement() -> None:
    # 2 and 6 over (3 + 1)/2 = 2 pairs; norms √9/3 and √4/1, cosine 3/(3·2); readings ½ of 1 and 3 of 2
    sums = vector(2, 6, 3, 1, 1, 3, 2, 1)
    found = log_numbers(sums, vector(9, 4, 3))
    expected = vector(0, math.log(3), 0, math.log(2), 0, 0, 0, 0, 0.5, 0.5, 3, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


def test_a_rank_marks_what_is_not_positive_and_what_is_not_there() -> None:
    found = log_numbers(vector(-2, 6, 1, 1, 0, 0, 0, 1), vector(0, 4, 0))
    # d_w and ‖s_w‖ have no log; readings of one side alone are none
    assert found.tolist() == pytest.approx([0, math.log(6), 0, math.log(2), 1, 0, 1, 0, 0, 0, 0, 1, 0])
    for n_w, n_l in ((0, 0), (2, 0), (0, 2)):
        assert log_numbers(vector(2, 6, n_w, n_l, 1, 1, 1, 1), vector(9, 4, 3)).tolist() == [0] * 13


def test_ranks_agree_on_geometric_means_and_plain_ones() -> None:
    own = log_numbers(vector(2, 8, 1, 1, 0.5, -0.5, 1, 1), vector(16, 4, 4))  # d 2, 8; s 4, 2; cos ½
    other = log_numbers(vector(8, 2, 1, 1, 1.5, 0.25, 1, 1), vector(1, 1, 1))  # d 8, 2; s 1, 1; cos 1
    absent = log_numbers(vector(0, 0, 0, 0, 0, 0, 0, 0), vector(0, 0, 0))
    found = average_logs(own, lambda mine: mine + other + absent)
    assert found is not None
    assert found.incentive_chosen == pytest.approx(4) and found.incentive_rejected == pytest.approx(4)
    assert found.scores.norm_chosen == pytest.approx(2) and found.scores.norm_rejected == pytest.approx(
        2**0.5
    )
    assert found.scores.cosine == pytest.approx(0.75)
    assert found.movement == Movement(1.0, -0.125)
    assert average_logs(absent, lambda mine: mine) is None


def test_what_one_rank_finds_not_positive_is_zero_for_all() -> None:
    own = log_numbers(vector(2, 8, 1, 1, 0, 0, 0, 0), vector(16, 4, 4))
    for place in range(4):
        values = [2.0, 8.0, 16.0, 4.0]
        values[place] = 0.0 if place > 1 else -1.0
        other = log_numbers(vector(*values[:2], 1, 1, 0, 0, 0, 0), vector(*values[2:], 0))
        found = average_logs(own, lambda mine, other=other: mine + other)
        assert found is not None and found.movement is None
        numbers = [
            found.incentive_chosen,
            found.incentive_rejected,
            found.scores.norm_chosen,
            found.scores.norm_rejected,
        ]
        assert [number == 0 for number in numbers] == [each == place for each in range(4)]


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "centre"}, "rc.rule=centre: one of center, edge, loop, fixed is expected"),
        ({"band": "sample"}, "rc.band=sample: one of batch, samples is expected"),
        ({"ema": -0.1}, "rc.ema=-0.1: a decay in [0, 1) is expected"),
        ({"ema": 1.0}, "rc.ema=1.0: a decay in [0, 1) is expected"),
        ({"alpha_max": 0.9}, "rc.alpha_max=0.9: at least 1 is expected, or null for no clamp"),
        ({"rule": "fixed"}, "rc.alpha=None: rc.rule=fixed needs a positive number"),
        ({"rule": "fixed", "alpha": 0.0}, "rc.alpha=0.0: rc.rule=fixed needs a positive number"),
        ({"rule": "fixed", "alpha": math.inf}, "rc.alpha=inf: rc.rule=fixed needs a positive number"),
        ({"rule": "fixed", "alpha": math.nan}, "rc.alpha=nan: rc.rule=fixed needs a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^rc\.") as refusal:
        RewardCalibrator(**settings)
    assert str(refusal.value) == message


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    RewardCalibrator(ema=0.0)
    assert RewardCalibrator("fixed", alpha=1e-300).alpha == pytest.approx(0.1)  # the clamp's
    held = RewardCalibrator(alpha_max=1.0)
    held.update(Dynamics(1.0, 4.0, ScoreGeometry(1.0, 4.0, 0.5)))
    assert (held.alpha, held.clamped) == (1.0, 1)


def test_defaults_and_the_clamp_on_either_side() -> None:
    for ratio, alpha, clamped in [
        (1 / 100, 10, 0),
        (1 / 101, 10, 1),
        (100, 0.1, 0),
        (101, 0.1, 1),
        (4, 0.5, 0),
    ]:
        calibrator = RewardCalibrator()  # the center, alpha_max 10
        calibrator.update(Dynamics(ratio, 1.0, ScoreGeometry(1.0, 1.0, 0.5)))
        assert calibrator.alpha == pytest.approx(alpha, rel=1e-9) and calibrator.clamped == clamped, ratio
    calibrator.update(Dynamics(16.0, 1.0, ScoreGeometry(1.0, 1.0, 0.5)))  # log r: 0.9 log 4 + 0.1 log 16
    assert calibrator.alpha == pytest.approx(math.exp(-0.5 * 1.1 * math.log(4)), rel=1e-12)
    assert calibrator.metrics() == {"rc/skipped": 0, "rc/clamped": 0}
    calibrator.update(Dynamics(0.0, 1.0, ScoreGeometry(1.0, 1.0, 0.5)))
    assert calibrator.metrics() == {"rc/skipped": 1, "rc/clamped": 0}


def test_a_step_is_updated_by_step_or_by_micro_batch() -> None:
    with pytest.raises(ValueError, match=r"^rc\.update=batch: step or microbatch is expected$"):
        StepCalibration(None, update="batch")
    assert not StepCalibration(None, update="microbatch").by_microbatch  # it only measures
    assert not StepCalibration(RewardCalibrator()).by_microbatch
    assert StepCalibration(RewardCalibrator(), update="microbatch").by_microbatch


def test_a_micro_batch_counts_for_its_part_of_a_step() -> None:
    moved: list[Movement | None] = []
    calibrator = RewardCalibrator("loop")
    calibrator.update = lambda dynamics: moved.append(dynamics.movement)  # type: ignore[method-assign]
    step = StepCalibration(calibrator, update="microbatch")
    step.begin(4)
    ones, scores = (vector(1), vector(1)), torch.ones(2, 1, 1)
    step.observe(ones, scores, None, (vector(-0.5), vector(0.25)))
    step.observe(ones, scores)
    assert moved == [Movement(-0.5, 0.25, steps=0.25), None]
    one = StepCalibration(calibrator, update="microbatch")  # without `begin`: a step of one
    one.observe(ones, scores, None, (vector(1), vector(1)))
    assert moved[2] == Movement(1, 1, steps=1.0)


def test_a_reading_moves_alpha_at_once_and_a_new_epoch_forgets_the_step_before() -> None:
    calibrator = RewardCalibrator("loop")
    step = StepCalibration(calibrator)
    step.begin(movement=Movement(-0.02, -0.05))
    assert calibrator.alpha == pytest.approx(math.exp(0.02 * 4.4))
    StepCalibration(None).begin(movement=Movement(-0.02, -0.05))  # nothing follows it
    for new_epoch, products in ((False, None), (False, 1), (True, 1), (False, 2)):
        step.begin(new_epoch=new_epoch)
        step.observe((vector(1), vector(1)), torch.ones(2, 1, 1))
        step.end()
        geometry = step.samples.geometry()
        assert (None if geometry is None else geometry.products) == products


def test_what_a_step_reports() -> None:
    step = StepCalibration(RewardCalibrator(ema=0.0))
    row: dict[str, Any] = {}
    for _ in range(2):
        step.begin()
        step.observe((vector(1), vector(4)), torch.tensor([[[1.0, 0.0]], [[2.0, 3.0]]]))
        row = step.end()
    # r = ¼, r* = √13, ρ = 2/√13: band [2, 13/2]; α² r = r*: inside
    assert row["rc/alpha"] ** 2 == pytest.approx(4 * 13**0.5)
    assert row["rc/calibrated_ratio"] == pytest.approx(13**0.5) and row["rc/in_band"] is True
    assert row["dynamics/in_band"] is False and row["dynamics/samples/winner"] == 1.0
    step.observe((vector(-1), vector(4)), torch.tensor([[[1.0, 0.0]], [[2.0, 3.0]]]))
    row = step.end()
    assert row["rc/calibrated_ratio"] is row["rc/in_band"] is None and row["rc/skipped"] == 1
    step.observe((vector(1), vector(4)), torch.zeros(2, 1, 2))
    row = step.end()
    assert row["rc/calibrated_ratio"] is not None and row["rc/in_band"] is None


def test_gradients_are_scaled_on_both_sides_and_the_means() -> None:
    z_w, z_l, means = (vector(value).requires_grad_() for value in (-1.0, -2.0, -0.5))
    scaled = scale_gradients(PairLogps(z_w, z_l, chosen_means=means), 4.0)
    assert scaled.chosen_means is not None
    (scaled.chosen + 2 * scaled.losers + 3 * scaled.chosen_means).sum().backward()
    assert [tensor.grad.item() for tensor in (z_w, z_l, means) if tensor.grad is not None] == [4, 0.5, 12]
    assert scale_gradients(PairLogps(z_w, z_l), 4.0).chosen_means is None
    with pytest.raises(
        ValueError, match=r"^rc=on needs a rejected side; this objective has none: use rc=off$"
    ):
        scale_gradients(PairLogps(z_w), 4.0)


# --- the loop, with its constants written out ---------------------------------------------------------------


def test_a_moving_reading_by_hand() -> None:
    loop = LoopRule(limit=LIMIT)
    loop.follow(Movement(-0.01, -0.2))
    found = loop.follow(Movement(-0.03, -0.2))
    # averages of the winner with memories 0.7 and 0.93: (0.7·x + y)/1.7 and (0.93·x + y)/1.93
    fast, slow = (0.7 * -0.01 - 0.03) / 1.7, (0.93 * -0.01 - 0.03) / 1.93
    integral = 0.4 * 0.01 + 0.4 * -fast
    assert loop.metrics()["rc/winner"] == pytest.approx(fast, rel=1e-12)
    assert loop.metrics()["rc/integral"] == pytest.approx(integral, rel=1e-12)
    assert found == pytest.approx(4 * -(fast + 3 * (fast - slow)) + integral, rel=1e-12)
    assert loop.metrics()["rc/saturated"] == 0


def test_a_rising_loser_by_hand() -> None:
    loop = LoopRule(limit=LIMIT)
    loop.follow(Movement(0.5, 0.01))
    found = loop.follow(Movement(0.5, 0.03))
    fast, slow = (0.7 * 0.01 + 0.03) / 1.7, (0.93 * 0.01 + 0.03) / 1.93
    assert loop.metrics()["rc/loser"] == pytest.approx(fast, rel=1e-12)
    whole = -4 * (fast + 3 * (fast - slow)) - 0.4 * (0.01 + fast)
    assert found == pytest.approx(whole / 4, rel=1e-12)  # below α = 1 a quarter of it


def test_the_leak_and_the_slew_by_hand() -> None:
    loop = LoopRule(limit=LIMIT)
    assert loop.follow(Movement(-1.0, -2.0)) == 0.5  # wanted 4.4, clamped to log 10, of which ½ a step
    assert loop.metrics()["rc/saturated"] == 1
    assert loop.follow(Movement(-1.0, -2.0, steps=3.0)) == pytest.approx(0.5 + 1.5)
    held = LoopRule(limit=LIMIT)
    held.load_state_dict({"averages": [[1.0, 1.0]] * 2 + [[-1.0, 1.0]] * 2, "integral": 0.1,
                          "log_alpha": 0.1, "saturated": 7})  # fmt: skip
    assert held.follow(Movement(1.0, -1.0, steps=2.0)) == pytest.approx(0.1 * 0.995**2, rel=1e-12)
    assert held.metrics()["rc/saturated"] == 7
    quick = LoopRule(limit=LIMIT)
    assert quick.follow(Movement(-1.0, -2.0, steps=0.25)) == 0.5 / 4  # part of a step moves by its part
