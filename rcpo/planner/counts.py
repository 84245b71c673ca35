"""Operations and bytes of a micro-batch: what a GPU has to start, and what it has to move.

The policy's own code runs on fake tensors, with two and with three decoder layers; the difference is what
each further one adds. Views start nothing; other operations read their operands and write their results once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcpo.method.geometry import ON_GPU, Sketch
from rcpo.models.policy import Policy
from rcpo.planner.trace import Rows, fake_weights, inputs

FREE = ("detach", "empty", "alias", "lift_fresh", "prim")  # in names of operations that compute nothing


@dataclass(frozen=True)
class Count:
    """Operations that a device starts, and the bytes that they read and write."""

    operations: int
    bytes: int

    def deeper(self, one_more: Count, layers: int) -> Count:
        """The count with so many layers more, given that of a model with one more."""
        return Count(
            self.operations + layers * (one_more.operations - self.operations),
            self.bytes + layers * (one_more.bytes - self.bytes),
        )


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in str(func) for name in FREE):
            self.operations += 1
            values = [v for v in tree_leaves((args, kwargs, result)) if isinstance(v, Tensor)]
            self.bytes += sum(value.numel() * value.element_size() for value in values)
        return result

    def take(self) -> Count:
        """What was counted since the last call."""
        found = Count(self.operations, self.bytes)
        self.operations = self.bytes = 0
        return found


def counts(
    policy_of: Callable[[int], Policy], rows: Rows, sketch: int | None, *, depth: int
) -> dict[str, Count]:
    """The forward and the backward pass of a micro-batch, recomputation included, of a model `depth` deep.

    `policy_of` makes a policy of so many layers.
    """
    two, three = (_count(policy_of(layers), rows, sketch) for layers in (2, 3))
    return {phase: two[phase].deeper(three[phase], depth - 2) for phase in two}


def _count(policy: Policy, rows: Rows, sketch: int | None) -> dict[str, Count]:
    policy.passes = ON_GPU
    with fake_weights(policy):
        shapes = None if sketch is None else Sketch(policy.vocabulary, sketch)
        with _Counter() as counter:
            policy.train()
            logps = policy(**inputs(rows), sketch=shapes)[0]
            forward = counter.take()
            logps.sum().backward()
            return {"forward": forward, "backward": counter.take()}
