"""Head scores against autograd, the sketch against the exact scores, and what must not move α."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcpo.method import geometry
from rcpo.method.calibration import DynamicsMeter, RewardCalibrator
from rcpo.method.geometry import (
    HeadShape,
    Passes,
    ScoreGeometry,
    Sketch,
    excess_,
    head_scores,
    outer_scores,
    parameter_scores,
)
from rcpo.method.incentives import incentives
from rcpo.method.logps import token_logps
from rcpo.method.objectives import Objective, Specification, get_objective
from rcpo.method.types import PairLogps

N, D, V = 9, 4, 13
SHAPES = [HeadShape(), HeadShape(scale=0.6), HeadShape(softcap=1.5), HeadShape(scale=1.8, softcap=2.0)]


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def matrix_of(sketch: Sketch) -> Tensor:
    """S (k, V), read off one token at a time: where only −e_v is in excess, the score is S e_v."""
    return sketch.scores(-torch.eye(sketch.vocabulary, dtype=torch.float64)).T


# --- Head scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [N, 4, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_head_scores_equal_autograd(
    shape: HeadShape, with_bias: bool, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "ON_CPU", Passes(chunk_tokens * V, V))
    hidden, weight, labels, c = draw(1, N, D), draw(2, V, D).requires_grad_(), labels_of(N, V), draw(3, N)
    bias = draw(4, V) if with_bias else None
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * shape.scale
    if shape.softcap is not None:
        logits = torch.tanh(logits / shape.softcap) * shape.softcap
    total = (c * torch.log_softmax(logits, -1)[torch.arange(N), labels]).sum()
    (expected,) = torch.autograd.grad(total, weight)
    ours = head_scores(hidden, weight, labels, c, bias=bias, shape=shape)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_head_scores_by_hand() -> None:
    # W = 0, V = 2: p = ½ each; label 0 with h = (2, 4), c = 3: G = 3 (e_0 − ½) hᵀ = ±(3, 6)
    ours = head_scores(torch.tensor([[2.0, 4.0]]), torch.zeros(2, 2), torch.tensor([0]), torch.tensor([3.0]))
    assert ours.tolist() == [[3.0, 6.0], [-3.0, -6.0]]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, -1.0])
def test_logits_are_scaled_then_capped(scale: float) -> None:
    product = torch.tensor([[1.0, -3.0, 0.0]])
    scaled = torch.tensor([[scale, -3 * scale, 0.0]])
    assert HeadShape(scale).finish(product.clone()).equal(scaled)
    capped = torch.tensor([[4 * math.tanh(scale / 4), 4 * math.tanh(-3 * scale / 4), 0.0]])
    torch.testing.assert_close(HeadShape(scale, 4.0).finish(product.clone()), capped)


def test_the_score_of_a_certain_token_vanishes() -> None:
    weight = torch.tensor([[1e4], [0.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert not head_scores(one[:, None], weight, torch.tensor([0]), one).any()


def test_sketched_head_scores_are_the_sketch_of_the_exact_ones() -> None:
    hidden, weight, labels, c = draw(1, N, D), draw(2, V, D), labels_of(N, V), draw(3, N)
    for shape in SHAPES:
        exact = head_scores(hidden, weight, labels, c, shape=shape)
        for size in (1, 4, 5, 12):
            sketch = Sketch(V, size, seed=7)
            ours = head_scores(hidden, weight, labels, c, shape=shape, sketch=sketch)
            torch.testing.assert_close(ours, matrix_of(sketch) @ exact, rtol=1e-11, atol=1e-12)


def test_the_forward_pass_gives_the_same_scores() -> None:
    hidden, weight, labels, c = draw(1, N, D), draw(2, V, D), labels_of(N, V), draw(3, N)
    shape, sketch = SHAPES[3], Sketch(V, 5)
    _, scores = token_logps(hidden, weight, labels, shape=shape, sketch=sketch, passes=Passes(2 * V))
    assert scores is not None
    torch.testing.assert_close(
        outer_scores(hidden, scores, c),
        matrix_of(sketch) @ head_scores(hidden, weight, labels, c, shape=shape),
        rtol=1e-11,
        atol=1e-12,
    )


def test_low_precision_heads_are_scored_in_fp32() -> None:
    hidden, weight, c = draw(1, 32, 8).bfloat16(), draw(2, 100, 8).bfloat16(), draw(3, 32)
    labels = labels_of(32, 100)
    ours = head_scores(hidden, weight, labels, c)
    exact = head_scores(hidden.double(), weight.double(), labels, c)
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).norm() < 0.01 * exact.norm()


# --- The sketch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_a_sketch_has_one_sign_a_column_in_bucket_v_mod_k(size: int) -> None:
    matrix = matrix_of(Sketch(V, size, seed=1))
    assert matrix.shape == (size, V)
    for token in range(V):
        column = matrix[:, token]
        assert column.nonzero().flatten().tolist() == [token % size] and abs(column[token % size]) == 1


def test_seeds_choose_the_signs_and_nothing_else() -> None:
    first, again, other = (matrix_of(Sketch(200, 16, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and torch.equal(first.abs(), other.abs())
    differing = (first.sum(0) != other.sum(0)).sum().item()
    assert 60 < differing < 140  # half of 200 in expectation, standard deviation 7


@pytest.mark.parametrize("size", [None, V, V + 1])
def test_a_sketch_as_wide_as_the_vocabulary_is_exact(size: int | None) -> None:
    sketch = Sketch(V, size, seed=5)
    assert sketch.exact and sketch.size == V
    torch.testing.assert_close(matrix_of(sketch), torch.eye(V, dtype=torch.float64), rtol=0, atol=0)


@given(size=st.integers(1, V + 1), seed=st.integers(0, 1000), tokens=st.integers(0, 6), slopes=st.booleans())
def test_token_scores_are_linear(size: int, seed: int, tokens: int, slopes: bool) -> None:
    """S((e_y − p) ⊙ f′), one matrix product by the definition."""
    sketch = Sketch(V, size, seed)
    p, labels = torch.softmax(draw(seed, tokens, V), -1), labels_of(tokens, V, seed)
    slope = draw(seed + 1, tokens, V).sigmoid() if slopes else None
    exact = (torch.eye(V, dtype=torch.float64)[labels] - p) * (1 if slope is None else slope)
    ours = sketch.scores(excess_(p, labels, slope))
    torch.testing.assert_close(ours, exact @ matrix_of(sketch).T, rtol=1e-12, atol=1e-14)


def test_the_sketch_is_unbiased() -> None:
    """Means of ‖Sa‖² and <Sa, Sb> over 3,000 seeds: within four standard errors of ‖a‖² and <a, b>."""
    a, b = draw(1, 12, 3), draw(2, 12, 3)
    samples = []
    for seed in range(3000):
        matrix = matrix_of(Sketch(12, 5, seed))
        u, v = matrix @ a, matrix @ b
        samples.append([(u * u).sum(), (u * v).sum()])
    found = torch.tensor(samples, dtype=torch.float64)
    error = (found.mean(0) - torch.stack([(a * a).sum(), (a * b).sum()])).abs()
    standard_error = found.std(0) / math.sqrt(len(found))
    assert (error < 4 * standard_error).all()
    assert (standard_error > 0).all() and (standard_error < 0.05 * (a * a).sum()).all()


@pytest.mark.parametrize("seed", range(3))
def test_sketch_against_exact_at_a_large_vocabulary(seed: int) -> None:
    """V = 50,304, k = 2,048: norms within 3 %, cosine within 0.03."""
    vocabulary, width, tokens = 50_304, 16, 96
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.7  # logits spread by 3: a peaked softmax
    common = torch.randn(width, generator=generator)
    scores = {}
    for name, sketch in (("exact", None), ("sketch", Sketch(vocabulary, 2048, seed))):
        generator.manual_seed(seed + 100)
        sides = []
        for _ in range(2):
            hidden = common + torch.randn(tokens, width, generator=generator)
            # frequent labels, shared by the two sides, as in text
            labels = (vocabulary ** torch.rand(tokens, generator=generator)).long() - 1
            sides.append(head_scores(hidden, weight, labels, torch.ones(tokens) / 24, sketch=sketch))
        scores[name] = ScoreGeometry.of(torch.stack(sides))
    exact, sketched = scores["exact"], scores["sketch"]
    assert sketched != exact
    assert sketched.norm_chosen == pytest.approx(exact.norm_chosen, rel=0.03)
    assert sketched.norm_rejected == pytest.approx(exact.norm_rejected, rel=0.03)
    assert sketched.cosine == pytest.approx(exact.cosine, abs=0.03)
    assert abs(exact.cosine) > 0.05  # not a comparison of two zeros


# --- Norms and cosine ---------------------------------------------------------------------------------------


def test_score_geometry_by_hand() -> None:
    # ‖(3, 4)‖ = 5, ‖(6, 8, 0, …)‖ = 10; <,> = 3·6 + 4·0 = 18 with the 8 elsewhere: cos = 18/50
    scores = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[6.0, 0.0], [8.0, 0.0]]])
    assert ScoreGeometry.of(scores) == ScoreGeometry(5.0, 10.0, 18 / 50)
    flat = ScoreGeometry.of(scores.reshape(2, 4))  # (2, P), as geometry=parameters gives it
    assert flat == ScoreGeometry(5.0, 10.0, 18 / 50)


def test_the_cosine_of_a_zero_score_is_zero() -> None:
    scores = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])
    assert ScoreGeometry.of(scores) == ScoreGeometry(0.0, pytest.approx(math.sqrt(6)), 0.0)


def test_opposite_and_equal_scores() -> None:
    a = draw(1, 6, 5)
    assert ScoreGeometry.of(torch.stack([a, 2 * a])).cosine == pytest.approx(1, rel=1e-12)
    assert ScoreGeometry.of(torch.stack([a, -a])).cosine == pytest.approx(-1, rel=1e-12)


def test_parameter_scores_of_bf16_weights_are_added_up_in_fp32() -> None:
    weight = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    meter = DynamicsMeter()
    for _ in range(1000):  # in bf16 the sum of the first would stop at 256
        scores = parameter_scores(weight[0] * 1.0, weight[1] * 3.0, [weight])
        kept = scores.clone()
        meter.observe((torch.ones(1), torch.ones(1)), scores)
        assert torch.equal(scores, kept)  # the caller's own
    assert meter.collect().scores == ScoreGeometry(1.0, 3.0, 0.0)


def test_parameter_scores_equal_autograd() -> None:
    weight, bias, unused = draw(1, 3, 2).requires_grad_(), draw(2, 3).requires_grad_(), draw(3, 2)
    unused.requires_grad_()
    x, y = draw(4, 2), draw(5, 2)
    z_w, z_l = torch.tanh(weight @ x + bias).sum(), (weight @ y).square().sum()
    ours = parameter_scores(z_w, z_l, [weight, bias, unused])
    # ∂/∂W Σ tanh(Wx + b) = (1 − tanh²) xᵀ; ∂/∂W ‖Wy‖² = 2 W y yᵀ; b and `unused` get zeros where not used
    with torch.no_grad():
        slope = 1 - torch.tanh(weight @ x + bias) ** 2
        chosen = torch.cat([torch.outer(slope, x).flatten(), slope, torch.zeros(2)])
        rejected = torch.cat([2 * torch.outer(weight @ y, y).flatten(), torch.zeros(3), torch.zeros(2)])
    torch.testing.assert_close(ours, torch.stack([chosen, rejected]), rtol=1e-12, atol=1e-14)
    (z_w + z_l).backward()  # the graph is kept for the step's own backward
    torch.testing.assert_close(bias.grad, slope, rtol=1e-12, atol=1e-14)


def test_head_geometry_is_parameter_geometry_where_only_the_head_is_trained() -> None:
    hidden, weight, labels = draw(1, N, D), draw(2, V, D).requires_grad_(), labels_of(N, V)
    logps, _ = token_logps(hidden, weight, labels)
    side = torch.arange(N) < 4
    by_autograd = ScoreGeometry.of(parameter_scores(logps[side].sum(), logps[~side].sum(), [weight]))
    ones = torch.ones(N, dtype=torch.float64)
    closed = [head_scores(hidden[k], weight, labels[k], ones[k]) for k in (side, ~side)]
    by_head = ScoreGeometry.of(torch.stack(closed))
    assert by_head.norm_chosen == pytest.approx(by_autograd.norm_chosen, rel=1e-12)
    assert by_head.norm_rejected == pytest.approx(by_autograd.norm_rejected, rel=1e-12)
    assert by_head.cosine == pytest.approx(by_autograd.cosine, rel=1e-10)


# --- Rescaling one side's z must not move α -----------------------------------------------------------------


def rescaled(base: Objective, chosen: float, rejected: float) -> Objective:
    """The same objective, written for log-probs that come `chosen` and `rejected` times as large."""

    def loss(logps: PairLogps) -> Tensor:
        return base(logps.replace(chosen=logps.chosen / chosen, rejected=logps.losers / rejected))

    return Objective(Specification("rescaled", loss, "mean", False), "mean", 0.0, {})


def alphas(base: Objective, chosen: float, rejected: float, sketch: Sketch | None) -> list[float]:
    """α after each of three batches of 4 pairs with 3 tokens a response, z rescaled side by side."""
    objective = rescaled(base, chosen, rejected)
    calibrator = RewardCalibrator(ema=0.7, alpha_max=None)
    weight, found = draw(0, V, D), []
    for batch in range(3):
        z, scores = [], []
        for side, factor in enumerate((chosen, rejected)):
            seed = 10 * batch + side
            hidden, labels = draw(seed, 12, D), labels_of(12, V, seed)
            c = torch.full((12,), factor / 3, dtype=torch.float64)
            logps, _ = token_logps(hidden, weight, labels)
            z.append((c * logps).view(4, 3).sum(1))
            scores.append(head_scores(hidden, weight, labels, c, sketch=sketch))
        meter = DynamicsMeter()
        meter.observe(incentives(objective, PairLogps(*z)), torch.stack(scores))
        calibrator.update(meter.collect())
        found.append(calibrator.alpha)
    return found


@given(
    chosen=st.floats(1e-3, 1e3),
    rejected=st.floats(1e-3, 1e3),
    name=st.sampled_from(["simpo", "cpo", "slic", "orpo", "alphapo"]),
    size=st.sampled_from([None, 5]),
)
def test_alpha_ignores_the_scale_of_either_side(
    chosen: float, rejected: float, name: str, size: int | None
) -> None:
    # d → d/c and ‖s‖ → c ‖s‖: r and r* move alike. α itself is not 1 here, so the test can fail.
    sketch = Sketch(V, size)
    plain = alphas(get_objective(name), 1.0, 1.0, sketch)
    assert max(abs(math.log(alpha)) for alpha in plain) > 0.01
    assert alphas(get_objective(name), chosen, rejected, sketch) == pytest.approx(plain, rel=1e-11)
