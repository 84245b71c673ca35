"""A name for an example that depends on its contents alone: the same in every run, split and file order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rcpo.data.records import Example

HEX_DIGITS = 16  # 64 bits: two of a million examples share a name with a chance of 3e-8


def example_id(example: Example) -> str:
    """A hash of the tokens of prompt, chosen and rejected."""
    digest = hashlib.sha256()
    for part in (example.prompt, example.chosen, example.rejected):
        digest.update(len(part).to_bytes(4, "little") + np.asarray(part, "<i4").tobytes())
    return digest.hexdigest()[:HEX_DIGITS]


def smallest_ids(examples: Sequence[Example], size: int) -> list[int]:
    """Positions of the `size` examples with the smallest ids, in the ids' order: a fixed sample of them."""
    ids = [example_id(example) for example in examples]
    return sorted(range(len(ids)), key=ids.__getitem__)[:size]
