"""The band's edges and where there is none; averages across samples; all worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rcpo.method.band import DisentanglementBand, Dynamics
from rcpo.method.geometry import ScoreGeometry
from rcpo.method.samples import CrossSamples, SampleGeometry

NAN, INF = math.nan, math.inf


def test_both_edges_are_inside() -> None:
    band = DisentanglementBand(center=3.0, cosine=0.5)
    assert (band.lower, band.upper) == (1.5, 6.0)
    assert 1.5 in band and 6.0 in band and 3.0 in band
    assert math.nextafter(1.5, 0) not in band and math.nextafter(6.0, 7) not in band


@pytest.mark.parametrize(("cosine", "lower"), [(0.0, 0.0), (-0.25, -0.75)])
def test_sides_that_pull_apart_have_no_upper_edge(cosine: float, lower: float) -> None:
    band = DisentanglementBand(center=3.0, cosine=cosine)
    assert band.lower == lower and band.upper is None
    assert 1e300 in band and 0.0 in band


def test_a_little_likeness_has_an_upper_edge() -> None:
    assert DisentanglementBand(center=3.0, cosine=2**-20).upper == 3 * 2**20


def dynamics(
    d_w: float = 1.0, d_l: float = 2.0, s_w: float = 4.0, s_l: float = 2.0, cosine: float = 0.5
) -> Dynamics:
    return Dynamics(d_w, d_l, ScoreGeometry(s_w, s_l, cosine))


def test_a_batch_by_hand() -> None:
    found = dynamics()
    assert found.incentive_ratio == 0.5
    assert found.band == DisentanglementBand(center=0.5, cosine=0.5)
    assert found.metrics() == {
        "dynamics/incentive_chosen": 1.0,
        "dynamics/incentive_rejected": 2.0,
        "dynamics/score_norm_chosen": 4.0,
        "dynamics/score_norm_rejected": 2.0,
        "dynamics/score_cosine": 0.5,
        "dynamics/incentive_ratio": 0.5,
        "dynamics/band_center": 0.5,
        "dynamics/band_lower": 0.25,
        "dynamics/band_upper": 1.0,
        "dynamics/in_band": True,
    }
    assert dynamics(d_w=4.0).metrics()["dynamics/in_band"] is False


@pytest.mark.parametrize("bad", [0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("side", ["d_w", "d_l"])
def test_a_side_without_an_incentive_has_no_ratio_and_no_band(side: str, bad: float) -> None:
    found = dynamics(**{side: bad})
    assert found.incentive_ratio is None and found.band is None
    values = found.metrics()
    assert values["dynamics/incentive_ratio"] is values["dynamics/in_band"] is None
    assert values["dynamics/band_center"] is values["dynamics/band_upper"] is None


@pytest.mark.parametrize(("d_w", "d_l"), [(1e308, 1e-308), (1e-308, 1e308)])
def test_a_ratio_beyond_the_numbers_is_none(d_w: float, d_l: float) -> None:
    assert dynamics(d_w, d_l).incentive_ratio is None


@pytest.mark.parametrize(
    "scores",
    [
        {"s_w": 0.0}, {"s_l": 0.0}, {"s_w": NAN}, {"s_l": NAN}, {"s_w": INF}, {"s_l": INF},
        {"s_w": 1e-308, "s_l": 1e308}, {"s_w": 1e308, "s_l": 1e-308}, {"cosine": NAN}, {"cosine": INF},
    ],
)  # fmt: skip
def test_scores_that_say_nothing_have_no_band_but_a_ratio(scores: dict[str, float]) -> None:
    found = dynamics(**scores)
    assert found.band is None and found.incentive_ratio == 0.5
    assert found.metrics()["dynamics/in_band"] is None


# --- across samples -------------------------------------------------------------------------------------


def geometry(
    winner: float = 4.0,
    loser: float = 1.0,
    cross: float = 1.0,
    error: float | None = 0.1,
    products: int = 8,
) -> SampleGeometry:
    return SampleGeometry(winner, loser, cross, error, error, error, None, products)


def test_eight_products_three_errors_above_zero_are_clear() -> None:
    assert geometry().clear and geometry().center == 0.5 and geometry().cosine == 0.5
    assert not geometry(products=7).clear
    assert not geometry(error=None).clear
    for name in ("winner", "loser"):
        assert not geometry(**{name: 0.25 * 3}, error=0.25).clear  # exactly three errors is not above
        assert geometry(**{name: 0.76}, error=0.25).clear
    unclear = geometry(products=7)
    assert unclear.center is None and unclear.cosine is None
    mixed = SampleGeometry(4.0, 1.0, 1.0, 0.1, None, None, None, 8)
    assert not mixed.clear


def test_the_band_across_samples_by_hand() -> None:
    def band(samples: SampleGeometry | None) -> DisentanglementBand | None:
        return Dynamics(1.0, 1.0, ScoreGeometry(1.0, 1.0, 0.0), samples).sample_band

    assert band(geometry()) == DisentanglementBand(0.5, 0.5)
    assert band(geometry(cross=1.9)) == DisentanglementBand(0.5, 0.95)
    assert band(geometry(cross=2.1)) == DisentanglementBand(0.5, 1.0)
    assert band(geometry(cross=-1.0)) == DisentanglementBand(0.5, -0.5)
    assert band(geometry(products=2)) is None and band(None) is None


def scores(winner: float, loser: float) -> Tensor:
    return torch.tensor([[[winner]], [[loser]]], dtype=torch.float64)


def test_averages_and_errors_of_products_by_hand() -> None:
    samples = CrossSamples()
    assert samples.geometry() is None and samples.observe(scores(1, 2)) is None
    first = samples.observe(scores(3, 5))  # W 1·3, L 2·5, X ½(1·5 + 2·3), norm 3·3
    assert first == SampleGeometry(3.0, 10.0, 5.5, None, None, None, 1 - 3 / 9, 1)
    second = samples.observe(scores(2, 1))  # W 6, L 5, X ½(3·1 + 5·2) = 6.5, norm 4
    assert second is not None and second.products == 2
    weight = 0.95 + 1
    mean = (0.95 * 3 + 6) / weight
    share = (0.95**2 + 1) / weight**2
    variance = ((0.95 * 9 + 36) / weight - mean**2) / (1 - share)
    assert second.winner == pytest.approx(mean, rel=1e-14)
    assert second.loser == pytest.approx((0.95 * 10 + 5) / weight, rel=1e-14)
    assert second.cross == pytest.approx((0.95 * 5.5 + 6.5) / weight, rel=1e-14)
    assert second.winner_error == pytest.approx(math.sqrt(2 * variance * share), rel=1e-12)
    assert second.self_influence == pytest.approx(1 - mean / ((0.95 * 9 + 4) / weight), rel=1e-14)


def test_equal_products_have_no_error_and_no_norm_has_no_share() -> None:
    samples = CrossSamples()
    for _ in range(4):
        found = samples.observe(scores(0.0, 0.1))
    assert found is not None and found.winner_error == 0.0 and found.loser_error == pytest.approx(0, abs=1e-9)
    assert found.self_influence is None


def test_a_step_that_was_left_out_is_not_the_one_before() -> None:
    samples = CrossSamples()
    samples.observe(scores(1, 1))
    assert samples.observe(scores(NAN, 1)) is None
    found = samples.observe(scores(1, NAN))
    assert found is None
    found = samples.observe(scores(4, 7))
    assert found is not None and (found.winner, found.loser, found.products) == (4.0, 7.0, 1)
