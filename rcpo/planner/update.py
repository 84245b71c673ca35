"""What the engine and the optimizer do beside the model's two passes: operations and bytes, by ZeRO stage.

The figures were counted in DeepSpeed's own code and torch's AdamW on tensors without data, one process, with
gradients that are clipped; `tests/simulation.py` counts them, and a test holds these to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.planner.states import MASTER, Parameter, moments, sums_apart
from rcpo.planner.trace import Work


@dataclass(frozen=True)
class Cost:
    """Operations for each trained tensor, and beside them; bytes for each element."""

    each: int
    once: int
    element: int

    def work(self, tensors: int, elements: int) -> Work:
        return Work(0, self.each * tensors + self.once, self.element * elements)


@dataclass(frozen=True)
class Costs:
    """Of adding up a micro-batch's gradients, and of an update, without the optimizer's own bytes."""

    reduction: Cost
    update: Cost


# ZeRO-0 in fp32: torch's optimizer alone
PLAIN = Costs(Cost(0, 0, 0), Cost(1, 8, 12))
# ZeRO-1 in bf16: sums of gradients in a buffer of their own
APART = Costs(Cost(2, 3, 34), Cost(2, 27, 26))
# ZeRO-1 and 2 in fp32
FLAT = Costs(Cost(2, 5, 40), Cost(2, 53, 44))
# the same in half precision: each gradient is searched for overflow
CHECKED = Costs(Cost(3, 8, 54), Cost(15, 56, 42))
# ZeRO-3, whose linear layers are its own: about one operation more for each tensor
SPLIT = Costs(Cost(3, 0, 44), Cost(2, 44, 44))
SPLIT_HALF = Costs(Cost(3, 0, 42), Cost(2, 44, 42))


def costs(config: RunConfig) -> Costs:
    """Those of the engine that a configuration makes."""
    half = config.train.dtype != "fp32"
    if config.zero_stage == 0:
        return PLAIN
    if config.zero_stage == 3:
        return SPLIT_HALF if half else SPLIT
    if sums_apart(config):
        return APART
    return CHECKED if half else FLAT


def optimizer_bytes(config: RunConfig) -> float:
    """Bytes of an element in the optimizer's own pass.

    Gradient, weight and moments are read, all but the gradient written.
    """
    return MASTER * (3 + 2 * moments(config))


def reduction(config: RunConfig, parameters: Sequence[Parameter]) -> Work:
    """What the engine adds to the backward pass of a micro-batch."""
    trained = [p.numel for p in parameters if p.trained]
    return costs(config).reduction.work(len(trained), sum(trained))


def update(config: RunConfig, parameters: Sequence[Parameter], own_elements: int) -> Work:
    """The optimizer step of a rank that updates so many elements, after its last backward pass."""
    tensors = sum(p.trained for p in parameters)
    own = Work(0, 0, round(own_elements * optimizer_bytes(config)))
    return costs(config).update.work(tensors, own_elements) + own
