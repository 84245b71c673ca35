"""What lives between and before optimizer steps: bytes of weights, gradients and optimizer, on each rank.

These are DeepSpeed's own tensors, counted by its rules for each ZeRO stage; tests hold them to a running
engine's, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rcpo.config.schema import RunConfig

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER = 4  # bytes of an element that the optimizer updates, and of each of its moments
SUM = 4  # bytes of an element of the gradients that are added up, and sent
BLOCK, SMALLEST = 256, 4096  # elements of a block in 8 bits, and of the smallest tensor that has them
SUB_GROUP = 1_000_000_000  # elements of a rank that ZeRO-3 updates at a time: DeepSpeed's default


@dataclass(frozen=True)
class Parameter:
    """A parameter by name: its elements, and whether it is trained."""

    name: str
    numel: int
    trained: bool = True


@dataclass(frozen=True)
class States:
    """Bytes on one rank; `gradients` are those just before the optimizer steps."""

    weights: int
    gradients: int
    optimizer: int


def plain(config: RunConfig) -> bool:
    """Whether torch's optimizer works on the model's own weights: ZeRO-0 in fp32."""
    return config.zero_stage == 0


def sums_apart(config: RunConfig) -> bool:
    """Whether gradients are added up in a buffer of their own that always stands: ZeRO-1 in bf16."""
    apart = config.zero_stage == 1 and config.train.dtype == "bf16"
    return apart and not config.engine.offload_optimizer


def moments(config: RunConfig) -> float:
    """Tensors of a weight's size in fp32 that the optimizer keeps for it."""
    if config.optim.name == "sgd":
        return int(config.optim.momentum > 0)
    return 0.5 if config.optim.name.endswith("8bit") else 2


def moment_bytes(config: RunConfig, holders: Sequence[int]) -> int:
    """Bytes of the moments of tensors of so many elements.

    Those of bitsandbytes in 8 bits have a magnitude for each block and share a map for each moment; tensors
    of fewer elements than `SMALLEST` are left in fp32.
    """
    if not config.optim.name.endswith("8bit"):
        return MASTER * round(moments(config)) * sum(holders)
    small = sum(numel for numel in holders if numel < SMALLEST)
    large = [numel for numel in holders if numel >= SMALLEST]
    magnitudes = sum(-(-numel // BLOCK) for numel in large)
    return 2 * (MASTER * small + sum(large) + MASTER * magnitudes + (MASTER * 256 if large else 0))


def states(parameters: Sequence[Parameter], config: RunConfig, ranks: int, rank: int = 0) -> States:
    """The bytes of one rank of `ranks`."""
    element, stage = ELEMENT[config.train.dtype], config.zero_stage
    trained = [p.numel for p in parameters if p.trained]
    frozen = sum(p.numel for p in parameters if not p.trained)
    steps = MASTER if config.optim.name == "adamw" else 0  # AdamW counts the steps of each tensor
    if stage == 0:
        total = sum(trained)
        optimizer = moment_bytes(config, trained) + steps * len(trained)
        return States(element * (total + frozen), SUM * total, optimizer)
    if stage == 3:
        total = sum(partition(numel, ranks) for numel in trained)
        still = sum(partition(p.numel, ranks) for p in parameters if not p.trained)
        groups = list(_sub_groups(trained, ranks))
        optimizer = MASTER * total + moment_bytes(config, groups) + steps * len(groups)
        return States(element * (total + still), SUM * total, optimizer)
    flat = flat_elements(trained, ranks)
    own = flat // ranks
    optimizer = MASTER * own + moment_bytes(config, [own]) + steps
    if sums_apart(config):
        gradients = element * sum(trained) + SUM * flat
    elif stage == 2 and element != SUM:
        gradients = SUM * own
    else:
        gradients = SUM * reduced_elements(trained, ranks, rank)
    return States(element * (flat + frozen), gradients, optimizer)


def partition(numel: int, ranks: int) -> int:
    """A rank's elements of a parameter under ZeRO-3: equal pieces, the last one padded."""
    return -(-numel // ranks)


def flat_elements(trained: Sequence[int], ranks: int) -> int:
    """Elements of the one buffer that holds all trained weights under ZeRO-1 and 2, padded for its pieces."""
    unit = 2 * ranks
    return -(-sum(trained) // unit) * unit


def reduced_elements(trained: Sequence[int], ranks: int, rank: int) -> int:
    """Elements of the reduced gradients that a rank keeps under ZeRO-1 and 2.

    Parameters at its piece's borders are kept whole, and the last piece's padding is a gradient too.
    """
    own = flat_elements(trained, ranks) // ranks
    first, last = rank * own, (rank + 1) * own
    kept, start = 0, 0
    for numel in trained:
        if start < last and start + numel > first:
            kept += numel
        start += numel
    return kept + max(0, min(own, last - max(start, first)))


def sub_groups(trained: Sequence[int], ranks: int) -> int:
    """The groups of parameters that ZeRO-3 updates one after the other."""
    return len(list(_sub_groups(trained, ranks)))


def _sub_groups(trained: Sequence[int], ranks: int) -> Iterator[int]:
    size = 0
    for numel in trained:
        size += partition(numel, ranks)
        if size >= SUB_GROUP:
            yield size
            size = 0
    if size:
        yield size
