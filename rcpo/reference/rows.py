"""Log-probs of a frozen reference for the tokens of a batch: per token, for `importance` weights them anew.

They lie in one flat array, example after example, in each side after side: a pair is read in one piece.

Axes: n examples, N response tokens of a batch, S sequences of a batch, T stored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rcpo.data.store import PairDataset
from rcpo.method.types import TokenBatch, to_device

FILLER, NOT_STORED = -1, -2  # places of tokens that have none
Reference = Callable[[TokenBatch], Tensor]
"""A batch → (N,) log-probs of its response tokens under the reference, no gradient."""


class Rows:
    """Where each response of a dataset lies: `offsets` (n·sides + 1,) int64, response i·sides + side's place.

    `positions` are the examples that are stored (None: all of them); the others have no tokens. Batches hold
    stored examples alone, unless the rows are `partial`.
    """

    def __init__(
        self,
        dataset: PairDataset,
        sides: tuple[str, ...],
        positions: np.ndarray | None = None,
        *,
        partial: bool = False,
    ) -> None:
        lengths = dataset.learned_lengths(sides)
        if positions is not None:
            kept = np.zeros_like(lengths)
            kept[positions] = lengths[positions]
            lengths = kept
        self._sides = sides
        self._partial = partial
        self.offsets = np.concatenate([[0], np.cumsum(lengths.ravel(), dtype=np.int64)])

    @property
    def total(self) -> int:
        """T."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """The stored tokens of each response, (n·sides,)."""
        return np.diff(self.offsets)

    def of_batch(self, batch: TokenBatch) -> np.ndarray:
        """The stored row of each sequence of a batch, (S,), −1 for fillers."""
        places = [self._sides.index(side) for side in batch.sides]
        indices = batch.on_host.indices.numpy()
        rows = indices * len(self._sides) + np.array(places)[:, None]
        return np.where(indices < 0, -1, rows).ravel()

    def places(self, batch: TokenBatch) -> np.ndarray:
        """The place in the array of each response token of a batch, (N,): `FILLER`, or `NOT_STORED`."""
        rows, lengths = self.of_batch(batch), batch.on_host.lengths.numpy()
        starts, real = self.offsets[rows], rows >= 0
        stored = self.offsets[rows + 1] - starts
        missing = real & (stored == 0) & (lengths > 0) & self._partial
        assert (stored == lengths)[real & ~missing].all(), "a batch has responses that are not those stored"
        firsts = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)
        places[np.repeat(missing, lengths)] = NOT_STORED
        return np.where(np.repeat(real, lengths), places, FILLER)

    def at(self, places: np.ndarray) -> np.ndarray:
        """Whether each response (n·sides,) lies at one of these places (m,), or has no token at all."""
        return np.isin(self.offsets[:-1], places) | (self.lengths == 0)

    def within(self, batch: TokenBatch, found: np.ndarray) -> bool:
        """Whether all responses of a batch are `found` (n·sides,)."""
        rows = self.of_batch(batch)
        return bool(found[rows[rows >= 0]].all())

    def pieces(self, batch: TokenBatch, logps: Tensor, found: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """A batch's log-probs (N,) as pieces of the array: (place, float32 values).

        Fillers are left out, so are responses without tokens, which lie where the next one does, and those
        that are `found` (n·sides,) already.
        """
        values = logps.detach().float().cpu().numpy()
        lengths = batch.on_host.lengths.numpy()
        ends = np.cumsum(lengths)
        for row, length, end in zip(self.of_batch(batch), lengths, ends):
            if row >= 0 and length and not found[row]:
                assert self.offsets[row + 1] - self.offsets[row] == length, (row, length)
                yield int(self.offsets[row]), values[end - length : end]


class StoredReference:
    """A reference whose log-probs (T,) were computed before: an array in memory or a file's.

    `check` is called before each batch is read: it raises where the values are no longer those. Of examples
    that partial rows do not hold, the log-probs are NaN.
    """

    def __init__(self, rows: Rows, logps: np.ndarray, check: Callable[[], None] = lambda: None) -> None:
        assert logps.shape == (rows.total,), (logps.shape, rows.total)
        self._rows = rows
        self._logps = logps
        self._check = check

    def __call__(self, batch: TokenBatch) -> Tensor:
        self._check()
        places = self._rows.places(batch)
        real = places >= 0
        values = np.zeros(len(places), dtype=np.float32)
        values[real] = self._logps[places[real]]
        values[places == NOT_STORED] = np.nan
        return to_device(torch.from_numpy(values), batch.labels.device)
