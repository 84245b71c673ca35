"""What a rank holds of each trained parameter in fp32, with its optimizer state, under every ZeRO stage.

DeepSpeed keeps them as the parameters themselves (stage 0), as one flat partition of all (stages 1 and 2) or
as flat groups of each parameter's partition (stage 3). Pieces describe all three alike, so that what one
layout wrote any other can read. Labels are NAME|KEY@START.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcpo.engine.eightbit import decoded, encode
from rcpo.errors import ConfigError

PERSISTS = "stage3_param_persistence_threshold"  # DeepSpeed's name for it
WEIGHT = "fp32"  # the key of the weights themselves; the others are the optimizer's own


@dataclass(frozen=True)
class Piece:
    """Elements `start` … of a flattened parameter: `size` ones that lie at `offset` of the flattened holder.

    The holder is what the optimizer steps.
    """

    name: str
    start: int
    size: int
    holder: Tensor
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The piece (size,) of a tensor of the holder's shape, as a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.size]

    def share(self, rank: int, ranks: int) -> Piece:
        """The part that one of `ranks` writes where all of them hold the same."""
        first, last = self.size * rank // ranks, self.size * (rank + 1) // ranks
        return replace(self, start=self.start + first, size=last - first, offset=self.offset + first)

    def label(self, key: str) -> str:
        return f"{self.name}|{key}@{self.start}"


def longest_vector(model: nn.Module) -> int:
    """The elements of a model's longest norm or bias: what is not longer stays whole under ZeRO-3.

    A gather of a norm costs its latency; all of a 7B model's together take half a megabyte.
    """
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    return max((math.prod(shape) for shape in shapes if len(shape) <= 1), default=0)


def parse_label(label: str) -> tuple[str, str, int]:
    """Name, key and start; raises ValueError for text that is not a label."""
    name, _, rest = label.rpartition("|")
    key, _, start = rest.rpartition("@")
    return name, key, int(start)


def find_pieces(engine: Any) -> list[Piece]:
    """This rank's pieces of the trained parameters of a DeepSpeed engine."""
    optimizer = engine.optimizer
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if engine.zero_optimization_partition_weights():
        return [_stage3(optimizer, name, parameter) for name, parameter in named]
    if engine.zero_optimization():
        found = (_flat(engine.basic_optimizer, name, parameter) for name, parameter in named)
        return [piece for piece in found if piece is not None]
    return [Piece(name, 0, p.numel(), p) for name, p in named]


def _stage3(optimizer: Any, name: str, parameter: Any) -> Piece:
    """Equal partitions of each parameter, the last ones padded."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(size * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
    real = min(size, parameter.ds_numel - start)
    return Piece(name, start, real, optimizer.fp32_partitioned_groups_flat[group], offset)


def _flat(optimizer: torch.optim.Optimizer, name: str, parameter: Any) -> Piece | None:
    """A range of all parameters in a row, which may hold none of this one."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (holder,) = optimizer.param_groups[mapping.param_group_index]["params"]
    there = mapping.hp_fragment_address
    return Piece(name, mapping.lp_fragment_address.start, there.numel, holder, there.start)


def publish(engine: Any) -> None:
    """Give the model the weights that are in the holders. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization():
        optimizer.update_lp_params()


def collect(pieces: list[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state of the pieces by label, as views (size,); single numbers as (1,)."""
    found: dict[str, Tensor] = {}
    states: dict[int, dict[str, Any]] = {}
    for piece in (piece for piece in pieces if piece.size):
        found[piece.label(WEIGHT)] = piece.of(piece.holder)
        if id(piece.holder) not in states:
            states[id(piece.holder)] = decoded(optimizer.state.get(piece.holder, {}), piece.holder)
        for key, value in states[id(piece.holder)].items():
            if value is not None:
                tensor = torch.as_tensor(value)
                found[piece.label(key)] = piece.of(tensor) if _partitioned(piece, tensor) else tensor.view(1)
    return found


class Saved(Protocol):
    """What `collect` gave, of all ranks together; both give None for a key that a parameter has not."""

    def values(self, name: str, key: str, start: int, size: int) -> Tensor | None: ...
    def number(self, name: str, key: str) -> float | None: ...


def restore(pieces: list[Piece], optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Overwrite weights and optimizer state by what was saved; state that it lacks starts from zero."""
    holders = list({id(piece.holder): piece.holder for piece in pieces}.values())
    _make_state(holders, optimizer)
    states = {id(holder): decoded(optimizer.state[holder], holder) for holder in holders}
    for piece in pieces:
        weights = saved.values(piece.name, WEIGHT, piece.start, piece.size)
        if weights is None:
            raise ConfigError(f"resume: the checkpoint has no parameter {piece.name}")
        piece.of(piece.holder).copy_(weights)
        state = states[id(piece.holder)]
        for key, value in state.items():
            if isinstance(value, Tensor) and _partitioned(piece, value):
                values = saved.values(piece.name, key, piece.start, piece.size)
                piece.of(value).copy_(torch.zeros(()) if values is None else values)
            elif value is not None:
                number = saved.number(piece.name, key) or 0
                state[key] = value.fill_(number) if isinstance(value, Tensor) else type(value)(number)
    for holder in holders:
        encode(optimizer.state[holder], states[id(holder)])


def _partitioned(piece: Piece, value: Tensor) -> bool:
    """Whether a state tensor has a value for each element; else it is one number."""
    return value.shape == piece.holder.shape


def _make_state(holders: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Has the optimizer make its state, as it makes it itself: by a step with gradients of zero."""
    groups, kept = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    gradients = [holder.grad for holder in holders]
    for group in groups:
        group["params"] = []
    groups[0]["params"] = holders
    for holder in holders:
        holder.grad = torch.zeros_like(holder)
    optimizer.step()
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    for group, parameters in zip(groups, kept, strict=True):
        group["params"] = parameters
