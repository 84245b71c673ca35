"""Which tokens of a row see which, and which architectures take such a mask exactly.

In the shared layout a row holds a prompt once and its responses after it, positions restarting, possibly
several pairs. A response sees its prompt and itself. The row is described by `segments` (R, L), which go to
the device as integers; a mask of L² elements a row is made there, once a batch.

Axes: R rows, L row length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rcpo.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SEGMENTS_PER_PAIR = 5
"""Segment codes are 5 · pair + part: part 0 is the prompt, 1 to 4 its responses. Padding is −1."""

PADDING = -1

# Which masks a model of transformers takes: one for all layers, with its sliding window or without, or one by
# name of layer type. Tests hold each of these to the separate layout; a model is not here if a custom mask or
# restarted positions are not exact for it (ALiBi, recurrent and state-space layers), or if unchecked.
FULL, WINDOWED, BY_LAYER_TYPE = "full", "windowed", "by layer type"
SHARED_ROWS = {
    "llama": FULL,
    "gpt_neox": FULL,
    "mistral": WINDOWED,
    "phi3": WINDOWED,
    "qwen2": BY_LAYER_TYPE,
    "qwen3": BY_LAYER_TYPE,
    "gemma2": BY_LAYER_TYPE,
    "gemma3_text": BY_LAYER_TYPE,
}
LOOK = "find_packed_sequence_indices"  # in transformers' masking_utils
FLEX = "flex_attention"
KERNELS = (None, "eager", "sdpa", FLEX)  # None: not chosen yet; transformers then takes one of the first two


def reason_for_separate(config: Any) -> str | None:
    """Why a model with this configuration of transformers cannot take shared rows; None where it can."""
    kind = config.model_type
    if kind not in SHARED_ROWS:
        return f"model type {kind} is not among those that were checked ({', '.join(sorted(SHARED_ROWS))})"
    if config._attn_implementation not in KERNELS:
        return f"attention {config._attn_implementation} takes no mask of its own (eager, sdpa, {FLEX} do)"
    if kind == "gemma3_text" and config.use_bidirectional_attention:
        return "its attention is bidirectional"
    return None


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Inside, models take rows for one sequence each, and make no mask: the causal kernel needs none.

    Without a mask transformers looks whether positions restart in a row, which waits for the device in every
    forward pass. A version that looks in another way is right, and slower.
    """
    from transformers import (
        masking_utils,  # with the compiler that it imports: the models do, the data do not
    )

    looks = vars(masking_utils).get(LOOK)
    if looks is None:
        yield
        return
    setattr(masking_utils, LOOK, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, looks)


def choose_layout(requested: str, configs: Iterable[Any]) -> str:
    """`shared` or `separate` for `data.layout`, given the configurations of all models that score batches.

    Raises ConfigError where `shared` is asked for and a model cannot take it.
    """
    reasons = [reason for config in configs if (reason := reason_for_separate(config)) is not None]
    if requested == "shared" and reasons:
        raise ConfigError(f"data.layout=shared: {reasons[0]}; use data.layout=auto or data.layout=separate")
    return "separate" if requested == "separate" or reasons else "shared"


def visible(segments: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Whether a position (row of the last two axes) sees another (column): (R, L) → (R, 1, L, L) boolean.

    A position sees what stands before it and itself in its own segment and in its pair's prompt, with a
    sliding `window` only where fewer than `window` positions lie between. Padding sees padding before it, so
    no row of the softmax is empty.
    """
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    pairs = torch.div(segments, SEGMENTS_PER_PAIR, rounding_mode="floor")
    prompt = (segments >= 0) & (segments % SEGMENTS_PER_PAIR == 0)
    sees = segments[:, :, None] == segments[:, None, :]
    sees |= (pairs[:, :, None] == pairs[:, None, :]) & prompt[:, None, :]
    sees &= order[:, None] >= order
    if window is not None:
        sees &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return sees[:, None]


def visible_blocks(segments: Tensor, position_ids: Tensor, window: int | None = None) -> BlockMask:
    """What `visible` gives, as the blocks that FlexAttention computes: those that hold no visible place are
    left out, and no mask of L² elements a row stays in memory.
    """
    rows, length = segments.shape
    pairs = torch.div(segments, SEGMENTS_PER_PAIR, rounding_mode="floor")
    prompt = (segments >= 0) & (segments % SEGMENTS_PER_PAIR == 0)

    def sees(row: Tensor, _: Tensor, query: Tensor, place: Tensor) -> Tensor:
        own = segments[row, query] == segments[row, place]
        asked = (pairs[row, query] == pairs[row, place]) & prompt[row, place]
        there = (own | asked) & (query >= place)
        if window is None:
            return there
        return there & (position_ids[row, query] - position_ids[row, place] < window)

    from torch.nn.attention.flex_attention import create_block_mask  # imports torch's compiler

    on_gpu = segments.device.type == "cuda"
    return create_block_mask(sees, rows, None, length, length, device=str(segments.device), _compile=on_gpu)


def attention_masks(
    config: Any, segments: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """The mask of shared rows in the form the model takes: (R, 1, L, L), or one by layer type.

    Boolean for SDPA, blocks for FlexAttention. Eager attention adds its mask to scores of `dtype`, where a
    boolean would be silently wrong by nats: it gets 0 and the lowest number.
    """

    def mask(window: int | None) -> Tensor | BlockMask:
        if config._attn_implementation == FLEX:
            return visible_blocks(segments, position_ids, window)
        sees = visible(segments, position_ids, window)
        if config._attn_implementation == "sdpa":
            return sees
        additive = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return additive.masked_fill_(~sees, torch.finfo(dtype).min)

    kind = SHARED_ROWS[config.model_type]
    if kind == FULL:
        return mask(None)
    if kind == WINDOWED:
        return mask(config.sliding_window)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {name: mask(windows[name]) for name in sorted(set(config.layer_types))}
