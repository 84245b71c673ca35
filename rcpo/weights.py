"""The policy's weights out of a checkpoint's shards, whatever the ZeRO stage and the number of ranks.

Read here, on the CPU, because DeepSpeed's own converter executes what the files hold.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcpo.checkpoint import SHARDS, first_problem
from rcpo.config import ConfigError
from rcpo.engine import ShardFiles

WHOLE = "mp_rank_00_model_states.pt"
PARTS = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
MASTERS = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Weights by their names in the policy, from `checkpoints/step-N/`: under ZeRO-3 the fp32 masters.

    Raises ConfigError for a damaged checkpoint and for a file that holds more than tensors.
    """
    problem = first_problem(folder)
    if problem is not None:
        raise ConfigError(f"{folder} is damaged: {problem}; evaluate another checkpoint")
    shards = folder / SHARDS
    if (shards / WHOLE).is_file():
        whole: dict[str, Tensor] = _load(shards / WHOLE)["module"]
        return whole
    return _merge(shards)


def _load(path: Path) -> Any:
    return ShardFiles().load(str(path), map_location="cpu")


def _merge(shards: Path) -> dict[str, Tensor]:
    """ZeRO-3: each rank holds an equal piece of every parameter, padded at its end, all in flat groups."""
    ranks = len(list(shards.glob(PARTS.format("*"))))
    models = [_load(shards / PARTS.format(rank)) for rank in range(ranks)]
    optimizers = [_load(shards / MASTERS.format(rank))["optimizer_state_dict"] for rank in range(ranks)]
    flat = [torch.cat([group.flatten() for group in state["fp32_flat_groups"]]) for state in optimizers]
    first = models[0]
    weights = {name: value for name, value in first["module"].items() if name in first["buffer_names"]}
    start = 0
    for name, shape in (item for group in first["param_shapes"] for item in group.items()):
        piece = math.ceil(shape.numel() / ranks)
        padded = torch.cat([part[start : start + piece] for part in flat])
        weights[name] = padded[: shape.numel()].view(shape)
        start += piece
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        padded = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        weights[name] = padded[: shape.numel()].view(shape)
    for copy, original in dict(first["shared_params"]).items():
        weights[copy] = weights[original]
    return weights
