"""Diagnosing a dataset: edit distance, length bias, and CHES."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.diagnosis import ches, ches_lines, edit_distance, responses, sampled
from rcpo.data.records import Example
from rcpo.data.store import PairDataset


def by_recursion(one: list[int], other: list[int]) -> int:
    if not one or not other:
        return len(one) + len(other)
    changed = by_recursion(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, by_recursion(one[1:], other) + 1, by_recursion(one, other[1:]) + 1)


tokens = st.lists(st.integers(0, 2), max_size=5)


@given(one=tokens, other=tokens)
def test_edit_distance_is_levenshteins(one: list[int], other: list[int]) -> None:
    assert edit_distance(one, other) == by_recursion(one, other)


def test_ches_by_hand() -> None:
    # pair 1: means (2, 0) and (1, 1): 2 − 4; pair 2: (0, 1) and (0, 4): 4 − 1
    hidden = torch.tensor([[1.0, 0], [3, 0], [0, 1], [1, 1], [0, 2], [0, 6]])
    found = ches(hidden, torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([2, 1, 1, 2]))
    assert found.tolist() == [-2, 3]


def test_ches_ranks_no_against_never_above_no_against_yes() -> None:
    """The likelier the loser's states to the winner's, the further the winner falls, as published.

    The state that predicts a response's first token is the prompt's for all of them, so that the made-up
    responses go on for a second token.
    """
    prompt, no, never, yes = ([1.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 2.8, 0.5, 0], [0, -1.0, 0, 2.0])
    pairs = {"never": never, "yes": yes}
    scores = {
        name: ches(
            torch.tensor([prompt, no, prompt, other]), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2])
        ).item()
        for name, other in pairs.items()
    }
    # ⟨(½, 1.5), (½, 1.4)⟩ − 2.5 = −0.15; with (½, −½): 0.25 − 0.75 − 2.5 = −3
    assert scores == pytest.approx({"never": -0.15, "yes": -3.0})
    assert scores["never"] > scores["yes"]


def test_lines_on_lengths_and_likeness() -> None:
    examples = [
        Example("a", [1], list(range(2, 12)), [*range(2, 11), 99]),  # one of ten tokens
        Example("b", [1], [2, 3], [4]),
        Example("c", [1], [2], [4]),
        Example("d", [1], [2], [4, 5, 6]),
    ]
    first, second = responses(PairDataset.of(examples))
    assert "longer in 25.0% of the pairs and as long in 50.0%; 3.5 and 3.8 tokens" in first
    assert "25.0% of 4 pairs differ in at most 10% of their tokens" in second
    assert "the median differs in 100%" in second


def test_the_worst_pairs_come_first_by_name() -> None:
    scores = np.array([0.5, -1.0, 3.0, 2.0])
    lines = ches_lines(scores, np.array([0, 10, 20, 30]), lambda place: f"file:{place}")
    assert "50% 1.25" in lines[0]  # between 0.5 and 2
    assert [line.split() for line in lines[1:]] == [
        ["3", "file:20"], ["2", "file:30"], ["0.5", "file:0"], ["-1", "file:10"],
    ]  # fmt: skip


def test_some_pairs_are_taken_evenly() -> None:
    dataset = PairDataset.of([Example(str(n), [1], [2], [3]) for n in range(101)])
    assert sampled(dataset, 5).tolist() == [0, 25, 50, 75, 100]
    assert sampled(dataset, 500).tolist() == list(range(101))
