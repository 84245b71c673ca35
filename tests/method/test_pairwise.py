"""One α per pair: norms from Gram matrices against autograd, and the rule in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcpo.method.band import Dynamics
from rcpo.method.calibration import RewardCalibrator
from rcpo.method.geometry import ScoreGeometry, Sketch
from rcpo.method.incentives import incentives
from rcpo.method.logps import sequence_logps, token_logps
from rcpo.method.objectives import get_objective
from rcpo.method.pairwise import PairCalibrator, pair_geometry
from rcpo.method.types import PairLogps

PAIRS, HIDDEN, VOCABULARY = 3, 5, 7
LENGTHS = torch.tensor([3, 1, 4, 2, 5, 1, 2, 2, 2])  # chosen, rejected, mismatched responses


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
    hidden = torch.randn(len(sequences), HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (len(sequences),), generator=generator)
    return hidden, head, labels, sequences, 1 / LENGTHS[sequences].double()


@pytest.mark.parametrize("seed", range(3))
def test_each_pairs_geometry_is_that_of_its_gradients_by_the_head(seed: int) -> None:
    hidden, head, labels, sequences, weights = tokens(seed)
    head.requires_grad_()
    logps, scores = token_logps(hidden, head, labels, sketch=Sketch(VOCABULARY, None))
    assert scores is not None
    norm_w, norm_l, cosine = pair_geometry(hidden, scores, weights, LENGTHS[: 2 * PAIRS])
    z = sequence_logps(logps, weights, sequences, len(LENGTHS))
    gradients = [torch.autograd.grad(one, head, retain_graph=True)[0].flatten() for one in z]
    for pair in range(PAIRS):
        own, other = gradients[pair], gradients[PAIRS + pair]
        assert float(norm_w[pair]) == pytest.approx(float(own.norm()), rel=1e-10)
        assert float(norm_l[pair]) == pytest.approx(float(other.norm()), rel=1e-10)
        expected = torch.cosine_similarity(own, other, dim=0)
        assert float(cosine[pair]) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_no_tokens_give_no_geometry() -> None:
    empty = torch.zeros(0, 4)
    norm_w, norm_l, cosine = pair_geometry(empty, empty, torch.zeros(0), torch.zeros(4, dtype=torch.long))
    assert norm_w.tolist() == norm_l.tolist() == cosine.tolist() == [0, 0]


@given(
    values=st.lists(st.tuples(*[st.floats(1e-2, 1e2)] * 4, st.floats(-0.9, 0.99)), min_size=1, max_size=5),
    edge=st.booleans(),
)
def test_a_pairs_alpha_is_that_of_a_batch_of_it_alone(
    values: list[tuple[float, float, float, float, float]], edge: bool
) -> None:
    columns = torch.tensor(values, dtype=torch.float64).T
    pairs = PairCalibrator(edge=edge, alpha_max=10.0)
    found = pairs.alphas((columns[0], columns[1]), (columns[2], columns[3], columns[4]))
    clamped = 0
    for alpha, (d_w, d_l, s_w, s_l, cosine) in zip(found.tolist(), values, strict=True):
        batch = RewardCalibrator("edge" if edge else "center", ema=0.0)
        batch.update(Dynamics(d_w, d_l, ScoreGeometry(s_w, s_l, cosine)))
        assert alpha == pytest.approx(batch.alpha, rel=1e-9)
        clamped += batch.clamped
    metrics = pairs.end(lambda tensor: tensor)
    mean = sum(map(math.log, found.tolist())) / len(values)
    assert metrics["rc/alpha"] == pytest.approx(math.exp(mean), rel=1e-9)
    assert (metrics["rc/skipped"], metrics["rc/clamped"]) == (0, clamped)


def test_pairs_that_say_nothing_keep_the_objectives_own_gradient_and_are_counted() -> None:
    pairs = PairCalibrator(edge=False, alpha_max=10.0)
    ones = torch.ones(4, dtype=torch.float64)
    d_w = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    norm_w = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    alphas = pairs.alphas((d_w, ones), (norm_w, 4 * ones, 0.5 * ones))
    assert alphas.tolist() == [2.0, 1.0, 1.0, 1.0]
    assert pairs.end(lambda tensor: tensor)["rc/skipped"] == 3
    assert pairs.end(lambda tensor: tensor) == {"rc/alpha": None, "rc/skipped": 3, "rc/clamped": 0}
    other = PairCalibrator(edge=False, alpha_max=10.0)
    other.load_state_dict(json.loads(json.dumps(pairs.state_dict())))
    assert other.skipped == 3


def test_each_pairs_gradient_is_scaled_by_its_own_alpha() -> None:
    chosen = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.5, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.full((3,), -1.2, dtype=torch.float64)
    logps = PairLogps(chosen, rejected, reference, reference)
    objective = get_objective("dpo", beta=1.0)
    d = incentives(objective, logps)
    geometry = (torch.ones(3), torch.tensor([4.0, 1.0, 9.0]), torch.full((3,), 0.2))
    calibrated = PairCalibrator(edge=False, alpha_max=None).calibrate(logps, d, geometry)
    assert torch.equal(calibrated.chosen, chosen) and torch.equal(calibrated.losers, rejected)
    objective(calibrated).sum().backward()
    alpha = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)  # r = 1: α = √r*
    assert chosen.grad is not None and rejected.grad is not None
    assert torch.allclose(-chosen.grad, alpha * d[0], rtol=1e-12)
    assert torch.allclose(rejected.grad, d[1] / alpha, rtol=1e-12)
