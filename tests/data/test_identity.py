"""Names of examples: what they are made of, and the fixed sample that they choose."""

from __future__ import annotations

import struct
from hashlib import sha256

from rcpo.data.identity import example_id, smallest_ids
from rcpo.data.records import Example


def pair(prompt: list[int], chosen: list[int], rejected: list[int], name: str = "a:1") -> Example:
    return Example(name, prompt, chosen, rejected)


def test_an_id_is_a_hash_of_three_lengths_and_their_tokens() -> None:
    # little-endian, four bytes each: 2 tokens, 1 token, 0 tokens
    expected = sha256(struct.pack("<3i2i1i", 2, 7, 70_000, 1, 9, 0)).hexdigest()
    assert example_id(pair([7, 70_000], [9], [])) == expected[:16]


def test_an_id_tells_the_parts_apart_and_not_where_a_pair_came_from() -> None:
    others = [pair([1], [2], [3]), pair([1, 2], [], [3]), pair([1], [3], [2]), pair([], [1, 2], [3])]
    assert len({example_id(example) for example in others}) == 4
    assert example_id(pair([1], [2], [3], "b:9")) == example_id(others[0])


def test_the_smallest_ids_choose_the_same_examples_in_any_order() -> None:
    examples = [pair([number], [1], [2]) for number in range(9)]
    ids = [example_id(example) for example in examples]
    chosen = smallest_ids(examples, 4)
    assert [ids[place] for place in chosen] == sorted(ids)[:4]
    assert [examples[::-1][place] for place in smallest_ids(examples[::-1], 4)] == [
        examples[place] for place in chosen
    ]
    assert sorted(smallest_ids(examples, 20)) == list(range(9))
