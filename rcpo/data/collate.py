"""Token lists -> `TokenBatch`: two rows a pair, padded on the right.

Axes: B pairs, S sequences, R rows (R = S here), L row length, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from rcpo.data.batches import FILLER
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.types import TokenBatch

Row = tuple[list[int], list[int]]  # prompt and response token ids


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    sides: int = 2,
    indices: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    mismatched: Sequence[list[int]] | None = None,
) -> TokenBatch:
    """B examples as rows: all chosen, with `sides` ≥ 2 then all rejected, with 3 then all mismatched ones.

    `indices` are dataset positions (default 0..B−1; −1 marks a filler), `weights` default to 0 for fillers
    and 1 for the others. `mismatched` are B completions, scored after these examples' prompts.
    """
    if sides not in (1, 2, 3) or (sides == 3) != (mismatched is not None):
        raise ValueError(
            f"sides={sides}: 1 (chosen), 2 (and rejected) or 3 (and mismatched, which must be given)"
        )
    positions = list(range(len(examples))) if indices is None else list(indices)
    if weights is None:
        weights = [float(position != FILLER) for position in positions]
    assert len(positions) == len(weights) == len(examples), "one index and one weight a pair"

    rows: list[Row] = [(example.prompt, example.chosen) for example in examples]
    if sides >= 2:
        rows += [(example.prompt, example.rejected) for example in examples]
    if mismatched is not None:
        rows += [(example.prompt, tokens) for example, tokens in zip(examples, mismatched, strict=True)]
    return TokenBatch(
        **_pad(rows, pad_id),
        weights=torch.tensor(weights, dtype=torch.float32),
        indices=torch.tensor(positions, dtype=torch.long),
        example_ids=[example.id for example in examples],
        sides=sides,
    )


def collate_indices(
    dataset: PairDataset, indices: Sequence[int], pad_id: int, *, sides: int = 2
) -> TokenBatch:
    """The examples at these positions as a batch; a filler (−1) carries example 0's tokens with weight 0."""
    positions = [max(index, 0) for index in indices]
    mismatched = [dataset.mismatched(position) for position in positions] if sides == 3 else None
    examples = [dataset[position] for position in positions]
    return collate(examples, pad_id, sides=sides, indices=indices, mismatched=mismatched)


def _pad(rows: list[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """The tensors of a `TokenBatch` that depend on its rows alone."""
    prompts = np.array([len(prompt) for prompt, _ in rows])
    lengths = np.array([len(response) for _, response in rows])
    if prompts.min() < 1 or lengths.min() < 1:
        raise ValueError(
            "a row has an empty prompt or response: nothing would predict it, or nothing is learned"
        )
    totals = prompts + lengths
    columns = np.arange(totals.max())  # (L,)
    real = columns < totals[:, None]  # (R, L)
    response = real & (columns >= prompts[:, None])
    tokens = chain.from_iterable(chain.from_iterable(rows))
    input_ids = np.full(real.shape, pad_id, dtype=np.int64)
    input_ids[real] = np.fromiter(tokens, dtype=np.int64, count=totals.sum())
    arrays = {
        "input_ids": input_ids,
        "attention_mask": real.astype(np.int64),
        "position_ids": np.tile(columns, (len(rows), 1)),
        "predictors": np.flatnonzero(response) - 1,  # a token is predicted from the position before it
        "labels": input_ids[response],
        "sequences": np.repeat(np.arange(len(rows)), lengths),
        "lengths": lengths,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
