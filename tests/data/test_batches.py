"""Global batches and their split over ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.batches import FILLER, GlobalBatches, by_length, pack, row_lengths, split


def test_the_last_batch_of_an_epoch_is_short() -> None:
    batches = GlobalBatches(10, 4, seed=3)
    assert batches.steps_per_epoch == 3
    assert [len(batches.indices(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [batches.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [batches.examples_seen(steps) for steps in range(5)] == [0, 4, 8, 10, 14]


@given(n=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**31), epoch=st.integers(0, 4))
def test_every_epoch_is_a_permutation(n: int, size: int, seed: int, epoch: int) -> None:
    batches = GlobalBatches(n, size, seed)
    first = epoch * batches.steps_per_epoch
    seen = [
        index for step in range(first, first + batches.steps_per_epoch) for index in batches.indices(step)
    ]
    assert sorted(seen) == list(range(n))


@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=10))
def test_a_step_is_the_same_in_any_order_of_asking(steps: list[int]) -> None:
    straight = [GlobalBatches(23, 5, 7).indices(step) for step in steps]
    wandering = GlobalBatches(23, 5, 7)
    assert [wandering.indices(step) for step in steps] == straight


def test_epochs_and_seeds_differ() -> None:
    batches = GlobalBatches(100, 100, seed=1)
    assert batches.indices(0) != batches.indices(1)
    assert batches.indices(0) != GlobalBatches(100, 100, seed=2).indices(0)


@pytest.mark.parametrize("arguments", [(0, 4, 1), (4, 0, 1), (4, 4, -1)])
def test_impossible_sizes_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        GlobalBatches(*arguments)


def test_split_by_hand() -> None:
    batch = [5, 9, 2, 7, 1]
    assert split(batch, 0, 1, 2) == [[5, 9], [2, 7], [1, FILLER]]
    assert [split(batch, rank, 2, 2) for rank in range(2)] == [[[5, 9], [2, 7]], [[1, -1], [-1, -1]]]
    assert [split(batch, rank, 3, 2) for rank in range(3)] == [[[5, 9]], [[2, 7]], [[1, -1]]]
    assert batch == [5, 9, 2, 7, 1]


@given(
    batch=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    world=st.integers(1, 6),
    micro=st.integers(1, 9),
)
def test_every_split_gives_the_same_batch_in_the_same_order(batch: list[int], world: int, micro: int) -> None:
    ranks = [split(batch, rank, world, micro) for rank in range(world)]
    assert len({len(pieces) for pieces in ranks}) == 1
    assert all(len(piece) == micro for pieces in ranks for piece in pieces)
    joined = [index for pieces in ranks for piece in pieces for index in piece]
    assert joined[: len(batch)] == batch
    assert set(joined[len(batch) :]) <= {FILLER}
    assert len(joined) - len(batch) < world * micro


def test_by_length_by_hand() -> None:
    batch, lengths = [5, 9, 2, 7, 1, 8, 3], np.array([10, 70, 30, 20, 60, 50, 40])
    # longest first: 9 1 8 3 2 7 5, a filler at the end; pieces of 2 go to ranks 0 1, then 1 0
    ordered = by_length(batch, lengths, 2, 2)
    assert split(ordered, 0, 2, 2) == [[9, 1], [5, FILLER]]
    assert split(ordered, 1, 2, 2) == [[8, 3], [2, 7]]
    assert split(by_length(batch, lengths, 1, 3), 0, 1, 3) == [[9, 1, 8], [3, 2, 7], [5, FILLER, FILLER]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world=st.integers(1, 6),
    micro=st.integers(1, 9),
)
def test_by_length_is_the_same_global_batch(lengths: list[int], world: int, micro: int) -> None:
    batch = list(range(100, 100 + len(lengths)))
    ordered = by_length(batch, np.array(lengths), world, micro)
    plain = [index for rank in range(world) for piece in split(batch, rank, world, micro) for index in piece]
    assert sorted(ordered) == sorted(plain)
    steps = list(zip(*(split(ordered, rank, world, micro) for rank in range(world)), strict=True))
    shortest = 51
    for pieces in steps:  # one micro-step: nothing in it is longer than anything in the step before
        own = [lengths[index - 100] for piece in pieces for index in piece if index != FILLER]
        assert max(own, default=0) <= shortest
        shortest = min(own, default=shortest)


def test_packed_rows_take_mixed_lengths_where_that_is_less() -> None:
    batch, lengths = [0, 1, 2, 3, 4, 5, 6, 7], np.array([9, 4, 4, 5, 5, 6, 3, 9])
    # similar: 9 9 6 5 is four rows of 9, 5 4 4 3 four rows of 5 (no two fit): 56 slots.
    # dealt there and back, (9 9) (5 6) (5 4) (3 4): 9 5 5 3 in rows of 9, 5+3, 5 and 9 6 4 4 in 9, 6, 4+4: 54
    ordered = by_length(batch, lengths, 1, 4, packed=True)
    assert sorted(map(sorted, split(ordered, 0, 1, 4))) == [[0, 3, 4, 6], [1, 2, 5, 7]]
    # two lengths that never fit together stay apart: 9 9, 5 5 are 28 slots, 9 5, 9 5 would be 36
    ordered = by_length([0, 1, 2, 3], np.array([9, 5, 9, 5]), 1, 2, packed=True)
    assert split(ordered, 0, 1, 2) == [[0, 2], [1, 3]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world=st.integers(1, 6),
    micro=st.integers(1, 9),
)
def test_packed_by_length_is_the_same_global_batch_too(lengths: list[int], world: int, micro: int) -> None:
    batch = list(range(100, 100 + len(lengths)))
    ordered = by_length(batch, np.array(lengths), world, micro, packed=True)
    assert len(ordered) == -(-len(batch) // (world * micro)) * world * micro
    assert sorted(index for index in ordered if index != FILLER) == batch


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_packed_blocks_do_not_overlap(sizes: list[int]) -> None:
    capacity = max(sizes)
    rows, starts = pack(np.array(sizes), capacity)
    places = {
        (row, place)
        for row, start, size in zip(rows, starts, sizes, strict=True)
        for place in range(start, start + size)
    }
    assert len(places) == sum(sizes)
    assert max(place for _, place in places) < capacity
    assert set(rows) == set(range(max(rows) + 1))


def test_row_lengths() -> None:
    prompts, responses = np.array([10, 3]), np.array([[4, 6], [5, 1]])
    assert row_lengths(prompts, responses, "separate").tolist() == [16, 8]
    assert row_lengths(prompts, responses, "shared").tolist() == [20, 9]
