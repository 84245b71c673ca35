"""Fused log-probs against torch's own log_softmax and autograd; reductions and pairs by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcpo.method import logps
from rcpo.method.geometry import ON_GPU, HeadShape, Passes, Sketch, outer_scores
from rcpo.method.logps import pair_logps, sequence_logps, token_logps, token_weights
from rcpo.method.types import SIDES, TokenBatch

N, D, V = 7, 5, 11
SHAPES = [
    HeadShape(),
    HeadShape(scale=0.6),
    HeadShape(softcap=1.5),
    HeadShape(scale=1.8, softcap=2.0),
]


def portions(chunk: int | None, block: int | None = 2) -> Passes:
    """Chunks of so many tokens (None: all), of which so many (None: all) go through the softmax together."""
    return Passes(V * (chunk or 2**20), None if block is None else V * block)


# 7 = N: the softmax is kept; 6 and 3 leave a remainder of 1; in pairs of rows, and of 3 rows all together
CHUNKS = [*(portions(chunk) for chunk in (None, 7, 6, 3, 1)), portions(3, None)]


def head(
    tokens: int = N, vocabulary: int = V, width: int = D, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return draw(tokens, width), draw(vocabulary, width), draw(vocabulary), labels


def plain_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shape: HeadShape
) -> Tensor:
    """The same by transformers' order of operations: scale, then soft-cap, then log_softmax."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * shape.scale
    if shape.softcap is not None:
        logits = torch.tanh(logits / shape.softcap) * shape.softcap
    return torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("passes", CHUNKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_autograd(shape: HeadShape, with_bias: bool, passes: Passes) -> None:
    hidden, weight, bias, labels = head()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), *([bias.requires_grad_()] * with_bias)]
    b = bias if with_bias else None
    ours, scores = token_logps(hidden, weight, labels, bias=b, shape=shape, passes=passes)
    theirs = plain_logps(hidden, weight, labels, b, shape)
    assert scores is None
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    cotangent = torch.linspace(-1, 2, N, dtype=torch.float64)  # every token pulls differently
    for a, c in zip(
        torch.autograd.grad(ours, leaves, cotangent),
        torch.autograd.grad(theirs, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("passes", [portions(None), portions(3)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: HeadShape, passes: Passes) -> None:
    hidden, weight, bias, labels = head()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def fused(*inputs: Tensor) -> Tensor:
        h, w, b = inputs
        return token_logps(h, w, labels, bias=b, shape=shape, passes=passes)[0]

    assert torch.autograd.gradcheck(fused, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("passes", [portions(None), portions(2)], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(trained: str, passes: Passes) -> None:
    hidden, weight, bias, labels = head()
    parts = {"hidden": hidden, "weight": weight, "bias": bias}
    parts[trained].requires_grad_()
    token_logps(hidden, weight, labels, bias=bias, passes=passes)[0].sum().backward()
    (expected,) = torch.autograd.grad(
        plain_logps(hidden, weight, labels, bias, HeadShape()).sum(), parts[trained]
    )
    for name, part in parts.items():
        if name == trained:
            torch.testing.assert_close(part.grad, expected, rtol=1e-12, atol=1e-13)
        else:
            assert part.grad is None


@pytest.mark.parametrize("passes", [portions(None), portions(2)], ids=str)
def test_the_graph_can_be_used_twice(passes: Passes) -> None:
    hidden, weight, bias, labels = head()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logps, _ = token_logps(hidden, weight, labels, bias=bias, shape=SHAPES[3], passes=passes)
    first = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(3 * logps.sum(), leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("passes", CHUNKS, ids=str)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_the_sketched_scores_of_the_same_pass(
    shape: HeadShape, size: int | None, passes: Passes, trained: bool
) -> None:
    """S ∂ log p / ∂ logits of each token, S built here column by column from its definition."""
    hidden, weight, bias, labels = head()
    sketch = Sketch(V, size, seed=3)
    matrix = torch.zeros(sketch.size, V, dtype=torch.float64)
    signs = sketch.signs(matrix)
    for token in range(V):
        matrix[token % sketch.size, token] = signs[token]
    raw = (hidden @ weight.T + bias).requires_grad_()
    capped = raw * shape.scale
    if shape.softcap is not None:
        capped = torch.tanh(capped / shape.softcap) * shape.softcap
    logps = torch.log_softmax(capped, -1)[torch.arange(N), labels]
    (slopes,) = torch.autograd.grad(logps.sum(), raw)

    if trained:
        weight.requires_grad_()
    ours, scores = token_logps(hidden, weight, labels, bias=bias, shape=shape, sketch=sketch, passes=passes)
    assert scores is not None and not scores.requires_grad
    torch.testing.assert_close(scores, slopes @ matrix.T, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours, logps, rtol=1e-12, atol=1e-13)
    if trained:  # the scores share memory with nothing that the backward pass needs
        (gradient,) = torch.autograd.grad(ours.sum(), weight)
        torch.testing.assert_close(gradient, slopes.T @ hidden, rtol=1e-11, atol=1e-12)


def test_low_precision_inputs_give_fp32_log_probs() -> None:
    hidden, weight, bias, labels = head(tokens=64, vocabulary=500, width=32, dtype=torch.bfloat16)
    exact = plain_logps(hidden.double(), weight.double(), labels, bias.double(), HeadShape())
    largest = (hidden.double() @ weight.double().T + bias.double()).abs().max().item()
    hidden.requires_grad_(), weight.requires_grad_()
    logps, _ = token_logps(hidden, weight, labels, bias=bias, passes=Passes(5000, 1000))
    assert logps.dtype == torch.float32
    # a logit x is rounded to bf16 once, by at most 2⁻⁹ |x|; log p moves by at most twice the largest error
    assert (logps.double() - exact).abs().max() <= 2 * 2**-9 * largest + 1e-5
    # a log-softmax in bf16 would be worse: one value in 128 steps of an octave
    rounded = torch.log_softmax((hidden @ weight.T + bias).detach(), -1)[torch.arange(64), labels]
    assert (logps.double() - exact).abs().mean() < (rounded.double() - exact).abs().mean()
    logps.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    double_h, double_w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain_logps(double_h, double_w, labels, bias.double(), HeadShape()).sum().backward()
    for ours, theirs in ((hidden.grad, double_h.grad), (weight.grad, double_w.grad)):
        assert theirs is not None
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("tokens", [64, 20], ids=["one chunk", "chunks of 20"])
def test_a_bf16_heads_gradients_are_off_by_the_rounding_of_bf16_alone(tokens: int) -> None:
    hidden, weight, bias, labels = head(tokens=64, vocabulary=500, width=32, dtype=torch.bfloat16)
    weight[labels[0]] = hidden[0].sign()  # an all but certain token: p − 1 in bf16 would be nothing
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    cotangent = torch.linspace(-1, 2, 64)
    logps, _ = token_logps(hidden, weight, labels, bias=bias, passes=Passes(500 * tokens, 1000))
    ours = torch.autograd.grad(logps, leaves, cotangent)

    logits = torch.nn.functional.linear(hidden, weight, bias).detach().double()  # as rounded on the way there
    factors = torch.softmax(logits, -1)
    factors[torch.arange(64), labels] -= 1
    factors *= -cotangent.double()[:, None]
    assert 1e-6 < factors[0].abs().max() < 1e-2
    h, w = hidden.detach().double(), weight.detach().double()
    exact = factors @ w, factors.T @ h, factors.sum(0)
    # rounding to 8 bits is off by at most 2⁻⁸: each factor, each chunk's product where there are several, the
    # result; sums in fp32 add to that
    rounded = 1 if tokens == 64 else 2
    terms = factors.abs() @ w.abs(), factors.abs().T @ h.abs(), factors.abs().sum(0)
    for name, a, b, size in zip(("hidden", "weight", "bias"), ours, exact, terms, strict=True):
        assert ((a.double() - b).abs() <= 2**-8 * (rounded * size + b.abs()) + 1e-5 * size).all(), name


class Kernels(TorchDispatchMode):
    """Counts operations that compute: views and empty tensors start nothing on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += not (func.is_view or "empty" in name or "detach" in name or "alias" in name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", [152_064, 128_256])  # Qwen 2.5 and Llama 3
@pytest.mark.parametrize("trained", [True, False])
def test_a_gpu_starts_few_operations_for_the_sketch(vocabulary: int, trained: bool) -> None:
    hidden = torch.empty(600, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocabulary, 64, device="meta", dtype=torch.bfloat16, requires_grad=trained)
    labels = torch.zeros(600, dtype=torch.long, device="meta")

    def count(sketch: Sketch | None) -> int:
        with Kernels() as kernels:
            logps, scores = token_logps(hidden, weight, labels, sketch=sketch)
            if scores is not None:
                for _ in range(2):
                    outer_scores(hidden, scores, logps)
            logps.sum().backward()
        return kernels.count

    sketch = Sketch(vocabulary, 2048)
    sketch.signs(hidden.float())  # go to the device once
    without = count(None)
    assert without < 25
    assert count(sketch) - without <= 25


@pytest.mark.parametrize("vocabulary", [152_064, 50_304, 2048 * 3 + 1])
def test_sketches_of_all_portions_have_the_same_bits(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (5, vocabulary))
    labels, sketch = torch.arange(5), Sketch(vocabulary, 2048, seed=1)

    def scores(passes: Passes) -> Tensor:
        found = token_logps(hidden, weight, labels, sketch=sketch, passes=passes)[1]
        assert found is not None
        return found

    together = scores(ON_GPU)
    for rows in (1, 2, 5):
        assert torch.equal(scores(Passes(ON_GPU.chunk, rows * vocabulary)), together)


def test_fp32_close_to_fp64() -> None:
    hidden, weight, bias, labels = head(tokens=64, vocabulary=500, width=32)
    exact = plain_logps(hidden, weight, labels, bias, HeadShape())
    logps, _ = token_logps(hidden.float(), weight.float(), labels, bias=bias.float())
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    hidden, weight, _, labels = head()
    hidden.requires_grad_(), weight.requires_grad_()
    logps, scores = token_logps(hidden[:0], weight, labels[:0], sketch=Sketch(V, 4))
    assert logps.shape == (0,) and scores is not None and scores.shape == (0, 4)
    logps.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_scoring_makes_nothing_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained head scores in evaluations too: there p − e_y would be made of every logit for nothing."""
    hidden, weight, bias, labels = head()
    weight.requires_grad_()
    bias.requires_grad_()
    learned, _ = token_logps(hidden, weight, labels, bias=bias)
    made: list[Tensor] = []
    monkeypatch.setattr(logps, "excess_", lambda p, *_: made.append(p) or p)
    with torch.no_grad():
        scored, _ = token_logps(hidden, weight, labels, bias=bias)
    assert torch.equal(scored, learned) and not made
    token_logps(hidden, weight, labels, bias=bias)
    assert len(made) == 1  # while training it is


def test_extreme_logits_stay_finite() -> None:
    # logits 0 and 1e4: log p = −1e4 and 0 exactly
    weight = torch.tensor([[0.0], [1e4]]).requires_grad_()
    logps, _ = token_logps(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    assert logps.tolist() == [-1e4, 0.0]
    (gradient,) = torch.autograd.grad(logps.sum(), weight)
    assert gradient.tolist() == [[1.0], [-1.0]]  # the impossible token: e_0 − e_1; the certain one: 0


# --- Reductions ---------------------------------------------------------------------------------------------

# Two sequences of 2 and 3 tokens with p = ½, ¼ and ¾, ½, 1.
TOKENS = torch.tensor([0.5, 0.25, 0.75, 0.5, 1.0], dtype=torch.float64).log()
SEQUENCES = torch.tensor([0, 0, 1, 1, 1])
LENGTHS = torch.tensor([2, 3])
# 1 − p = ½, ¾ (sum 5/4) and ¼, ½, 0 (sum ¾)
WEIGHTS = {
    "sum": [1, 1, 1, 1, 1],
    "mean": [1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3],
    "importance": [2 / 5, 3 / 5, 1 / 3, 2 / 3, 0],
}
LOG2, LOG43 = math.log(2), math.log(4 / 3)
# log p = −log 2, −2 log 2 and −log 4/3, −log 2, 0
REDUCED = {
    "sum": [-3 * LOG2, -LOG43 - LOG2],
    "mean": [-1.5 * LOG2, -(LOG43 + LOG2) / 3],
    "importance": [-(0.4 + 1.2) * LOG2, -LOG43 / 3 - 2 * LOG2 / 3],
}


@pytest.mark.parametrize("reduction", WEIGHTS)
def test_reductions_by_hand(reduction: str) -> None:
    weights = token_weights(TOKENS.clone().requires_grad_(), SEQUENCES, LENGTHS, reduction)
    assert not weights.requires_grad  # importance weights are constants of the gradient
    torch.testing.assert_close(
        weights, torch.tensor(WEIGHTS[reduction], dtype=torch.float64), rtol=1e-14, atol=0
    )
    z = sequence_logps(TOKENS, weights, SEQUENCES, 2)
    torch.testing.assert_close(z, torch.tensor(REDUCED[reduction], dtype=torch.float64), rtol=1e-14, atol=0)


def test_importance_where_every_token_is_certain() -> None:
    # 1 − p = 0 for all: 0/0 is taken as 0, so z = 0, which is also its limit
    tokens = torch.zeros(3, dtype=torch.float32).requires_grad_()
    weights = token_weights(tokens, torch.tensor([0, 0, 1]), torch.tensor([2, 1]), "importance")
    z = sequence_logps(tokens, weights, torch.tensor([0, 0, 1]), 2)
    assert weights.tolist() == [0, 0, 0] and z.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(z.sum(), tokens)
    assert gradient.tolist() == [0, 0, 0]


def test_importance_of_nearly_certain_tokens_still_sums_to_one() -> None:
    # log p = −1e-12 and −3e-12: 1 − p to first order 1e-12 and 3e-12, lost by 1 − exp in fp32
    tokens = torch.tensor([-1e-12, -3e-12])
    weights = token_weights(tokens, torch.tensor([0, 0]), torch.tensor([2]), "importance")
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=1e-6, atol=0)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_importance_and_mean_weights_sum_to_one(lengths: list[int], seed: int) -> None:
    counts = torch.tensor(lengths)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    tokens = -torch.rand(len(sequences), generator=torch.Generator().manual_seed(seed)) - 1e-3
    for reduction in ("mean", "importance"):
        weights = token_weights(tokens, sequences, counts, reduction)
        sums = [weights[sequences == i].sum().item() for i in range(len(lengths))]
        assert sums == pytest.approx([1.0] * len(lengths), rel=1e-12)


def test_sums_of_fp32_tokens_are_taken_in_fp64() -> None:
    # 2²⁴ + 1 is not an fp32 number
    z = sequence_logps(
        torch.tensor([-(2.0**24), -1.0]), torch.ones(2, dtype=torch.float64), torch.tensor([0, 0]), 1
    )
    assert z.item() == -(2.0**24) - 1


def test_weights_keep_their_precision_on_fp32_tokens() -> None:
    z = sequence_logps(torch.tensor([-1.0]), torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([0]), 1)
    assert z.item() == -1 / 3


# --- Pairs --------------------------------------------------------------------------------------------------


def token_batch(sides: tuple[str, ...], lengths: list[int]) -> TokenBatch:
    """B = 2 pairs with the given response lengths; only what the reductions read is filled in."""
    empty = torch.zeros(1, 1, dtype=torch.long)
    counts = torch.tensor(lengths)
    tokens = int(counts.sum())
    filled: dict[str, Any] = {"predictors": torch.arange(tokens), "labels": torch.zeros(tokens).long()}
    return TokenBatch(
        input_ids=empty,
        position_ids=empty,
        sequences=torch.repeat_interleave(torch.arange(2 * len(sides)), counts),
        lengths=counts,
        weights=torch.ones(2),
        indices=torch.arange(2),
        example_ids=["a", "b"],
        sides=sides,
        **filled,
    )


def test_pairs_are_chosen_then_rejected_then_mismatched() -> None:
    batch = token_batch(SIDES[:3], [1, 2, 1, 1, 2, 1])
    logps = -torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)
    ref = -torch.tensor([10, 20, 30, 40, 50, 60, 70, 80], dtype=torch.float64)
    weights = token_weights(logps, batch.sequences, batch.lengths, "sum")
    pairs = pair_logps(batch, logps, weights, ref)
    assert pairs.chosen.tolist() == [-1, -5]  # 1 | 2 + 3
    assert pairs.losers.tolist() == [-4, -5]
    assert pairs.kl_chosen is not None and pairs.kl_chosen.tolist() == [-13, -8]  # 6 + 7 | 8
    assert pairs.ref_chosen is not None and pairs.ref_chosen.tolist() == [-10, -50]
    assert pairs.ref_rejected is not None and pairs.ref_rejected.tolist() == [-40, -50]
    assert pairs.ref_kl_chosen is not None and pairs.ref_kl_chosen.tolist() == [-130, -80]
    assert pairs.chosen_lengths is not None and pairs.chosen_lengths.tolist() == [1, 2]
    assert pairs.rejected_lengths is not None and pairs.rejected_lengths.tolist() == [1, 1]
    assert pairs.chosen_means is not None and pairs.chosen_means.tolist() == [-1, -2.5]
    assert pairs.chosen_logratios.tolist() == [9, 45] and pairs.rejected_logratios.tolist() == [36, 45]


def test_gold_answers_are_means_beside_the_pair() -> None:
    logps = -torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.float64)
    batch = token_batch(("chosen", "rejected", "gold"), [1, 1, 1, 1, 2, 1])
    weights = token_weights(logps, batch.sequences, batch.lengths, "sum")
    pairs = pair_logps(batch, logps, weights, 2 * logps)
    assert pairs.gold.tolist() == [-5.5, -7]  # (5 + 6)/2 | 7
    assert pairs.chosen.tolist() == [-1, -2] and pairs.losers.tolist() == [-3, -4]
    assert pairs.kl_chosen is None and pairs.ref_kl_chosen is None


def test_one_and_two_sides() -> None:
    logps = -torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64)
    supervised = token_batch(SIDES[:1], [2, 3])
    weights = token_weights(logps, supervised.sequences, supervised.lengths, "mean")
    pairs = pair_logps(supervised, logps, weights, None)
    assert pairs.chosen.tolist() == pytest.approx([-1.5, -4])
    assert pairs.rejected is None and pairs.ref_chosen is None and pairs.rejected_lengths is None
    two = token_batch(SIDES[:2], [1, 2, 1, 1])
    weights = token_weights(logps, two.sequences, two.lengths, "sum")
    pairs = pair_logps(two, logps, weights, None)
    assert pairs.losers.tolist() == [-4, -5] and pairs.kl_chosen is None and pairs.ref_rejected is None


def test_the_reference_is_reduced_with_the_policys_importance() -> None:
    # the policy's weights of the first chosen response, p = ½ and ¼: 2/5 and 3/5
    batch = token_batch(SIDES[:2], [2, 1, 1, 1])
    logps = torch.tensor([0.5, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64).log()
    weights = token_weights(logps, batch.sequences, batch.lengths, "importance")
    pairs = pair_logps(batch, logps, weights, torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
    assert pairs.ref_chosen is not None
    assert pairs.ref_chosen.tolist() == pytest.approx([-0.4 - 1.2, -3])


def test_selecting_pairs_drops_fillers() -> None:
    batch = token_batch(SIDES[:2], [1, 2, 1, 1])
    logps = -torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64)
    weights = token_weights(logps, batch.sequences, batch.lengths, "sum")
    pairs = pair_logps(batch, logps, weights, None).select(torch.tensor([False, True]))
    assert pairs.chosen.tolist() == [-5] and pairs.losers.tolist() == [-5]
    assert pairs.ref_chosen is None and pairs.chosen_lengths is not None
    assert pairs.chosen_lengths.tolist() == [2]


def test_gradients_by_a_frozen_bf16_head_are_rounded_once_after_scaling() -> None:
    # a token's coefficient is in fp32: 1.003 would be 1.0 in bf16
    hidden, weight, _, labels = head(tokens=64, vocabulary=101, width=48, dtype=torch.bfloat16)
    coefficients = torch.linspace(0.997, 1.003, 64)

    def gradient(each: Tensor) -> Tensor:
        leaf = hidden.detach().clone().requires_grad_()
        logps, _ = token_logps(leaf, weight, labels)
        (found,) = torch.autograd.grad((logps * each).sum(), leaf)
        return found

    once = gradient(torch.ones(64)).double()
    expected = (once * coefficients.double()[:, None]).to(torch.bfloat16)
    assert torch.equal(gradient(coefficients), expected)
    assert not torch.equal(once, expected.double())


def test_the_excess_of_a_bf16_head_is_in_fp32_until_the_product() -> None:
    # one token, so that nothing is added up: p − e_y rounded once, times h, rounded once
    hidden, weight, _, _ = head(tokens=1, vocabulary=101, width=48, dtype=torch.bfloat16)
    labels = torch.tensor([3])
    weight.requires_grad_()
    logps, scores = token_logps(hidden, weight, labels, sketch=Sketch(101, None))
    (found,) = torch.autograd.grad(logps.sum(), weight)
    logits = torch.nn.functional.linear(hidden, weight.detach()).double()
    excess = torch.nn.functional.one_hot(labels, 101).double() - torch.softmax(logits, dim=-1)
    expected = (excess.to(torch.bfloat16).double().T @ hidden.detach().double()).to(torch.bfloat16)
    assert (found == expected).double().mean() > 0.99  # fp32's own rounding may tip a tie
    assert scores is not None and scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), excess, rtol=1e-5, atol=1e-7)
