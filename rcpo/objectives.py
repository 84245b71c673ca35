"""Objectives: losses with their hyper-parameters bound, their running state and the pairs' weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rcpo import losses as losses  # registers rcpo's own
from rcpo.registry import REDUCTIONS, Specification, names, register, specification
from rcpo.types import PairLogps

__all__ = ["Objective", "RunningMean", "Specification", "get_objective", "names", "register", "specification"]


class RunningMean:
    """Mean of everything observed up to the last optimizer step: constant inside a step.

    Micro-batches add to `pending` (sum, weight); `step` reduces it over ranks and folds it in.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0
        self._pending = [0.0, 0.0]

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def observe(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Adds values, each by its weight (None: 1)."""
        values = values.detach().double()
        parts = torch.ones_like(values) if weights is None else weights.double()
        self._pending[0] += float((parts * values).sum())
        self._pending[1] += float(parts.sum())

    def step(self, reduce: Callable[[Tensor], Tensor] = lambda x: x, *, keep: bool = True) -> None:
        """Folds in the step's values over all ranks, or drops them where `keep` is false."""
        if keep:
            total, count = reduce(torch.tensor(self._pending, dtype=torch.float64)).tolist()
            self.total += total
            self.count += count
        self._pending = [0.0, 0.0]

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]


class Objective:
    """An objective with its hyper-parameters bound: `PairLogps` → losses (B,).

    >>> get_objective("ipo", tau=0.2)
    ipo(tau=0.2, reduction=mean, nll_coef=0.0)
    """

    def __init__(
        self, spec: Specification, reduction: str, nll_coef: float, hyperparameters: dict[str, Any]
    ) -> None:
        self.spec = spec
        self.reduction = reduction
        self.nll_coef = nll_coef
        self.hyperparameters = hyperparameters
        self.state = RunningMean() if spec.running_mean is not None else None
        self.progress = 0.0  # the share of the run that is done

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.hyperparameters.items())
        return f"{self.spec.name}({settings}, reduction={self.reduction}, nll_coef={self.nll_coef})"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def needs_reference(self) -> bool:
        return self.spec.needs_reference

    @property
    def needs_rejected(self) -> bool:
        return self.spec.needs_rejected

    @property
    def sorts_batch(self) -> bool:
        """Whether the losses are not in the pairs' order."""
        return self.spec.sorts_batch

    @property
    def margin_scale(self) -> float | None:
        """What the pairs' margins are multiplied by; None where the loss takes no margins."""
        return float(self.hyperparameters.get("score_scale", 1.0)) if self.spec.needs_margins else None

    @property
    def sides(self) -> int:
        """Sequences a pair: chosen, rejected, mismatched."""
        return 1 + self.needs_rejected + self.spec.needs_mismatched

    def __call__(self, logps: PairLogps) -> Tensor:
        supplied: dict[str, float] = {} if self.state is None else {"running_mean": self.state.value}
        if self.spec.takes_progress:
            supplied["progress"] = self.progress
        losses = self.spec.loss(logps, **self.hyperparameters, **supplied)
        if losses.shape != logps.chosen.shape:
            raise ValueError(
                f"objective {self.name} returned shape {tuple(losses.shape)} for "
                f"{len(logps.chosen)} pairs; one loss a pair is expected"
            )
        return losses - self.nll_coef * self.chosen_means(logps) if self.nll_coef else losses

    def observe(self, logps: PairLogps) -> None:
        """Adds a micro-batch of pairs to the running state, where the objective has one."""
        if self.state is not None and self.spec.running_mean is not None:
            values = self.spec.running_mean(logps, **self.hyperparameters)  # (B,), or side after side
            self.state.observe(values, logps.pair_weights.repeat(len(values) // len(logps.chosen)))

    def mean_slope(self, logps: PairLogps) -> Tensor | float:
        """∂ mean log-prob / ∂ z: 1 / length for sums, 1 for means."""
        if self.reduction != "sum":
            return 1.0
        if logps.chosen_lengths is None:
            raise ValueError("objective.nll_coef on summed log-probs needs PairLogps.chosen_lengths")
        return 1.0 / logps.chosen_lengths.to(logps.chosen)

    def chosen_means(self, logps: PairLogps) -> Tensor:
        """Mean log-prob a token of the chosen responses, shape (B,)."""
        return logps.chosen_means if logps.chosen_means is not None else logps.chosen * self.mean_slope(logps)

    def weights(self, logps: PairLogps) -> Tensor:
        """Each pair's weight in the batch mean, shape (B,), before normalisation."""
        if not self.spec.token_weighted:
            return logps.pair_weights
        if logps.chosen_lengths is None:
            raise ValueError(f"objective {self.name} needs PairLogps.chosen_lengths")
        return logps.pair_weights * logps.chosen_lengths.to(logps.chosen)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor | None]:
        """Implicit rewards β u, or β z without a reference (β = 1 where there is none), shape (B,) each."""
        beta = self.hyperparameters.get("beta", 1.0)
        if self.needs_reference:
            chosen = beta * logps.chosen_logratios
            return chosen, None if logps.rejected is None else beta * logps.rejected_logratios
        return beta * logps.chosen, None if logps.rejected is None else beta * logps.rejected


def get_objective(
    name: str,
    *,
    reduction: str | None = None,
    nll_coef: float = 0.0,
    module: str | None = None,
    optional: Collection[str] = (),
    **hyperparameters: Any,
) -> Objective:
    """The objective `name` with hyper-parameters, e.g. `get_objective("simpo", beta=2.0, gamma=1.0)`.

    The reduction `average` is the objective's own if that is an average over tokens, else the mean. The
    hyper-parameters named in `optional` are left out where the objective does not have them.

    Raises ValueError for an unknown name, reduction or hyper-parameter.

    >>> objective = get_objective("dpo", beta=1.0)
    >>> even = torch.zeros(2)
    >>> objective(PairLogps(even, even, even, even))  # −log σ(0) = log 2
    tensor([0.6931, 0.6931])
    """
    spec = specification(name, module)
    reduction = reduction or spec.reduction
    if reduction == "average":
        reduction = "mean" if spec.reduction == "sum" else spec.reduction
    if reduction not in REDUCTIONS:
        raise ValueError(f"objective.reduction={reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if nll_coef and reduction == "importance":
        raise ValueError("objective.nll_coef is not defined for objective.reduction=importance; set it to 0")
    defaults = spec.hyperparameters
    for key in [key for key in optional if key not in defaults]:
        hyperparameters.pop(key, None)
    for key in hyperparameters:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(defaults) or 'none'}"
            raise ValueError(f"objective {name} has no hyper-parameter {key!r}; {hint}")
    return Objective(spec, reduction, nll_coef, {**defaults, **hyperparameters})
