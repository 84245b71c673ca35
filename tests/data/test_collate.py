"""Rows, masks and flat indices of a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.collate import collate, collate_indices
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.method.types import PAIR, SIDES

A = Example("a", [1, 2, 3], [10, 11], [20])
B = Example("b", [4], [12], [21, 22, 23, 24])
PAD = 0


def test_two_pairs_by_hand() -> None:
    batch = collate([A, B], PAD, indices=[7, 3])
    assert batch.input_ids.tolist() == [  # chosen of a and b, then rejected of a and b; L = 5
        [1, 2, 3, 10, 11],
        [4, 12, 0, 0, 0],
        [1, 2, 3, 20, 0],
        [4, 21, 22, 23, 24],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    # r * L + position - 1: row 0 predicts its tokens at 3 and 4 from 2 and 3; row 1 its token at 1 from 0; …
    assert batch.predictors.tolist() == [2, 3, 5, 12, 15, 16, 17, 18]
    assert batch.labels.tolist() == [10, 11, 12, 20, 21, 22, 23, 24]
    assert batch.sequences.tolist() == [0, 0, 1, 2, 3, 3, 3, 3]
    assert batch.lengths.tolist() == [2, 1, 1, 4]
    assert batch.weights.tolist() == [1.0, 1.0]
    assert batch.indices.tolist() == [7, 3]
    assert batch.example_ids == ["a", "b"]
    assert (batch.sides, batch.num_pairs, batch.num_tokens) == (PAIR, 2, 16)
    integers = (batch.input_ids, batch.position_ids, batch.predictors, batch.labels)
    assert {tensor.dtype for tensor in (*integers, batch.sequences, batch.lengths)} == {torch.long}


def test_one_side_leaves_the_rejected_out() -> None:
    batch = collate([A, Example("c", [5], [6], [])], PAD, sides=("chosen",))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11], [5, 6, 0, 0, 0]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.sides == ("chosen",)


def test_mismatched_completions_follow_the_prompt_of_their_pair() -> None:
    batch = collate_indices(PairDataset.of([A, B]), [0, 1], PAD, sides=SIDES[:3])
    assert batch.input_ids[4:].tolist() == [[1, 2, 3, 12, 0], [4, 10, 11, 0, 0]]
    assert batch.sequences.tolist()[-3:] == [4, 5, 5]
    assert batch.lengths.tolist() == [2, 1, 1, 4, 1, 2]


def test_a_mismatched_completion_is_cut_to_the_limit() -> None:
    dataset = PairDataset.of([A, B, Example("c", [1, 1, 1, 1], [7], [8])], max_length=5)
    assert dataset.mismatched(1) == [7]  # 1 + 1 tokens
    assert dataset.mismatched(2) == [10]  # 4 tokens of prompt leave one of the two


def test_a_filler_carries_the_shortest_example_with_weight_0() -> None:
    short = Example("c", [6], [7], [8])
    batch = collate_indices(PairDataset.of([A, B, short]), [1, -1], PAD)
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.indices.tolist() == [1, -1]
    assert batch.input_ids[1].tolist() == [6, 7, 0, 0, 0]
    assert batch.num_tokens == 2 + 5  # the filler's are not counted


def test_shared_rows_by_hand() -> None:
    c = Example("c", [6, 7], [8], [9])  # 4 tokens
    d = Example("d", [5], [6], [7])  # 3 tokens
    batch = collate([A, B, c, d], PAD, layout="shared")
    # 6, 6, 4 and 3 tokens: rows of 6, and the third pair leaves no room for the fourth
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 10, 11, 20],
        [4, 12, 21, 22, 23, 24],
        [6, 7, 8, 9, 0, 0],
        [5, 6, 7, 0, 0, 0],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 3],
        [0, 1, 1, 2, 3, 4],
        [0, 1, 2, 2, 0, 0],
        [0, 1, 1, 0, 0, 0],
    ]
    assert batch.segments is not None
    assert batch.segments.tolist() == [
        [0, 0, 0, 1, 1, 2],
        [5, 6, 7, 7, 7, 7],
        [10, 10, 11, 12, -1, -1],
        [15, 16, 17, -1, -1, -1],
    ]
    # the first token of both responses is predicted from the prompt's end: 2, 6, 13 and 18
    assert batch.predictors.tolist() == [2, 3, 6, 13, 18, 2, 6, 8, 9, 10, 13, 18]
    assert batch.labels.tolist() == [10, 11, 12, 8, 6, 20, 21, 22, 23, 24, 9, 7]
    assert batch.sequences.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7]
    assert batch.num_tokens == 6 + 6 + 4 + 3


def test_short_pairs_fill_up_a_row() -> None:
    short = [Example("c", [5], [6], [7]), Example("d", [8], [9], [10])]
    batch = collate([short[0], A, short[1]], PAD, layout="shared")
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20], [5, 6, 7, 8, 9, 10]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[5, 5, 5, 6, 6, 7], [0, 1, 2, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 0, 1, 1]]
    assert batch.labels.tolist() == [6, 10, 11, 9, 7, 20, 10]
    assert batch.predictors.tolist() == [6, 2, 3, 9, 6, 2, 9]


def test_empty_parts_are_refused() -> None:
    for example, sides in (
        (Example("x", [], [1], [2]), PAIR),
        (Example("x", [1], [], []), PAIR),
        (Example("x", [1], [], [2]), PAIR[:1]),
        (Example("x", [1], [2], [3]), ("chosen", "rejected", "gold")),
    ):
        with pytest.raises(ValueError, match="empty prompt or no response"):
            collate([example], PAD, sides=sides)


@pytest.mark.parametrize(
    ("sides", "mismatched"),
    [
        ((), None),
        (("rejected",), None),
        (("rejected", "chosen"), None),
        (SIDES[:3], None),
        (PAIR, [[1], [2]]),
        ((*PAIR, "better"), None),
    ],
)
def test_sides_that_make_no_sense_are_refused(
    sides: tuple[str, ...], mismatched: list[list[int]] | None
) -> None:
    with pytest.raises(ValueError, match="sides="):
        collate([A, B], PAD, sides=sides, mismatched=mismatched)


tokens = st.lists(st.integers(0, 99), min_size=1, max_size=9)
examples = st.lists(st.builds(Example, st.just("x"), *[tokens] * 4), min_size=1, max_size=6)


@given(pairs=examples)
def test_masks_cover_exactly_the_responses(pairs: list[Example]) -> None:
    batch = collate(pairs, PAD)
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    flat = batch.input_ids.flatten()
    for number, response in enumerate(responses):
        own = batch.sequences == number
        assert batch.labels[own].tolist() == response
        assert flat[batch.predictors[own] + 1].tolist() == response
        assert set((batch.predictors[own] // batch.input_ids.shape[1]).tolist()) == {number}
        prompt = pairs[number % len(pairs)].prompt
        assert int(batch.predictors[own][0]) % batch.input_ids.shape[1] == len(prompt) - 1
        padding = [PAD] * (batch.input_ids.shape[1] - len(prompt) - len(response))
        assert batch.input_ids[number].tolist() == prompt + response + padding


@given(
    pairs=examples,
    sides=st.sampled_from([SIDES[:1], SIDES[:2], SIDES[:3], ("chosen", "rejected", "gold"), SIDES]),
)
def test_layouts_hold_the_same_tokens_in_the_same_order(pairs: list[Example], sides: tuple[str, ...]) -> None:
    mismatched = [pair.chosen for pair in pairs[1:] + pairs[:1]] if "mismatched" in sides else None
    shared, separate = (
        collate(pairs, PAD, sides=sides, layout=layout, mismatched=mismatched)
        for layout in ("shared", "separate")
    )
    for name in ("labels", "sequences", "lengths", "weights", "indices"):
        assert torch.equal(getattr(shared, name), getattr(separate, name)), name
    # each response token stands one position after its predictor, in both
    for place in ("input_ids", "position_ids"):
        before = [getattr(batch, place).flatten()[batch.predictors] for batch in (shared, separate)]
        assert torch.equal(*before), place
    prompts = sum(len(pair.prompt) for pair in pairs)
    assert shared.segments is not None
    real = int((shared.segments >= 0).sum())
    assert shared.num_tokens == real == separate.num_tokens - (len(sides) - 1) * prompts


def test_unpaired_examples_have_one_row_each_by_hand() -> None:
    wanted, unwanted = Example("w", [1, 2], [10], []), Example("u", [3], [], [20, 21])
    batch = collate([wanted, unwanted], PAD, sides=SIDES[:3], mismatched=[[20, 21], [10]])
    assert batch.input_ids.tolist() == [
        [1, 2, 10, 0],  # chosen of the first; the second has none
        [3, 20, 21, 0],  # rejected of the second
        [1, 2, 20, 21],  # the mismatched ones
        [3, 10, 0, 0],
    ]
    assert batch.lengths.tolist() == [1, 0, 0, 2, 2, 1]
    assert batch.sequences.tolist() == [0, 3, 3, 4, 4, 5]
    assert batch.labels.tolist() == [10, 20, 21, 20, 21, 10]
    assert batch.predictors.tolist() == [1, 4, 5, 9, 10, 12]
    assert batch.num_tokens == 3 + 3 + 4 + 2
    shared = collate([wanted, unwanted], PAD, sides=SIDES[:3], mismatched=[[20, 21], [10]], layout="shared")
    assert shared.labels.tolist() == batch.labels.tolist()
    assert shared.lengths.tolist() == batch.lengths.tolist()
    assert shared.input_ids.tolist() == [[1, 2, 10, 20, 21], [3, 20, 21, 10, 0]]
    assert shared.predictors.tolist() == [1, 5, 6, 1, 3, 5]
    assert shared.num_tokens == 9
