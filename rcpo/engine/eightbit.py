"""State that bitsandbytes quantizes in blocks, as numbers of its elements: what any layout can save and read.

A moment in 8 bits is an index into a map of 256 values, times the largest magnitude of its block. Checkpoints
hold each element's value and its block's magnitude, which give the same blocks the same bits again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # elements that share a magnitude: bitsandbytes' own
MOMENTS = ("1", "2")  # as bitsandbytes numbers them: state1, qmap1, absmax1
UNCHANGED = ("qmap1", "qmap2")  # made by the optimizer, never trained


def decoded(state: Mapping[str, Any], holder: Tensor) -> dict[str, Any]:
    """The state of a tensor with a value for each element in place of its blocks; other state as it is."""
    found = {key: value for key, value in state.items() if key not in UNCHANGED}
    for moment in MOMENTS:
        if f"qmap{moment}" in state:
            magnitudes = _spread(state[f"absmax{moment}"], holder)
            values = state[f"qmap{moment}"][state[f"state{moment}"].long()]
            found[f"state{moment}"], found[f"absmax{moment}"] = values * magnitudes, magnitudes
    return found


def encode(state: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Write what `decoded` gave, overwritten meanwhile, into the state."""
    for key, value in values.items():
        if key not in {f"{name}{moment}" for moment in MOMENTS for name in ("state", "absmax")}:
            state[key] = value
    for moment in MOMENTS:
        if f"qmap{moment}" in state:
            magnitudes, values_of = values[f"absmax{moment}"], values[f"state{moment}"]
            block = _largest(magnitudes, state[f"absmax{moment}"])
            state[f"absmax{moment}"].copy_(block)
            shares = values_of / _spread(block, values_of).clamp(min=torch.finfo(torch.float32).tiny)
            known = state[f"qmap{moment}"]
            borders = (known[1:] + known[:-1]) / 2
            state[f"state{moment}"].copy_(torch.bucketize(shares, borders).to(torch.uint8))


def _spread(blocks: Tensor, like: Tensor) -> Tensor:
    """Each block's number for each of its elements, in the shape of `like`."""
    return blocks.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def _largest(values: Tensor, like: Tensor) -> Tensor:
    """The largest of each block."""
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, like.numel() * BLOCK - flat.numel()))
    return padded.view(like.numel(), BLOCK).amax(dim=1)
