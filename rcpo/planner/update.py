"""What the engine and the optimizer do beside the model's two passes: operations and bytes, by ZeRO stage.

The figures were counted in DeepSpeed's own code and torch's AdamW on tensors without data, one process, with
gradients that are clipped; `tests/simulation.py` counts them, and a test holds these to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.planner.states import MASTER, Parameter, moments, sub_groups, sums_apart
from rcpo.planner.trace import Work


@dataclass(frozen=True)
class Cost:
    """Operations for each trained tensor, and beside them; bytes for each element."""

    each: int
    once: int
    element: int

    def work(self, tensors: int, elements: int) -> Work:
        return Work(0, self.each * tensors + self.once, self.element * elements)


NOTHING = Cost(0, 0, 0)


@dataclass(frozen=True)
class Costs:
    """Of gradients after each micro-batch, and beside that after all but the first, and after the last.

    That of an update is without the optimizer's own bytes.
    """

    each: Cost
    further: Cost
    last: Cost
    update: Cost


SUMS = Cost(1, 0, 12)  # autograd's own
# ZeRO-0 in fp32: torch's optimizer alone
PLAIN = Costs(NOTHING, SUMS, NOTHING, Cost(1, 8, 12))
# ZeRO-1 and 2 in fp32
LATE = Costs(Cost(0, 2, 0), SUMS, Cost(2, 3, 40), Cost(2, 53, 44))
EARLY = Costs(Cost(2, 5, 40), SUMS, NOTHING, Cost(2, 53, 44))
# ZeRO-1 in bf16: sums of gradients in a buffer of their own
APART = Costs(Cost(2, 0, 18), Cost(1, 1, 10), Cost(0, 3, 16), Cost(2, 27, 26))
# ZeRO-1 with fp16 or offloading, and ZeRO-2 in half precision: each gradient is searched for overflow
CHECKED = Costs(Cost(3, 8, 54), NOTHING, NOTHING, Cost(15, 56, 42))
# ZeRO-3, whose linear layers are its own: about one operation more for each tensor
SPLIT = Costs(Cost(3, 0, 44), SUMS, NOTHING, Cost(2, 21, 44))
SPLIT_HALF = Costs(Cost(3, 0, 42), SUMS, NOTHING, Cost(2, 21, 42))
GROUP = 23  # operations of ZeRO-3's update for each of its groups of parameters


def costs(config: RunConfig) -> Costs:
    """Those of the engine that a configuration makes."""
    half = config.train.dtype != "fp32"
    if config.zero_stage == 0:
        return PLAIN
    if config.zero_stage == 3:
        return SPLIT_HALF if half else SPLIT
    if sums_apart(config):
        return APART
    if half:
        return CHECKED
    return LATE if config.zero_stage == 1 else EARLY


def optimizer_bytes(config: RunConfig) -> float:
    """Bytes of an element in the optimizer's own pass.

    Gradient, weight and moments are read, all but the gradient written.
    """
    return MASTER * (3 + 2 * moments(config))


def reduction(config: RunConfig, parameters: Sequence[Parameter], microbatches: int) -> Work:
    """What is done with the gradients of a step's micro-batches, beside the backward passes."""
    trained, cost = _trained(parameters), costs(config)
    each, further, last = (
        one.work(len(trained), sum(trained)) for one in (cost.each, cost.further, cost.last)
    )
    return each * microbatches + further * (microbatches - 1) + last


def update(config: RunConfig, parameters: Sequence[Parameter], ranks: int, own_elements: int) -> Work:
    """The optimizer step of one of the ranks, which updates so many elements."""
    trained = _trained(parameters)
    groups = sub_groups(trained, ranks) if config.zero_stage == 3 else 0
    own = Work(0, GROUP * groups, round(own_elements * optimizer_bytes(config)))
    return costs(config).update.work(len(trained), own_elements) + own


def _trained(parameters: Sequence[Parameter]) -> list[int]:
    return [p.numel for p in parameters if p.trained]
