"""A name for an example that depends on its contents alone: the same in every run, split and file order."""

from __future__ import annotations

import hashlib

import numpy as np

from rcpo.data.records import Example

HEX_DIGITS = 16  # 64 bits: two of a million examples share a name with a chance of 3e-8


def example_id(example: Example) -> str:
    """A hash of the tokens of prompt, chosen and rejected."""
    digest = hashlib.sha256()
    for part in (example.prompt, example.chosen, example.rejected):
        digest.update(len(part).to_bytes(4, "little") + np.asarray(part, "<i4").tobytes())
    return digest.hexdigest()[:HEX_DIGITS]
