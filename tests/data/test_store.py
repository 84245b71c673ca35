"""The flat token store."""

import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.records import Example
from rcpo.data.store import PairDataset, TokenStore
from rcpo.errors import ConfigError
from rcpo.method.types import SIDES

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
examples = st.lists(st.builds(Example, st.text(max_size=3), ids, ids, ids, ids), max_size=6)


@given(pairs=examples)
def test_what_goes_in_comes_out(pairs: list[Example]) -> None:
    dataset = PairDataset.of(pairs)
    assert list(dataset) == pairs
    assert dataset[:] == pairs
    expected = [[len(p.prompt), len(p.chosen), len(p.rejected), len(p.gold)] for p in pairs]
    assert dataset.lengths.tolist() == expected


def test_indexing_is_a_sequences() -> None:
    pairs = [Example(str(n), [n], [n, n], []) for n in range(3)]
    dataset = PairDataset.of(iter(pairs))
    assert dataset[-1] == pairs[2]
    assert dataset[0:2] == pairs[:2]
    store = TokenStore.of(pairs)
    assert store.tokens.dtype == "int32" and len(store.tokens) == 9
    for index in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            dataset[index]


def test_the_last_example_borrows_from_the_first() -> None:
    dataset = PairDataset.of([Example(str(n), [n], [n], [9]) for n in range(3)])
    assert [dataset.mismatched(n) for n in range(3)] == [[1], [2], [0]]


def test_a_mismatched_completion_answers_another_prompt_in_a_file_written_pair_by_pair() -> None:
    prompts = [[1], [1], [2], [2], [3], [1]]  # the last one's prompt is the first one's
    dataset = PairDataset.of([Example(str(n), prompt, [10 + n], []) for n, prompt in enumerate(prompts)])
    assert dataset.partners.tolist() == [2, 2, 4, 4, 5, 2]
    assert [dataset.mismatched(n) for n in range(6)] == [[12], [12], [14], [14], [15], [12]]
    assert dataset.response_lengths(SIDES[:3])[:, 2].tolist() == [1] * 6


@given(prompts=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_partners_by_search(prompts: list[int]) -> None:
    dataset = PairDataset.of([Example(str(n), [prompt], [n], []) for n, prompt in enumerate(prompts)])
    if len(set(prompts)) == 1:
        with pytest.raises(ConfigError, match="have one prompt"):
            _ = dataset.partners
        return
    count = len(prompts)
    wanted = [
        next(place % count for place in range(n, n + count) if prompts[place % count] != prompts[n])
        for n in range(count)
    ]
    assert dataset.partners.tolist() == wanted


def test_the_fingerprint_by_hand() -> None:
    # 1 pair; id "x" behind its length; offsets 0 1 2 4 4 (no gold response); tokens 7 8 9 10; its four
    # numbers, of which the row gives the weight alone; all little-endian
    content = b"1" + (1).to_bytes(8, "little") + b"x"
    content += b"".join(n.to_bytes(8, "little") for n in (0, 1, 2, 4, 4))
    content += b"".join(n.to_bytes(4, "little") for n in (7, 8, 9, 10))
    content += struct.pack("<4d", math.nan, math.nan, math.nan, 0.5)
    store = TokenStore.of([Example("x", [7], [8], [9, 10])], np.array([[np.nan, np.nan, np.nan, 0.5]]))
    assert store.digest == hashlib.sha256(content).hexdigest()
    # the dataset: 1 pair, no limit; its one store
    whole = hashlib.sha256(b"(1, None)" + store.digest.encode()).hexdigest()
    assert PairDataset([store]).fingerprint == whole


def test_the_fingerprint_sees_every_change() -> None:
    variants = [
        [Example("x", [7], [8], [9, 10])],
        [Example("y", [7], [8], [9, 10])],
        [Example("x", [7, 8], [], [9, 10])],
        [Example("x", [7], [8], [9, 11])],
        [Example("x", [7], [8], [9, 10])] * 2,
    ]
    prints = [PairDataset.of(pairs).fingerprint for pairs in variants]
    prints.append(PairDataset.of(variants[0], max_length=4).fingerprint)
    prints.append(PairDataset.of([Example("x", [7], [8], [9], [10])]).fingerprint)
    prints.append(PairDataset.of(variants[0], values=np.array([[np.nan, np.nan, np.nan, 2.0]])).fingerprint)
    assert len(set(prints)) == 8
    assert PairDataset.of(variants[0]).fingerprint == prints[0]


def test_rows_of_several_stores() -> None:
    stores = [TokenStore.of([Example(f"{s}{n}", [s, n], [n], [9]) for n in range(3)]) for s in range(2)]
    dataset = PairDataset(stores, rows=np.array([4, 0, 4]))
    assert [example.id for example in dataset] == ["11", "00", "11"] == list(dataset.ids)
    assert dataset.ids[1:] == ["00", "11"]
    assert [dataset.mismatched(n) for n in range(3)] == [[0], [1], [0]]  # the last two ends are one prompt
    assert dataset.lengths.tolist() == [[2, 1, 1, 0]] * 3
    everything = PairDataset(stores)
    assert [example.id for example in everything] == ["00", "01", "02", "10", "11", "12"]
    assert PairDataset(stores, rows=np.arange(6)).fingerprint == everything.fingerprint
    orders = [PairDataset(stores, rows=np.array(rows)) for rows in ([0, 1], [1, 0], [0, 4])]
    assert len({other.fingerprint for other in [*orders, dataset, everything]}) == 5
    assert dataset.prompts.tolist() == [everything.prompts[row] for row in (4, 0, 4)]
    assert len(set(everything.prompts.tolist())) == 6


def test_an_unwanted_completion_may_be_the_mismatched_one() -> None:
    dataset = PairDataset.of([Example("a", [1], [5], []), Example("b", [2], [], [6, 7])], max_length=2)
    assert [dataset.mismatched(n) for n in range(2)] == [[6], [5]]
    assert dataset.response_lengths(SIDES[:3]).tolist() == [[1, 0, 1], [0, 2, 1]]
