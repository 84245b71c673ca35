"""Which rows are trained on and which are held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.selection import mixture, split_prompts
from rcpo.errors import ConfigError


def array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@given(prompts=st.lists(st.integers(0, 9), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_held_out_and_training_share_no_prompt(prompts: list[int], seed: int) -> None:
    values = array(prompts)
    if len(set(prompts)) == 1:
        with pytest.raises(ConfigError, match="leaves none to train on"):
            split_prompts(values, 0.3, seed)
        return
    train, held_out = split_prompts(values, 0.3, seed)
    assert not set(values[train]) & set(values[held_out])
    assert sorted([*train, *held_out]) == list(range(len(prompts)))
    assert len(set(values[held_out])) == max(1, round(0.3 * len(set(prompts))))
    reversed_rows = split_prompts(values[::-1], 0.3, seed)[1]
    assert set(values[::-1][reversed_rows]) == set(values[held_out])  # whatever the order in the file


def test_the_seed_decides_what_is_held_out() -> None:
    values = array(list(range(2000)))
    first, second = (split_prompts(values, 0.1, seed)[1] for seed in (1, 2))
    assert len(first) == len(second) == 200
    assert 5 <= len(set(first) & set(second)) <= 40  # a tenth of a tenth, about
    train, held_out = split_prompts(values, 0.0, 1)
    assert train.tolist() == list(range(2000)) and not len(held_out)


def test_a_mixture_by_hand() -> None:
    rows = np.array([0, 1, 3, 4, 5, 6, 8])  # 2 and 7 are held out; the sources have 4 and 5 rows
    assert mixture(rows, [4, 5], [1, 1], seed=0).tolist() == rows.tolist()
    assert mixture(rows, [4, 5], [2, 1], seed=0).tolist() == [0, 1, 3, 0, 1, 3, 4, 5, 6, 8]
    half = mixture(rows, [4, 5], [1, 0.5], seed=0)
    assert half[:3].tolist() == [0, 1, 3] and len(half) == 5
    assert set(half[3:]) < {4, 5, 6, 8} and len(set(half[3:])) == 2


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    weight=st.floats(0.1, 3),
    seed=st.integers(0, 5),
)
def test_a_mixture_takes_what_the_weights_say(sizes: list[int], weight: float, seed: int) -> None:
    weights = [weight] * len(sizes)
    taken = mixture(np.arange(sum(sizes)), sizes, weights, seed)
    assert taken.tolist() == mixture(np.arange(sum(sizes)), sizes, weights, seed).tolist()
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        counts = np.bincount(taken, minlength=sum(sizes))[first : first + size]
        assert counts.sum() == int(weight) * size + round((weight - int(weight)) * size)
        assert set(counts) <= {int(weight), int(weight) + 1}
