"""Which examples an optimizer step sees, and which of them a rank and micro-step compute.

Both are pure functions of (seed, step): a resumed run needs no saved data position, and the global batch is
the same for every number of ranks, accumulation steps and micro-batches.
"""

from __future__ import annotations

import numpy as np

FILLER = -1


class GlobalBatches:
    """The global batches of an endless run over `num_examples` examples.

    Every epoch is a permutation drawn from (seed, epoch); its last batch is short where `batch_size` does not
    divide `num_examples`, so that no example is ever left out or seen twice in an epoch.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if num_examples < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"GlobalBatches needs num_examples and batch_size of at least 1 and seed of at least 0; "
                f"got {num_examples}, {batch_size} and {seed}"
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self._memo: tuple[int, np.ndarray] = (0, self._permutation(0))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that an epoch takes, the short one included."""
        return -(-self.num_examples // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that a step, counted from 0, belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Dataset positions of the global batch of a step, counted from 0."""
        assert step >= 0, step
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._memo[0] != epoch:
            self._memo = (epoch, self._permutation(epoch))
        start = place * self.batch_size
        return self._memo[1][start : start + self.batch_size].tolist()

    def examples_seen(self, steps: int) -> int:
        """Examples that the first `steps` steps see, repetitions in later epochs counted."""
        epochs, place = divmod(steps, self.steps_per_epoch)
        return epochs * self.num_examples + place * self.batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)


def split(indices: list[int], rank: int, world: int, micro: int) -> list[list[int]]:
    """The micro-batches of one rank: a contiguous block of the global batch, cut into pieces of `micro`.

    All ranks get equally many pieces of equal size; where the batch is short, FILLER (−1) evens out the end.
    Going through the ranks in order, and through each one's pieces, gives `indices` in their order.
    """
    assert 0 <= rank < world and micro >= 1, (rank, world, micro)
    pieces = -(-len(indices) // (world * micro))
    padded = indices + [FILLER] * (pieces * world * micro - len(indices))
    first = rank * pieces * micro
    return [padded[first + piece * micro : first + (piece + 1) * micro] for piece in range(pieces)]


def row_lengths(prompts: np.ndarray, responses: np.ndarray, layout: str) -> np.ndarray:
    """Tokens of the longest row of each example: prompts (n,), responses (n, sides) → (n,)."""
    return prompts + (responses.sum(axis=1) if layout == "shared" else responses.max(axis=1))


def by_length(
    indices: list[int], lengths: np.ndarray, world: int, micro: int, *, packed: bool = False
) -> list[int]:
    """The same global batch in an order that `split` cuts into pieces with little padding.

    `lengths` (B,) are those of the B examples `indices`. Pieces hold similar lengths, the longest first;
    neighbours go to the ranks of one micro-step, in an order that turns round every time, so that ranks have
    equal work. Where rows are `packed`, pieces of mixed lengths are taken instead if the busiest rank then
    computes less: short pairs fill up the rows of long ones. FILLER (−1) stands among the shortest.
    """
    steps = -(-len(indices) // (world * micro))
    padded = np.full(steps * world * micro, FILLER)  # places in `indices`
    padded[: len(indices)] = np.argsort(-lengths, kind="stable")
    similar = padded.reshape(steps, world, micro).copy()
    similar[1::2] = similar[1::2, ::-1].copy()
    order = similar.swapaxes(0, 1).reshape(world, -1)
    if packed:
        dealt = padded.reshape(micro, world * steps).copy()
        dealt[1::2] = dealt[1::2, ::-1].copy()
        mixed = dealt.T.reshape(world, -1)
        order = min((order, mixed), key=lambda places: _busiest(places, lengths, micro))
    return [indices[place] if place != FILLER else FILLER for place in order.ravel().tolist()]


def _busiest(places: np.ndarray, lengths: np.ndarray, micro: int) -> int:
    """Tokens and padding that the busiest rank computes, in packed rows; places (ranks, steps · micro)."""
    sizes = np.where(places == FILLER, 1, lengths[places]).reshape(len(places), -1, micro)
    if micro == 1:  # nothing to pack; every rank deals for all of them, and there may be a thousand
        return int(sizes.sum(axis=(1, 2)).max())
    return max(sum(_packed_size(piece) for piece in rank) for rank in sizes)


def _packed_size(totals: np.ndarray) -> int:
    longest = int(totals.max())
    return (max(pack(totals, longest)[0]) + 1) * longest


def pack(totals: np.ndarray, capacity: int) -> tuple[list[int], list[int]]:
    """Row and start of each block of `totals` (B,) tokens in rows of `capacity`: first fit, longest first.

    The capacity is the longest block's length, so that packing never makes rows longer, only fewer: attention
    computes the whole square of a row.
    """
    rows, starts = [0] * len(totals), [0] * len(totals)
    used: list[int] = []
    for number in np.argsort(-totals, kind="stable").tolist():
        size = int(totals[number])
        row = next((row for row, taken in enumerate(used) if taken + size <= capacity), len(used))
        if row == len(used):
            used.append(0)
        rows[number], starts[number] = row, used[row]
        used[row] += size
    return rows, starts
