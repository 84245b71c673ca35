"""From a band to α: closed forms, continuity, monotonicity, invariance; and a constant."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rcpo.method.band import Dynamics
from rcpo.method.calibration import RewardCalibrator
from rcpo.method.geometry import ScoreGeometry
from rcpo.method.samples import SampleGeometry

positive = st.floats(1e-3, 1e3)
cosines = st.floats(0.01, 1.0)


def dynamics(d_w: float, d_l: float, s_w: float, s_l: float, cosine: float) -> Dynamics:
    """A batch whose own norms and whose population have the same geometry."""
    samples = SampleGeometry(s_w**2, s_l**2, cosine * s_w * s_l, 0.0, 0.0, 0.0, 0.0, products=100)
    return Dynamics(d_w, d_l, ScoreGeometry(s_w, s_l, cosine), samples)


def alpha(rule: str, band: str, batch: Dynamics) -> float:
    calibrator = RewardCalibrator(rule, band=band, alpha_max=None)
    calibrator.update(batch)
    return calibrator.alpha


@pytest.mark.parametrize("band", ["batch", "samples"])
def test_edges_by_hand(band: str) -> None:
    # r* = 2, ρ = ½: the band is [1, 4]
    for ratio, expected in [(1 / 16, 4), (1 / 4, 2), (1, 1), (2, 1), (4, 1), (16, 1 / 2), (64, 1 / 4)]:
        assert alpha("edge", band, dynamics(ratio, 1, 1, 2, 0.5)) == pytest.approx(expected, rel=1e-14)
        assert alpha("center", band, dynamics(ratio, 1, 1, 2, 0.5)) == pytest.approx(
            math.sqrt(2 / ratio), rel=1e-14
        )


@given(ratio=positive, s_w=positive, s_l=positive, cosine=cosines, band=st.sampled_from(["batch", "samples"]))
def test_edge_leaves_the_inside_alone_and_moves_the_outside_to_the_edge(
    ratio: float, s_w: float, s_l: float, cosine: float, band: str
) -> None:
    found = alpha("edge", band, dynamics(ratio, 1, s_w, s_l, cosine))
    lower, upper = cosine * s_l / s_w, s_l / s_w / cosine
    if lower * (1 + 1e-9) <= ratio <= upper * (1 - 1e-9):
        assert found == 1.0  # to the bit: gradients are then those of rc=off
    else:
        assert found**2 * ratio == pytest.approx(min(max(ratio, lower), upper), rel=1e-9)


@given(first=positive, second=positive, s_w=positive, s_l=positive, cosine=cosines)
@pytest.mark.parametrize("rule", ["edge", "center"])
def test_alpha_falls_with_the_ratio_and_never_jumps(
    rule: str, first: float, second: float, s_w: float, s_l: float, cosine: float
) -> None:
    low, high = sorted((first, second))
    a, b = (alpha(rule, "batch", dynamics(ratio, 1, s_w, s_l, cosine)) for ratio in (low, high))
    assert a >= b * (1 - 1e-12)
    # log α falls by half of what log r rises by, at most
    assert math.log(a) - math.log(b) <= 0.5 * math.log(high / low) + 1e-9


@given(scale=st.floats(0.01, 100), values=st.tuples(positive, positive, positive, positive), cosine=cosines)
@pytest.mark.parametrize("rule", ["edge", "center"])
@pytest.mark.parametrize("band", ["batch", "samples"])
@pytest.mark.parametrize("side", [0, 1])
def test_rescaling_a_sides_z_leaves_alpha_unchanged(
    rule: str, band: str, side: int, scale: float, values: tuple[float, ...], cosine: float
) -> None:
    d, s = list(values[:2]), list(values[2:])
    before = alpha(rule, band, dynamics(*d, *s, cosine))
    d[side], s[side] = d[side] / scale, s[side] * scale  # z → scale · z: d·s stays
    assert alpha(rule, band, dynamics(*d, *s, cosine)) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("cosine", [0.0, -0.7])
def test_edge_has_nothing_to_do_where_every_ratio_is_inside(cosine: float) -> None:
    for ratio in (1e-3, 1.0, 1e3):
        assert alpha("edge", "batch", dynamics(ratio, 1, 1, 2, cosine)) == 1.0


def test_a_cosine_above_one_is_noise_and_leaves_the_center_as_the_band() -> None:
    samples = SampleGeometry(1.0, 4.0, 2.1, 0.1, 0.1, 0.1, 0.0, products=100)
    batch = Dynamics(1.0, 1.0, ScoreGeometry(1.0, 1.0, 0.1), samples)
    assert batch.sample_band is not None and batch.sample_band.cosine == 1.0
    assert alpha("edge", "samples", batch) == pytest.approx(math.sqrt(2), rel=1e-14)


def test_alpha_waits_for_a_band_across_samples() -> None:
    calibrator = RewardCalibrator(band="samples")
    calibrator.update(Dynamics(1.0, 4.0, ScoreGeometry(1.0, 4.0, 0.5)))
    assert (calibrator.alpha, calibrator.skipped) == (1.0, 1)
    noisy = SampleGeometry(1.0, 4.0, 1.0, 0.9, 0.1, 0.1, 0.0, products=100)
    calibrator.update(Dynamics(1.0, 4.0, ScoreGeometry(1.0, 4.0, 0.5), noisy))
    assert (calibrator.alpha, calibrator.skipped) == (1.0, 2)
    calibrator.update(dynamics(1, 4, 1, 4, 0.5))
    assert calibrator.alpha == pytest.approx(4, rel=1e-14) and calibrator.skipped == 2


def test_a_fixed_alpha_is_fixed() -> None:
    calibrator = RewardCalibrator("fixed", alpha=2.5)
    assert calibrator.alpha == pytest.approx(2.5, rel=1e-15)  # in the first step, too
    for batch in (dynamics(1, 1, 1, 1, 0.5), dynamics(1, -1, 0, 1, 0.5)):
        calibrator.update(batch)
        assert calibrator.alpha == pytest.approx(2.5, rel=1e-15)
    assert (calibrator.skipped, calibrator.clamped) == (0, 0)


@pytest.mark.parametrize("band", ["batch", "samples"])
@given(values=st.lists(st.tuples(positive, positive, positive, positive, cosines), min_size=3, max_size=6))
def test_a_restored_edge_rule_continues_with_the_same_bits(
    band: str, values: list[tuple[float, float, float, float, float]]
) -> None:
    assume(len(values) >= 3)
    whole, first, second = (RewardCalibrator("edge", band=band, ema=0.7) for _ in range(3))
    for one in values:
        whole.update(dynamics(*one))
    for one in values[:2]:
        first.update(dynamics(*one))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one in values[2:]:
        second.update(dynamics(*one))
    assert second.alpha == whole.alpha


@pytest.mark.parametrize(
    "settings",
    [{"rule": "centre"}, {"band": "sample"}, {"rule": "fixed"}, {"rule": "fixed", "alpha": 0.0}],
)
def test_settings_that_do_not_exist_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^rc\.(rule|band|alpha)="):
        RewardCalibrator(**settings)  # type: ignore[arg-type]
