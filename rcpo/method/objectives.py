"""Objectives: losses with their hyper-parameters bound, their running state and the pairs' weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rcpo.method import losses as losses  # registers rcpo's own
from rcpo.method.registry import REDUCTIONS, Specification, names, register, specification
from rcpo.method.types import SIDES, PairLogps

__all__ = ["Objective", "RunningMean", "Specification", "get_objective", "names", "register", "specification"]


class RunningMean:
    """Mean of everything observed up to the last optimizer step: constant inside a step.

    Micro-batches add to `pending` (sum, weight); `step` reduces it over ranks and folds it in.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0
        self._pending: Tensor | None = None

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def observe(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values, each by its weight (None: 1)."""
        values = values.detach().double()
        parts = torch.ones_like(values) if weights is None else weights.double()
        added = torch.stack([(parts * values).sum(), parts.sum()])
        self._pending = added if self._pending is None else self._pending + added

    def step(self, reduce: Callable[[Tensor], Tensor] = lambda x: x, *, keep: bool = True) -> None:
        """Fold in the step's values over all ranks, or drop them where `keep` is false."""
        if keep:
            pending = torch.zeros(2, dtype=torch.float64) if self._pending is None else self._pending
            total, count = reduce(pending).tolist()
            self.total += total
            self.count += count
        self._pending = None

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]


WEIGHTINGS: dict[str, Callable[[PairLogps], Tensor]] = {"wpo": lambda logps: logps.likelihood.detach()}
"""Ways to weight pairs: by how likely the policy itself is to say both responses (WPO, Zhou et al. 2024)."""


class Objective:
    """An objective with its hyper-parameters bound: `PairLogps` → losses (B,).

    `weighting` names one of `WEIGHTINGS` for the loss (not for the supervised term of `nll_coef`);
    `length_alpha` is what the runner weights tokens with beyond a pair's shorter response (LD-DPO).

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
        self.state: RunningMean | RunningMeans | None = None
        if spec.running_mean is not None:
            self.state = RunningMean()
        self.progress = 0.0  # the share of the run that is done
        self.weighting: str | None = None
        self.length_alpha = 1.0

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
    def has_pair_losses(self) -> bool:
        """Whether a pair's loss is its own, whatever its company and its length."""
        return not (self.spec.couples_batch or self.spec.token_weighted)

    @property
    def margin_ranges(self) -> list[tuple[float, tuple[float, float]]]:
        """For each use of the pairs' margins, what they are multiplied by and where the products may lie."""
        if not self.spec.needs_margins:
            return []
        return [(float(self.hyperparameters.get("score_scale", 1.0)), self.spec.margins)]

    @property
    def needs_likelihoods(self) -> bool:
        """Whether the pairs' weights are the policy's own likelihoods."""
        return self.weighting is not None

    @property
    def uses_chosen_means(self) -> bool:
        """Whether the loss depends on the chosen responses' mean log-prob beside z."""
        return self.nll_coef != 0

    @property
    def reductions(self) -> set[str]:
        """The reductions that it works in."""
        return {self.reduction}

    @property
    def sides(self) -> tuple[str, ...]:
        """The responses of a pair that it reads, some of `SIDES` in their order."""
        spec = self.spec
        wanted = (True, spec.needs_rejected, spec.needs_mismatched, spec.needs_gold)
        return tuple(side for side, is_wanted in zip(SIDES, wanted, strict=True) if is_wanted)

    def __call__(self, logps: PairLogps) -> Tensor:
        supplied = {"running_mean": self.state.value} if isinstance(self.state, RunningMean) else {}
        if self.spec.takes_progress:
            supplied["progress"] = self.progress
        losses = self.spec.loss(logps, **self.hyperparameters, **supplied)
        if losses.shape != logps.chosen.shape:
            raise ValueError(
                f"objective {self.name} returned shape {tuple(losses.shape)} for "
                f"{len(logps.chosen)} pairs; one loss a pair is expected"
            )
        return self._complete(losses, logps)

    def _complete(self, losses: Tensor, logps: PairLogps) -> Tensor:
        """The losses with the pairs' own weights and the supervised term."""
        if self.weighting is not None:
            losses = WEIGHTINGS[self.weighting](logps) * losses
        return losses - self.nll_coef * self.chosen_means(logps) if self.nll_coef else losses

    def observe(self, logps: PairLogps) -> None:
        """Add a micro-batch of pairs to the running state, where the objective has one."""
        if isinstance(self.state, RunningMean) and self.spec.running_mean is not None:
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
    weighting: str | None = None,
    length_alpha: float = 1.0,
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
    reduction = reduction or (spec.reduction if spec.make is None else None)
    if reduction == "average":
        reduction = "mean" if spec.reduction == "sum" else spec.reduction
    if reduction is not None and reduction not in REDUCTIONS:
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
    make: Callable[..., Objective] = spec.make or Objective
    made = make(spec, reduction, nll_coef, {**defaults, **hyperparameters})
    _refuse_options(made, weighting, length_alpha)
    made.weighting, made.length_alpha = weighting, length_alpha
    return made


def _refuse_options(objective: Objective, weighting: str | None, length_alpha: float) -> None:
    """Raise ValueError for options that say nothing about this objective."""
    name, spec = objective.name, objective.spec
    if weighting is not None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"objective.weighting={weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if spec.sorts_batch or not spec.needs_rejected:
            why = "sorts the pairs of a batch" if spec.sorts_batch else "has no rejected side"
            raise ValueError(f"objective.weighting={weighting} weights pairs, and objective={name} {why}")
    if length_alpha == 1:
        return
    if objective.reductions != {"sum"} or not spec.needs_rejected:
        raise ValueError(
            f"objective.length_alpha={length_alpha} is defined for the summed log-probs of pairs: set it to "
            f"1, or objective.reduction=sum for objective={name}"
        )
    if objective.uses_chosen_means:
        raise ValueError(
            f"objective.length_alpha={length_alpha} and objective.nll_coef do not go together: the sum is "
            "then not a multiple of the mean; set one of them to its default"
        )


class RunningMeans:
    """The running means of a mixture's parts, None for those without one, as one state."""

    def __init__(self, means: Sequence[Any]) -> None:
        self._means = means

    def step(self, reduce: Callable[[Tensor], Tensor] = lambda x: x, *, keep: bool = True) -> None:
        for mean in filter(None, self._means):
            mean.step(reduce, keep=keep)

    def state_dict(self) -> dict[str, Any]:
        return {str(place): mean.state_dict() for place, mean in enumerate(self._means) if mean is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, mean in enumerate(self._means):
            if mean is not None:
                mean.load_state_dict(state[str(place)])


class Mixture(Objective):
    """Σ of other objectives' losses by their weights: `parts` are mappings of `name`, `weight` and settings.

    Each part works in its own reduction; z is that of the mixture, and a mean is a sum over the length. Every
    pair counts alike, in `sft` too, unless all parts weight by tokens. The rewards are the first part's.

    >>> parts = [{"name": "dpo", "beta": 1.0}, {"name": "simper", "weight": 0.5}]
    >>> get_objective("mix", parts=parts).reduction
    'sum'
    """

    def __init__(
        self, spec: Specification, reduction: str | None, nll_coef: float, hyperparameters: dict[str, Any]
    ) -> None:
        parts = list(enumerate(hyperparameters["parts"]))
        if not parts:
            raise ValueError("objective.parts is empty: give at least one, [{name: dpo, weight: 1}, …]")
        self.parts = [_part(place, settings) for place, settings in parts]
        objectives = [part for _, part in self.parts]
        reductions = {part.reduction for part in objectives}
        usual = "sum" if "sum" in reductions else min(reductions)
        super().__init__(_joined(spec, objectives), reduction or usual, nll_coef, hyperparameters)
        if len({*reductions, self.reduction}) > 1 and "importance" in {*reductions, self.reduction}:
            raise ValueError("objective.parts: reduction=importance goes with no other in a mixture")
        for part in objectives:
            if part.spec.needs_mismatched and part.reduction != self.reduction:
                raise ValueError(
                    f"objective.parts: {part.name} takes reduction={part.reduction}, which "
                    f"objective.reduction={self.reduction} cannot become for mismatched completions; set it"
                )
        states = [part.state for part in objectives]
        self.state = RunningMeans(states) if any(state is not None for state in states) else None

    def __call__(self, logps: PairLogps) -> Tensor:
        total = torch.zeros_like(logps.chosen)
        for weight, part in self.parts:
            part.progress = self.progress
            total = total + weight * part(self._for(part, logps))
        return self._complete(total, logps)

    def observe(self, logps: PairLogps) -> None:
        for _, part in self.parts:
            part.observe(self._for(part, logps))

    @property
    def reductions(self) -> set[str]:
        return {self.reduction, *(part.reduction for _, part in self.parts)}

    @property
    def margin_ranges(self) -> list[tuple[float, tuple[float, float]]]:
        return [use for _, part in self.parts for use in part.margin_ranges]

    @property
    def uses_chosen_means(self) -> bool:
        return self.nll_coef != 0 or any(part.uses_chosen_means for _, part in self.parts)

    @property
    def needs_likelihoods(self) -> bool:
        return self.weighting is not None or any(part.needs_likelihoods for _, part in self.parts)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor | None]:
        first = self.parts[0][1]
        chosen, rejected = first.rewards(self._for(first, logps))
        if rejected is None and logps.rejected is not None:
            return super().rewards(logps)
        return chosen, rejected

    def _for(self, part: Objective, logps: PairLogps) -> PairLogps:
        """The log-probs in a part's own reduction."""
        if part.reduction == self.reduction:
            return logps
        sides = (("chosen", logps.chosen_lengths), ("rejected", logps.rejected_lengths))
        changes = {}
        for side, lengths in sides:
            for name in (side, f"ref_{side}"):
                values: Tensor | None = getattr(logps, name)
                if values is not None:
                    changes[name] = _reduced(values, lengths, self.reduction)
        return logps.replace(**changes)


def _reduced(values: Tensor, lengths: Tensor | None, reduction: str) -> Tensor:
    """Means of sums, or sums of means, by their `reduction`: (B,); what is not there has length 0."""
    if lengths is None:
        raise ValueError("a mixture of sums and means needs PairLogps.chosen_lengths and rejected_lengths")
    length = lengths.to(values).clamp(min=1)
    return values / length if reduction == "sum" else values * length


def _part(place: int, settings: Mapping[str, Any]) -> tuple[float, Objective]:
    own = dict(settings)
    weight = float(own.pop("weight", 1.0))
    if "length_alpha" in own:
        raise ValueError(f"objective.parts[{place}].length_alpha: set objective.length_alpha, for all parts")
    try:
        part = get_objective(**own)
        if isinstance(part, Mixture):
            raise ValueError("a mixture cannot be a part of another; list the inner parts in objective.parts")
        return weight, part
    except (ValueError, TypeError) as error:
        raise ValueError(f"objective.parts[{place}]: {error}") from error


def _joined(spec: Specification, parts: Sequence[Objective]) -> Specification:
    """What the runner has to know of a mixture: all that any of its parts needs."""
    specs = [part.spec for part in parts]
    return replace(
        spec,
        needs_reference=any(one.needs_reference for one in specs),
        needs_rejected=any(one.needs_rejected for one in specs),
        needs_mismatched=any(one.needs_mismatched for one in specs),
        needs_gold=any(one.needs_gold for one in specs),
        couples_batch=any(one.couples_batch for one in specs),
        sorts_batch=any(one.sorts_batch for one in specs),
        takes_unpaired=all(one.takes_unpaired for one in specs),
        token_weighted=all(one.token_weighted for one in specs),
        needs_margins=any(one.needs_margins for one in specs),
    )


@register("mix", reduction="sum", needs_reference=True, make=Mixture)
def _mix(logps: PairLogps, *, parts: Sequence[Mapping[str, Any]] = ()) -> Tensor:
    raise NotImplementedError("a mixture adds up the losses of its parts")
