"""What is made of token log-probs beside z: weights by length, likelihoods, a head's scores; by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rcpo.method.geometry import HeadShape, Passes, Sketch
from rcpo.method.logps import (
    length_weights,
    log_squares,
    log_squares_of,
    pair_logps,
    score_sides,
    sequence_logps,
    token_logps,
    token_weights,
)
from rcpo.method.types import TokenBatch


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# --- weights by length ----------------------------------------------------------------------------------


def sequences_of(lengths: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def test_tokens_beyond_the_shorter_response_weigh_alpha() -> None:
    # two pairs: chosen 3 and 1 tokens, rejected 1 and 2; the shorter has 1 in both
    lengths = torch.tensor([3, 1, 1, 2])
    weights = length_weights(sequences_of(lengths), lengths, 2, 0.25)
    assert weights.tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25] and weights.dtype == torch.float64
    assert length_weights(sequences_of(lengths), lengths, 2, 1.0).tolist() == [1] * 7
    assert lengths.tolist() == [3, 1, 1, 2]


def test_mismatched_and_gold_answers_count_in_full() -> None:
    lengths = torch.tensor([2, 1, 5, 1])  # one pair, and two other responses
    weights = length_weights(sequences_of(lengths), lengths, 1, 0.0)
    assert weights.tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 1]


def test_a_response_that_is_not_there_leaves_none_in_common() -> None:
    lengths = torch.tensor([2, 0])
    assert length_weights(sequences_of(lengths), lengths, 1, 0.5).tolist() == [0.5, 0.5]


# --- likelihoods ----------------------------------------------------------------------------------------


def test_the_squares_of_probabilities_by_hand() -> None:
    # ½² + ¼² + ¼² = 3/8, and a certain token
    logits = torch.stack([logits_of(0.5, 0.25, 0.25), logits_of(1, 1e-300, 1e-300)])
    assert log_squares_of(logits + 7).tolist() == pytest.approx([math.log(3 / 8), 0], abs=1e-14)


@pytest.mark.parametrize("tokens", [1, 2, 3, 100])
def test_the_squares_of_a_heads_probabilities_in_any_portions(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 6))
    bias, shape = torch.linspace(-1, 1, 6, dtype=torch.float64), HeadShape(scale=0.5, softcap=2.0)
    capped = 2 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 2)
    expected = torch.softmax(capped, -1).square().sum(-1).log()
    passes = Passes(6 * tokens, None)
    found = log_squares(hidden.requires_grad_(), weight, bias=bias, shape=shape, passes=passes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not found.requires_grad
    assert log_squares(hidden[:0], weight).shape == (0,)


def batch(sides: tuple[str, ...], lengths: list[int]) -> TokenBatch:
    """One pair; only what the reductions read is filled in."""
    empty, counts = torch.zeros(1, 1, dtype=torch.long), torch.tensor(lengths)
    tokens = int(counts.sum())
    return TokenBatch(
        input_ids=empty,
        position_ids=empty,
        predictors=torch.arange(tokens),
        labels=torch.zeros(tokens, dtype=torch.long),
        sequences=sequences_of(counts),
        lengths=counts,
        weights=torch.tensor([0.5]),
        indices=torch.arange(1),
        example_ids=["a"],
        sides=sides,
        margins=torch.tensor([1.5]),
    )


def test_likelihoods_are_geometric_means_over_the_tokens() -> None:
    given = batch(("chosen", "rejected"), [2, 1])
    logps = logits_of(0.5, 0.25, 0.125).requires_grad_()
    squares = logits_of(0.5, 0.5, 0.5)
    found = pair_logps(given, logps, torch.ones(3), None, squares)
    # √(½/½ · ¼/½) = √½, and ⅛/½ = ¼
    assert found.chosen_likelihoods is not None and found.rejected_likelihoods is not None
    assert found.chosen_likelihoods.tolist() == pytest.approx([math.sqrt(0.5)])
    assert found.rejected_likelihoods.tolist() == pytest.approx([0.25])
    assert not found.chosen_likelihoods.requires_grad and found.chosen.requires_grad
    assert found.weights is not None and found.weights.tolist() == [0.5]
    assert found.margins is not None and found.margins.tolist() == [1.5]
    plain = pair_logps(given, logps, torch.ones(3), None)
    assert plain.chosen_likelihoods is None and plain.rejected_likelihoods is None
    assert plain.ref_chosen is None and plain.gold_means is None


# --- the head -------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"torch.Size\(\[2, 3\]\)"):
        token_logps(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(1, dtype=torch.long))
    with pytest.raises(AssertionError, match=r"torch.Size\(\[5, 4\]\)"):
        token_logps(torch.ones(2, 3), torch.ones(5, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("size", [None, 3])
def test_a_sides_scores_are_the_gradient_of_its_sum_by_the_head(size: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    head = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[1, 2], [0, 5], [3, 3]])
    weights = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.25, 0.0]], dtype=torch.float64)
    winners = torch.tensor([True, False, True])
    sketch = None if size is None else Sketch(6, size, seed=1)
    z, scores = score_sides(hidden, head, labels, weights, winners, sketch=sketch)
    plain = torch.log_softmax(hidden @ head.T, -1).gather(2, labels[..., None])[..., 0]
    expected = (plain * weights).sum(1)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=0)
    assert not scores.requires_grad
    for side, members in enumerate((winners, ~winners)):
        (gradient,) = torch.autograd.grad(expected[members].sum(), head, retain_graph=True)
        if sketch is not None:  # row r of a sketch adds the signed rows v with v mod k = r
            signed = sketch.signs(gradient)[:, None] * gradient
            gradient = torch.stack([signed[row :: sketch.size].sum(0) for row in range(sketch.size)])
        torch.testing.assert_close(scores[side], gradient, rtol=1e-11, atol=1e-12)
    (through,) = torch.autograd.grad(z.sum(), head)
    (wanted,) = torch.autograd.grad(expected.sum(), head)
    torch.testing.assert_close(through, wanted, rtol=1e-11, atol=1e-12)


def test_a_mean_and_a_sum_of_one_token_are_its_log_prob() -> None:
    logps, sequences, lengths = logits_of(0.25), torch.tensor([0]), torch.tensor([1])
    for reduction in ("sum", "mean", "importance"):
        weights = token_weights(logps, sequences, lengths, reduction)
        assert weights.dtype == torch.float64
        assert sequence_logps(logps, weights, sequences, 1).item() == pytest.approx(-math.log(4))
