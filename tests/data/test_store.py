"""The flat token store."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.data.records import Example
from rcpo.data.store import PairDataset

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
examples = st.lists(st.builds(Example, st.text(max_size=3), ids, ids, ids), max_size=6)


@given(pairs=examples)
def test_what_goes_in_comes_out(pairs: list[Example]) -> None:
    dataset = PairDataset(pairs)
    assert list(dataset) == pairs
    assert dataset[:] == pairs
    assert dataset.lengths.tolist() == [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]


def test_indexing_is_a_sequences() -> None:
    pairs = [Example(str(n), [n], [n, n], []) for n in range(3)]
    dataset = PairDataset(iter(pairs))
    assert dataset[-1] == pairs[2]
    assert dataset[0:2] == pairs[:2]
    assert dataset.tokens.dtype == "int32" and len(dataset.tokens) == 9
    for index in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            dataset[index]


def test_the_last_example_borrows_from_the_first() -> None:
    dataset = PairDataset([Example(str(n), [1], [n], [9]) for n in range(3)])
    assert [dataset.mismatched(n) for n in range(3)] == [[1], [2], [0]]


def test_the_fingerprint_by_hand() -> None:
    # (1 pair, no limit); id "x" behind its length; offsets 0 1 2 4; tokens 7 8 9 10; all little-endian
    content = b"(1, None)" + (1).to_bytes(8, "little") + b"x"
    content += b"".join(n.to_bytes(8, "little") for n in (0, 1, 2, 4))
    content += b"".join(n.to_bytes(4, "little") for n in (7, 8, 9, 10))
    assert PairDataset([Example("x", [7], [8], [9, 10])]).fingerprint == hashlib.sha256(content).hexdigest()


def test_the_fingerprint_sees_every_change() -> None:
    variants = [
        [Example("x", [7], [8], [9, 10])],
        [Example("y", [7], [8], [9, 10])],
        [Example("x", [7, 8], [], [9, 10])],
        [Example("x", [7], [8], [9, 11])],
        [Example("x", [7], [8], [9, 10])] * 2,
    ]
    prints = [PairDataset(pairs).fingerprint for pairs in variants]
    prints.append(PairDataset(variants[0], max_length=4).fingerprint)
    assert len(set(prints)) == 6
    assert PairDataset(variants[0]).fingerprint == prints[0]
