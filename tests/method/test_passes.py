"""Portions of a device, the identity as a sketch, and products of scores; borders by hand."""

from __future__ import annotations

import pytest
import torch

from rcpo.method.geometry import (
    LANES,
    ON_CPU,
    ON_GPU,
    HeadShape,
    Passes,
    ScoreGeometry,
    Sketch,
    excess_,
    inner,
    parameter_scores,
    passes_on,
    score_products,
)


def test_a_chunk_and_a_block_hold_whole_tokens_one_at_least() -> None:
    passes = Passes(chunk=100, block=30)
    assert [passes.tokens(vocabulary) for vocabulary in (10, 33, 34, 100, 101)] == [10, 3, 2, 1, 1]
    assert [passes.rows(vocabulary, 7) for vocabulary in (10, 15, 16, 30, 31)] == [3, 2, 1, 1, 1]
    assert Passes(chunk=100).rows(50, 7) == 7 and Passes(chunk=100).rows(50, 0) == 1


def test_the_portions_of_devices() -> None:
    assert passes_on(torch.device("cpu")) is ON_CPU and passes_on(torch.device("cuda")) is ON_GPU
    assert passes_on(torch.device("meta")) is ON_GPU
    assert Passes(32 * 1024**2, 4 * 1024**2) == ON_CPU  # 128 and 16 MiB of fp32
    assert ON_GPU.tokens(152_064) == 882 and ON_GPU.rows(152_064, 882) == 882


@pytest.mark.parametrize(("size", "exact"), [(None, True), (6, True), (7, True), (5, False), (1, False)])
def test_a_sketch_as_large_as_the_vocabulary_is_the_identity(size: int | None, exact: bool) -> None:
    sketch = Sketch(6, size)
    assert sketch.exact is exact and sketch.size == (6 if exact else size)
    scores = sketch.scores(-torch.eye(6))
    if exact:
        assert torch.equal(scores, torch.eye(6)) and sketch.signs(scores).tolist() == [1] * 6
    else:
        assert scores.abs().sum(1).tolist() == [1] * 6  # one signed 1 a token
        assert [int(row.abs().argmax()) for row in scores] == [token % int(size or 1) for token in range(6)]


def test_signs_follow_from_the_seed_and_are_balanced() -> None:
    signs = [Sketch(4000, 2, seed=seed).signs(torch.ones(1)) for seed in (0, 0, 1)]
    assert torch.equal(signs[0], Sketch(4000, 2).signs(torch.ones(1))) and torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])
    for one in signs:
        assert set(one.tolist()) == {-1.0, 1.0} and abs(float(one.sum())) < 4 * 4000**0.5
    assert Sketch(8, 2).signs(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_partial_sums_are_added_by_halves() -> None:
    assert LANES == 8
    # 17 blocks of one column: lane 0 has blocks 0, 8, 16; values that lose their order in fp32 otherwise
    values = torch.tensor([[2.0**24, 1, 1, 1, 1, 1, 1, 1, -(2.0**24), 1, 1, 1, 1, 1, 1, 1, 1]])
    sketch = Sketch(17, 1)
    sketch._signs = torch.ones(17)
    for passes in (Passes(1000), Passes(1000, 17)):
        assert sketch.scores(-values, passes).tolist() == [[15.0]]  # (2²⁴ − 2²⁴ + 1) + 7 · 2


def test_products_and_norms_of_scores() -> None:
    scores = torch.tensor([[[1.0, 2.0], [2.0, 0.0]], [[0.0, 4.0], [-3.0, 0.0]]])
    found = score_products(scores)
    assert found.tolist() == [9, 25, 2] and found.dtype == torch.float64
    assert ScoreGeometry.of(scores) == ScoreGeometry(3.0, 5.0, 2 / 15)
    assert ScoreGeometry.of_products(0.0, 25.0, 0.0) == ScoreGeometry(0.0, 5.0, 0.0)
    assert ScoreGeometry.of_products(25.0, 0.0, 0.0) == ScoreGeometry(5.0, 0.0, 0.0)
    assert inner(torch.ones(2, 3), torch.full((2, 3), 2.0)).item() == 12
    with pytest.raises(AssertionError, match=r"\[3, 2\]"):
        score_products(torch.zeros(3, 2))


def test_the_excess_is_made_in_place_and_sloped() -> None:
    given = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found = excess_(given, torch.tensor([1, 0]), None)
    assert found.tolist() == [[0.25, -0.25], [-0.5, 0.5]] and found.data_ptr() == given.data_ptr()
    given = torch.tensor([[0.25, 0.75]])
    assert excess_(given, torch.tensor([1]), torch.tensor([[2.0, 4.0]])).tolist() == [[0.5, -1.0]]


def test_a_heads_shape() -> None:
    assert HeadShape() == HeadShape(scale=1.0, softcap=None) and HeadShape().slope(torch.ones(1)) is None
    # d/dx of 2 tanh(x/2) at tanh = ½: 1 − ¼
    slope = HeadShape(softcap=2.0).slope(torch.tensor([1.0, 0.0, -2.0]))
    assert slope is not None and slope.tolist() == [0.75, 1.0, 0.0]
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = HeadShape(scale=0.5).logits(
        hidden.bfloat16(), weight.bfloat16(), torch.tensor([1.0, 0.0]).bfloat16()
    )
    assert found.tolist() == [[2.0, 4.0]] and found.dtype == torch.float32
    assert HeadShape().logits(hidden.double(), weight.double(), None).dtype == torch.float64


def test_scores_by_all_parameters_are_in_fp32_and_zero_where_unused() -> None:
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor([[3.0]], dtype=torch.bfloat16, requires_grad=True)
    chosen, rejected = (a * a).sum(), 5 * b.sum().float() + a[0]
    found = parameter_scores(chosen, rejected, [a, b])
    assert found.tolist() == [[2, 4, 0], [1, 0, 5]] and found.dtype == torch.float32
    again = parameter_scores(chosen, rejected, [a, b])  # the graph is kept
    assert torch.equal(found, again)
