"""W, L and X across samples: unbiased, whatever the batch, with honest standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcpo.method.band import Dynamics
from rcpo.method.calibration import DynamicsMeter
from rcpo.method.geometry import ScoreGeometry
from rcpo.method.samples import FEWEST, CrossSamples, SampleGeometry

SIZE = 30
# population gradients with W = 1.5² = 2.25, L = 2.0² + 0.5² = 4.25, X = 3.0
S = torch.zeros(2, 1, SIZE, dtype=torch.float64)
S[0, 0, 0], S[1, 0, 0], S[1, 0, 1] = 1.5, 2.0, 0.5
TRUTH = (2.25, 4.25, 3.0)
NOISE = 0.6  # of each element of one example's gradient: tr Σ = 30 · 0.36 = 10.8


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Mean scores of batches of `size` examples; the sides share half of their noise, a prompt."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        own = torch.randn(2, 1, SIZE, generator=generator, dtype=torch.float64)
        shared = torch.randn(1, 1, SIZE, generator=generator, dtype=torch.float64)
        yield S + NOISE / math.sqrt(size) * (own + shared) / math.sqrt(2)


def found(count: int, size: int, seed: int) -> SampleGeometry:
    samples = CrossSamples()
    for scores in batches(count, size, seed):
        geometry = samples.observe(scores)
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("size", [1, 4, 16])
def test_products_between_batches_are_unbiased_for_any_batch_size(size: int) -> None:
    """The batch's own products are not: ‖ŝ_w‖² is too large by tr Σ/B = 10.8/B, ⟨ŝ_w, ŝ_l⟩ by half of it."""
    runs = [found(30, size, seed) for seed in range(150)]
    for name, truth in zip(("winner", "loser", "cross"), TRUTH, strict=True):
        values = torch.tensor([getattr(run, name) for run in runs])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(runs)), name
    own = torch.stack([(batch[0] * batch[0]).sum() for batch in batches(2000, size, 0)])
    assert float(own.mean()) == pytest.approx(2.25 + 10.8 / size, rel=0.05)


def test_errors_shrink_with_the_root_of_the_steps_and_are_stated_honestly() -> None:
    spread = {}
    for count in (5, 20):
        runs = [found(count, 4, seed) for seed in range(400)]
        spread[count] = float(torch.tensor([run.winner for run in runs]).std())
        errors = torch.tensor([run.winner_error or math.nan for run in runs])
        assert 0.9 < float(errors.square().mean().sqrt()) / spread[count] < 1.5
    # 4 and 19 products; the oldest of 19 count for 0.95^18 = 0.4, which costs a tenth
    assert spread[5] / spread[20] == pytest.approx(math.sqrt(19 / 4), rel=0.15)


def test_the_band_is_that_of_the_population_and_not_of_the_batch() -> None:
    meter = DynamicsMeter(CrossSamples())
    for scores in batches(400, 4, seed=1):
        meter.observe((torch.ones(1), torch.ones(1)), scores)
        dynamics = meter.collect()
    band, own = dynamics.sample_band, dynamics.band
    assert band is not None and own is not None
    assert band.lower == pytest.approx(3 / 2.25, rel=0.1)
    assert band.upper == pytest.approx(4.25 / 3, rel=0.1)
    assert own.upper is not None and own.lower < 0.9 * band.lower and own.upper > 1.1 * band.upper
    assert dynamics.samples is not None and dynamics.samples.self_influence is not None
    assert dynamics.samples.self_influence == pytest.approx(2.7 / (2.25 + 2.7), rel=0.2)  # tr Σ/B of it


def test_a_band_is_stated_only_once_it_stands_clear_of_its_noise() -> None:
    samples = CrossSamples()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        geometry = samples.observe(torch.randn(2, 1, SIZE, generator=generator))  # no population gradient
    assert geometry is not None and not geometry.clear
    dynamics = Dynamics(1.0, 1.0, ScoreGeometry(1.0, 1.0, 0.5), geometry)
    metrics = dynamics.metrics()
    assert metrics["dynamics/in_band"] is True
    for name in ("cosine", "band_center", "band_lower", "band_upper", "in_band"):
        assert metrics[f"dynamics/samples/{name}"] is None
    assert metrics["dynamics/samples/winner"] == geometry.winner


def test_too_few_products_give_no_band_however_alike_they_are() -> None:
    samples = CrossSamples()
    for step in range(FEWEST + 1):
        geometry = samples.observe(S)
        assert (geometry is not None and geometry.clear) == (step == FEWEST)


def test_metrics_by_hand() -> None:
    # W 4, L 9, X 5: ρ̄ = 5/6, r̄* = 3/2, band [5/4, 9/5]; r = 2 is outside
    geometry = SampleGeometry(4.0, 9.0, 5.0, 0.5, 0.5, 0.5, self_influence=0.75, products=50)
    metrics = Dynamics(2.0, 1.0, ScoreGeometry(1.0, 1.0, 0.1), geometry).metrics()
    own = {name.removeprefix("dynamics/samples/"): v for name, v in metrics.items() if "/samples/" in name}
    assert own == pytest.approx(
        {
            "winner": 4, "loser": 9, "cross": 5, "winner_error": 0.5, "loser_error": 0.5, "cross_error": 0.5,
            "cosine": 5 / 6, "self_influence": 0.75,
            "band_center": 1.5, "band_lower": 1.25, "band_upper": 1.8, "in_band": False,
        }
    )  # fmt: skip
    assert metrics["dynamics/in_band"] is True


def test_nothing_is_multiplied_across_a_border_that_was_forgotten() -> None:
    samples = CrossSamples()
    samples.observe(S)
    samples.forget()
    assert samples.observe(5 * S) is None
    geometry = samples.observe(S)
    assert geometry is not None and geometry.winner == 5 * 2.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(bad: float) -> None:
    samples = CrossSamples()
    samples.observe(S)
    assert samples.observe(S * bad) is None
    geometry = samples.observe(2 * S)
    assert geometry is not None and geometry.winner == 2 * 2.25


def test_a_restored_state_continues_with_the_same_bits() -> None:
    whole, steps = CrossSamples(), list(batches(12, 4, seed=3))
    for scores in steps:
        expected = whole.observe(scores)
    first, second = CrossSamples(), CrossSamples()
    for scores in steps[:7]:
        first.observe(scores)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.previous = first.previous
    for scores in steps[7:]:
        geometry = second.observe(scores)
    assert geometry == expected


def both(other: DynamicsMeter, message: Tensor) -> Tensor:
    """The sum of a rank's message and what another one sends."""
    sent: list[Tensor] = []
    other.collect(lambda own: sent.append(own.clone()) or own)
    return message + sent[0]


@given(cuts=st.lists(st.integers(0, 10), max_size=4), seed=st.integers(0, 2**31))
def test_any_split_of_the_batches_gives_the_same_products(cuts: list[int], seed: int) -> None:
    """Ten pairs a step, as one micro-batch, and cut up over micro-batches of two ranks."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(3, 10, 2, 3, 4, generator=generator, dtype=torch.float64)  # per pair
    ones = torch.ones(10, dtype=torch.float64)
    whole, first, second = DynamicsMeter(CrossSamples()), DynamicsMeter(CrossSamples()), DynamicsMeter()
    for scores in steps:
        for part, (start, end) in enumerate(pairwise([0, *sorted(cuts), 10])):
            meter = second if part % 2 else first
            meter.observe((ones[start:end], ones[start:end]), scores[start:end].sum(0))
        second.observe((ones[:0], ones[:0]), scores[:0].sum(0))
        whole.observe((ones, ones), scores.sum(0))
        split, expected = first.collect(partial(both, second)).samples, whole.collect().samples
    assert split is not None and expected is not None
    values = [[one.winner, one.loser, one.cross, one.self_influence] for one in (split, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-12)
