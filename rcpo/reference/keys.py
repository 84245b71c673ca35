"""What cached log-probs depend on, each as a hash of its contents, so that no stale entry is ever taken.

A model folder is hashed file by file.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

FORMAT = 2  # raise where rcpo computes other numbers from the same ingredients


def entry_key(ingredients: dict[str, str]) -> str:
    """The name of the cache entry that these ingredients make."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def positions_hash(positions: np.ndarray | None) -> str:
    """Of the examples that are scored; `all` where none is left out."""
    return "all" if positions is None else hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()
