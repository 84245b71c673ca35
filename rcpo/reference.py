"""Log-probs of a frozen reference for the tokens of a batch: per token, for `importance` weights them anew.

Axes: N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rcpo.types import TokenBatch

Reference = Callable[[TokenBatch], Tensor]
"""A batch → (N,) log-probs of its response tokens under the reference, no gradient."""


class StoredReference:
    """Log-probs computed once, by dataset position and side (chosen, rejected, mismatched).

    Filled by `add` batch by batch, on any rank; `merge` takes in what other ranks hold.
    """

    def __init__(self) -> None:
        self._logps: dict[tuple[int, int], np.ndarray] = {}

    def add(self, batch: TokenBatch, logps: Tensor) -> None:
        """Keeps a batch's log-probs (N,), fillers excepted."""
        parts = torch.split(logps.detach().float().cpu(), batch.lengths.tolist())
        indices = batch.indices.tolist()
        for place, part in enumerate(parts):
            side, pair = divmod(place, batch.num_pairs)
            if indices[pair] >= 0:
                self._logps[side, indices[pair]] = part.numpy()

    def merge(self, others: Sequence[StoredReference]) -> None:
        for other in others:
            self._logps.update(other._logps)

    def __call__(self, batch: TokenBatch) -> Tensor:
        lengths = batch.lengths.tolist()
        indices = batch.indices.tolist()
        parts = []
        for place, length in enumerate(lengths):
            side, pair = divmod(place, batch.num_pairs)
            filler = indices[pair] < 0
            parts.append(np.zeros(length, np.float32) if filler else self._logps[side, indices[pair]])
        values = np.concatenate(parts)
        assert len(values) == len(batch.labels), (len(values), len(batch.labels))
        return torch.from_numpy(values).to(batch.labels.device)
