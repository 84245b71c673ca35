"""Token lists -> `TokenBatch`: a row for each sequence, or rows that share their prompts and hold many.

`separate`: prompt and response of one sequence a row. `shared`: a pair's prompt once, then its responses,
with positions that restart after the prompt; short pairs follow each other in a row where they fit. Both
give the same response tokens in the same order. Padding is on the right.

Axes: B pairs, S sequences, R rows, L row length, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise, product
from typing import Any

import numpy as np
import torch

from rcpo.data.batches import FILLER, pack
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.method.types import PAIR, SIDES, TokenBatch
from rcpo.models.attention import PADDING, SEGMENTS_PER_PAIR

Pair = list[list[int]]  # a prompt's token ids and those of its responses, one for each side
Arrays = dict[str, np.ndarray]


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    sides: tuple[str, ...] = PAIR,
    layout: str = "separate",
    indices: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    mismatched: Sequence[list[int]] | None = None,
) -> TokenBatch:
    """B examples as sequences, side after side: `sides` are some of `SIDES` in their order, `chosen` first.

    Of an unpaired example chosen or rejected has no token, and no row of its own.

    `indices` are dataset positions (default 0..B−1; −1 marks a filler), `weights` default to 0 for fillers
    and 1 for the others, `margins` to None: nobody scored the responses. `mismatched` are B completions,
    scored after these examples' prompts. What responses only read is not among the N tokens.
    """
    known = tuple(side for side in SIDES if side in sides)
    if sides != known or sides[:1] != PAIR[:1] or ("mismatched" in sides) != (mismatched is not None):
        raise ValueError(
            f"sides={sides}: chosen and some of {', '.join(SIDES[1:])}, in this order, are expected, and "
            "mismatched completions where they are among them"
        )
    assert layout in ("separate", "shared"), layout
    positions = list(range(len(examples))) if indices is None else list(indices)
    if weights is None:
        weights = [float(position != FILLER) for position in positions]
    assert len(positions) == len(weights) == len(examples), "one index and one weight a pair"

    others: Sequence[list[int]] = [[] for _ in examples] if mismatched is None else mismatched
    pairs = [
        [example.prompt, *(tokens if side == "mismatched" else getattr(example, side) for side in sides)]
        for example, tokens in zip(examples, others, strict=True)
    ]
    lengths = np.array([[len(part) for part in pair] for pair in pairs])  # (B, 1 + sides), prompts first
    responses = lengths[:, 1:]
    compared = [side in PAIR for side in sides]  # of an unpaired example one of them is not there
    scored, further = responses[:, compared].max(axis=1), responses[:, np.logical_not(compared)]
    if min(lengths[:, 0].min(), scored.min(), further.min(initial=1)) < 1:
        raise ValueError(
            "a row has an empty prompt or no response: nothing would predict it, or nothing is learned"
        )
    shared = layout == "shared"
    arrays = _shared(pairs, lengths, pad_id) if shared else _separate(pairs, lengths, pad_id)
    arrays["sequences"] = np.repeat(np.arange(responses.size), responses.T.ravel())
    arrays["lengths"] = responses.T.ravel()
    if any(example.contexts for example in examples):
        arrays |= _learned(arrays, examples, sides)
    repeats = 1 if shared else (responses > 0).sum(axis=1)  # of the prompt
    computed = responses.sum(axis=1) + repeats * lengths[:, 0]  # (B,)
    made: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TokenBatch(
        **made,
        weights=torch.tensor(weights, dtype=torch.float64),
        margins=None if margins is None else torch.tensor(margins, dtype=torch.float64),
        indices=torch.tensor(positions, dtype=torch.long),
        example_ids=[example.id for example in examples],
        sides=sides,
        num_tokens=int(computed[np.asarray(weights) > 0].sum()),
    )


def collate_indices(
    dataset: PairDataset,
    indices: Sequence[int],
    pad_id: int,
    *,
    sides: tuple[str, ...] = PAIR,
    layout: str = "separate",
) -> TokenBatch:
    """The examples at these positions as a batch; a filler (−1) has the shortest one's tokens, weight 0."""
    positions = [dataset.shortest if index == FILLER else index for index in indices]
    weights = np.where(np.asarray(indices) == FILLER, 0.0, dataset.weights[positions])
    mismatched = [dataset.mismatched(position) for position in positions] if "mismatched" in sides else None
    examples = [dataset[position] for position in positions]
    if mismatched is not None and any(spans := [dataset.mismatched_contexts(place) for place in positions]):
        examples = [
            replace(example, contexts={**(example.contexts or {}), "mismatched": read})
            for example, read in zip(examples, spans, strict=True)
        ]
    margins = dataset.margins[positions]
    return collate(
        examples,
        pad_id,
        sides=sides,
        layout=layout,
        indices=indices,
        weights=weights.tolist(),
        margins=None if np.isnan(margins).any() else margins.tolist(),
        mismatched=mismatched,
    )


def _learned(arrays: Arrays, examples: Sequence[Example], sides: tuple[str, ...]) -> Arrays:
    """The arrays of response tokens without those that are read alone, and the lengths without them."""
    learned = np.ones(len(arrays["labels"]), dtype=bool)
    starts = np.cumsum(arrays["lengths"]) - arrays["lengths"]  # (S,), side after side
    spans = (
        (start + first, start + end)
        for start, (side, example) in zip(starts, product(sides, examples), strict=True)
        for first, end in (example.contexts or {}).get(side, ())
    )
    for first, end in spans:
        learned[first:end] = False
    kept = {name: arrays[name][learned] for name in ("predictors", "labels", "sequences")}
    return kept | {"lengths": np.bincount(kept["sequences"], minlength=len(starts))}


def _separate(pairs: list[Pair], lengths: np.ndarray, pad_id: int) -> Arrays:
    """A row for each of the S sequences that has a response."""
    sides = lengths.shape[1] - 1
    there = lengths[:, 1:].T.ravel() > 0  # (S,)
    prompts = np.tile(lengths[:, 0], sides)[there]  # (R,)
    totals = prompts + lengths[:, 1:].T.ravel()[there]
    columns = np.arange(totals.max())  # (L,)
    real = columns < totals[:, None]  # (R, L)
    response = real & (columns >= prompts[:, None])
    tokens = chain.from_iterable(
        chain(pair[0], pair[1 + side]) for side in range(sides) for pair in pairs if pair[1 + side]
    )
    input_ids = np.full(real.shape, pad_id, dtype=np.int64)
    input_ids[real] = np.fromiter(tokens, dtype=np.int64, count=totals.sum())
    return {
        "input_ids": input_ids,
        "position_ids": np.tile(columns, (len(real), 1)),
        "predictors": np.flatnonzero(response) - 1,  # a token is predicted from the position before it
        "labels": input_ids[response],
    }


def _shared(pairs: list[Pair], lengths: np.ndarray, pad_id: int) -> Arrays:
    """Prompt and responses of a pair one after the other; pairs packed into rows."""
    totals = lengths.sum(axis=1)
    rows, starts = pack(totals, int(totals.max()))
    shape = (max(rows) + 1, int(totals.max()))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING, dtype=np.int64)
    predictors: list[list[np.ndarray]] = [[] for _ in pairs[0][1:]]  # by side, then pair
    for number, pair in enumerate(pairs):
        row, start = rows[number], starts[number]
        own = slice(start, start + totals[number])
        input_ids[row, own] = list(chain.from_iterable(pair))
        segments[row, own] = SEGMENTS_PER_PAIR * number + np.repeat(np.arange(len(pair)), lengths[number])
        prompt = int(lengths[number, 0])
        ends = np.cumsum(lengths[number])
        position_ids[row, start : start + prompt] = np.arange(prompt)
        for side, (first, end) in enumerate(pairwise(ends)):
            position_ids[row, start + first : start + end] = prompt + np.arange(end - first)
            places = row * shape[1] + start + np.arange(first, end) - 1
            places[:1] = row * shape[1] + start + prompt - 1  # the prompt's end predicts the first token
            predictors[side].append(places)
    labels = chain.from_iterable(pair[1 + side] for side in range(len(predictors)) for pair in pairs)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predictors": np.concatenate(list(chain.from_iterable(predictors))),
        "labels": np.fromiter(labels, dtype=np.int64, count=int(lengths[:, 1:].sum())),
    }
