"""What the engine and the optimizer do beside the model's two passes: operations and bytes, by ZeRO stage.

The figures were counted in DeepSpeed's own code and torch's AdamW on tensors without data, with gradients
that are clipped; `tests/simulation.py` counts them, and a test holds these to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.planner.states import MASTER, Parameter, moments, sub_groups, sums_apart
from rcpo.planner.trace import Work


@dataclass(frozen=True)
class Cost:
    """Operations for each trained tensor, for each of the rank's own, and beside them; bytes for each element
    of all, for each of the rank's own, and for each of all where there are several ranks.
    """

    each: int = 0
    own_each: int = 0
    once: int = 0
    element: int = 0
    own: int = 0
    exchanged: int = 0

    def work(self, trained: Sequence[int], own: int, ranks: int) -> Work:
        """Of tensors of these sizes, of which the rank updates `own` elements."""
        total = sum(trained)
        tensors = max(1, round(len(trained) * own / max(total, 1)))
        exchanged = self.exchanged if ranks > 1 else 0
        operations = self.each * len(trained) + self.own_each * tensors + self.once
        return Work(0, operations, (self.element + exchanged) * total + self.own * own)


@dataclass(frozen=True)
class Costs:
    """Of gradients after each micro-batch, and beside that after all but the first, and after the last.

    That of an update is without the optimizer's own bytes.
    """

    each: Cost
    further: Cost
    last: Cost
    update: Cost


SUMS = Cost(each=1, element=12)  # autograd's own
OWN_SUMS = Cost(each=1, own=12)  # of what a rank keeps
FLAT_UPDATE = Cost(own_each=2, once=53, own=44, exchanged=8)
# ZeRO-0 in fp32, torch's optimizer alone: in one process, and in several
ALONE = Costs(Cost(), SUMS, Cost(), Cost(each=1, once=8, element=12))
PLAIN = Costs(Cost(), SUMS, Cost(each=1, once=4, element=32), Cost(each=1, once=8, element=12))
# ZeRO-1 and 2 in fp32
LATE = Costs(Cost(once=2), SUMS, Cost(each=1, own_each=1, once=3, element=36, own=4), FLAT_UPDATE)
EARLY = Costs(Cost(each=1, own_each=1, once=5, element=36, own=4), OWN_SUMS, Cost(), FLAT_UPDATE)
# ZeRO-1 in bf16: sums of gradients in a buffer of their own
APART = Costs(
    Cost(each=2, element=18),
    Cost(each=1, once=1, element=10),
    Cost(once=3, element=16, exchanged=8),
    Cost(each=2, once=27, element=20, own=6, exchanged=4),
)
# ZeRO-1 with fp16 or offloading, and ZeRO-2 in half precision: each gradient is searched for overflow
CHECKED = Costs(
    Cost(each=1, own_each=2, once=8, element=32, own=22),
    Cost(),
    Cost(),
    Cost(own_each=15, once=56, own=42, exchanged=4),
)
# ZeRO-3, whose linear layers are its own: about one operation more for each tensor
SPLIT = Costs(Cost(each=3, element=28, own=16, exchanged=14), OWN_SUMS, Cost(), Cost(each=2, once=21, own=44))
SPLIT_HALF = Costs(
    Cost(each=3, element=26, own=16, exchanged=7), OWN_SUMS, Cost(), Cost(each=2, once=21, own=42)
)
GROUP = 23  # operations of ZeRO-3's update for each of its groups of parameters


def costs(config: RunConfig, ranks: int) -> Costs:
    """Those of the engine that a configuration makes."""
    half = config.train.dtype != "fp32"
    if config.zero_stage == 0:
        return ALONE if ranks == 1 else PLAIN
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


def reduction(
    config: RunConfig, parameters: Sequence[Parameter], ranks: int, own_elements: int, microbatches: int
) -> Work:
    """What a rank does with the gradients of a step's micro-batches, beside the backward passes."""
    cost, trained = costs(config, ranks), _trained(parameters)

    def work(one: Cost) -> Work:
        return one.work(trained, own_elements, ranks)

    return work(cost.each) * microbatches + work(cost.further) * (microbatches - 1) + work(cost.last)


def update(config: RunConfig, parameters: Sequence[Parameter], ranks: int, own_elements: int) -> Work:
    """The optimizer step of one of the ranks, which updates so many elements."""
    trained = _trained(parameters)
    groups = sub_groups(trained, ranks) if config.zero_stage == 3 else 0
    own = Work(0, GROUP * groups, round(own_elements * optimizer_bytes(config)))
    return costs(config, ranks).update.work(trained, own_elements, ranks) + own


def _trained(parameters: Sequence[Parameter]) -> list[int]:
    return [p.numel for p in parameters if p.trained]
