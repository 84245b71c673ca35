"""The registry of preference objectives: what the runner knows of each beside its loss."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

REDUCTIONS = ("sum", "mean", "importance")

SUPPLIED = ("running_mean", "progress")
"""Keywords of a loss that the runner fills in: no hyper-parameters."""

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Specification:
    """What the runner knows of an objective beside its loss.

    `couples_batch`: a pair's loss depends on the other pairs of its micro-batch, so it is not invariant under
    another split of the global batch. `sorts_batch`: the losses are not in the pairs' order, so that a pair's
    weight has no place. `running_mean(logps, beta=…)`: values whose mean over all pairs seen so far is handed
    to the loss as `running_mean`; a loss with the keyword `progress` gets the share of the run that is done.
    `token_weighted`: pairs count by their response tokens in the batch mean. `takes_unpaired`: a side that a
    pair lacks (length 0) has no part in its loss. `needs_gold`: each pair has to have a third answer, whose
    `gold_means` the loss reads. `needs_margins`: the responses have to be scored, and `score_scale` times
    their margin has to lie inside `margins`. `make` is the class of the objective, where
    that is more than a loss with its hyper-parameters.
    """

    name: str
    loss: Loss
    reduction: str
    needs_reference: bool
    needs_rejected: bool = True
    needs_mismatched: bool = False
    needs_gold: bool = False
    takes_unpaired: bool = False
    needs_margins: bool = False
    margins: tuple[float, float] = (-math.inf, math.inf)
    couples_batch: bool = False
    sorts_batch: bool = False
    token_weighted: bool = False
    running_mean: Loss | None = None
    make: Callable[..., Any] | None = None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Keyword-only parameters of the loss with their defaults, without those of `SUPPLIED`."""
        return {name: value for name, value in self._keywords.items() if name not in SUPPLIED}

    @property
    def takes_progress(self) -> bool:
        """Whether the loss changes as the run goes on."""
        return "progress" in self._keywords

    @property
    def _keywords(self) -> dict[str, Any]:
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


_REGISTRY: dict[str, Specification] = {}


def register(
    name: str, *, reduction: str, needs_reference: bool, **properties: Any
) -> Callable[[Loss], Loss]:
    """Decorator that makes a loss function selectable as `objective=NAME`; see `Specification`.

    >>> @register("shy_hinge", reduction="mean", needs_reference=False)
    ... def shy_hinge(logps: PairLogps, *, gamma: float = 1.0) -> Tensor:
    ...     return (gamma - (logps.chosen - logps.losers)).relu()
    >>> get_objective("shy_hinge")(PairLogps(torch.tensor([-1.0]), torch.tensor([-1.5])))
    tensor([0.5000])
    >>> del _REGISTRY["shy_hinge"]
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"objective {name}: reduction={reduction!r}; choose one of {', '.join(REDUCTIONS)}")

    def add(loss: Loss) -> Loss:
        known = _REGISTRY.get(name)
        if known is not None and (known.loss.__module__, known.loss.__qualname__) != (
            loss.__module__,
            loss.__qualname__,
        ):
            raise ValueError(f"objective {name!r} is registered already, by {known.loss.__module__}")
        _REGISTRY[name] = Specification(name, loss, reduction, needs_reference, **properties)
        return loss

    return add


def specification(name: str, module: str | None = None) -> Specification:
    """The registered objective `name`; `module` is imported first (a user's own package)."""
    if module is not None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"objective.module={module} cannot be imported: {error}") from error
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_REGISTRY))}"
        raise ValueError(f"objective.name={name!r} is not registered; {hint}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered objectives."""
    return sorted(_REGISTRY)
