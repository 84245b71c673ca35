"""Preference objectives: pure functions from log-probs of B pairs to B losses, and their registry.

Notation (arXiv 2604.18239): z = log π(y|x) in the objective's reduction, r the same under the reference,
u = z − r, m = u_w − u_l, Δ = z_w − z_l; subscripts w chosen, l rejected. Every function takes a `PairLogps`
and returns losses of shape (B,). Properties that the runner must know (needs_reference, …) are declared
beside the function; no code anywhere branches on an objective's name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.types import PairLogps

REDUCTIONS = ("sum", "mean", "importance")

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Specification:
    """What the runner knows of an objective beside its loss.

    `couples_batch`: a pair's loss depends on the other pairs of its micro-batch, so it is not invariant under
    another split of the global batch. `sorts_batch`: the losses are not in the pairs' order, so that a pair's
    weight has no place. `running_mean(logps, beta=…)`: values whose mean over all pairs seen so
    far is handed to the loss as `running_mean`. `token_weighted`: pairs count by their response tokens in the
    batch mean. `takes_unpaired`: a side that a pair lacks (length 0) has no part in its loss.
    """

    name: str
    loss: Loss
    reduction: str
    needs_reference: bool
    needs_rejected: bool = True
    needs_mismatched: bool = False
    takes_unpaired: bool = False
    couples_batch: bool = False
    sorts_batch: bool = False
    token_weighted: bool = False
    running_mean: Loss | None = None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Keyword-only parameters of the loss with their defaults, the running mean excepted."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "running_mean"
        }


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
        importlib.import_module(module)
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_REGISTRY))}"
        raise ValueError(f"objective.name={name!r} is not registered; {hint}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered objectives."""
    return sorted(_REGISTRY)


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
    def sides(self) -> int:
        """Sequences a pair: chosen, rejected, mismatched."""
        return 1 + self.needs_rejected + self.spec.needs_mismatched

    def __call__(self, logps: PairLogps) -> Tensor:
        state = {} if self.state is None else {"running_mean": self.state.value}
        losses = self.spec.loss(logps, **self.hyperparameters, **state)
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


# --- with a reference ---------------------------------------------------------------------------------------


def _margin(logps: PairLogps) -> Tensor:
    return logps.chosen_logratios - logps.rejected_logratios


@register("dpo", reduction="sum", needs_reference=True)
def dpo(logps: PairLogps, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """−logσ(βm), Rafailov et al. 2023; label smoothing ε gives conservative DPO (Mitchell 2023)."""
    x = beta * _margin(logps)
    return -(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)


@register("robust", reduction="sum", needs_reference=True)
def robust(logps: PairLogps, *, beta: float = 0.1, epsilon: float = 0.1) -> Tensor:
    """[−(1−ε)logσ(βm) + ε logσ(−βm)]/(1−2ε), Chowdhury et al. 2024: unbiased under flips with rate ε."""
    x = beta * _margin(logps)
    return (-(1 - epsilon) * F.logsigmoid(x) + epsilon * F.logsigmoid(-x)) / (1 - 2 * epsilon)


@register("ipo", reduction="mean", needs_reference=True)
def ipo(logps: PairLogps, *, tau: float = 0.1) -> Tensor:
    """(m − 1/(2τ))², Azar et al. 2023."""
    return (_margin(logps) - 1 / (2 * tau)).square()


@register("hinge", reduction="sum", needs_reference=True)
def hinge(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 − βm), the hinge on DPO's margin (RSO, Liu et al. 2023)."""
    return torch.relu(1 - beta * _margin(logps))


@register("exo", reduction="sum", needs_reference=True)
def exo(logps: PairLogps, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """KL(σ(βm) ‖ 1−ε) over the pair, Ji et al. 2024."""
    x = beta * _margin(logps)
    chosen = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-epsilon))
    return chosen + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(epsilon))


@register("nca", reduction="sum", needs_reference=True)
def nca(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """−logσ(βu_w) − ½logσ(−βu_w) − ½logσ(−βu_l), Chen et al. 2024."""
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _both_rewards(logps: PairLogps, *, beta: float) -> Tensor:
    return beta * torch.cat([logps.chosen_logratios, logps.rejected_logratios])


@register("bco", reduction="sum", needs_reference=True, running_mean=_both_rewards)
def bco(logps: PairLogps, *, beta: float = 0.1, running_mean: float = 0.0) -> Tensor:
    """−logσ(βu_w − δ) − logσ(δ − βu_l), δ the running mean of both rewards, Jung et al. 2024."""
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    return -F.logsigmoid(chosen - running_mean) - F.logsigmoid(running_mean - rejected)


@register("sppo", reduction="sum", needs_reference=True)
def sppo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """(u_w − 1/(2β))² + (u_l + 1/(2β))², Wu et al. 2024 with hard labels."""
    target = 1 / (2 * beta)
    return (logps.chosen_logratios - target).square() + (logps.rejected_logratios + target).square()


@register("aot", reduction="sum", needs_reference=True, couples_batch=True, sorts_batch=True)
def aot(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """−logσ(β[sort Δ − sort Δ_ref]), Melnyk et al. 2024 (paired); sorts within the micro-batch."""
    delta = logps.chosen - logps.losers
    reference = delta - _margin(logps)
    return -F.logsigmoid(beta * (delta.sort().values - reference.sort().values))


@register("aot_unpaired", reduction="sum", needs_reference=True, couples_batch=True, sorts_batch=True)
def aot_unpaired(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """−logσ(β[sort u_w − sort u_l]), Melnyk et al. 2024 (unpaired); sorts within the micro-batch."""
    chosen, rejected = logps.chosen_logratios.sort().values, logps.rejected_logratios.sort().values
    return -F.logsigmoid(beta * (chosen - rejected))


@register("apo_zero", reduction="sum", needs_reference=True)
def apo_zero(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """1 − σ(βu_w) + σ(βu_l), D'Oosterlinck et al. 2024: raises winners, lowers losers."""
    return 1 - (beta * logps.chosen_logratios).sigmoid() + (beta * logps.rejected_logratios).sigmoid()


@register("apo_down", reduction="sum", needs_reference=True)
def apo_down(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """σ(βu_w) + 1 − σ(βm), D'Oosterlinck et al. 2024: lowers both, losers more."""
    return (beta * logps.chosen_logratios).sigmoid() + 1 - (beta * _margin(logps)).sigmoid()


@register("discopop", reduction="sum", needs_reference=True)
def discopop(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """x = βm, s = σ(x/0.05): −(1−s)logσ(x) + s e^(−x), Lu et al. 2024 (log-ratio modulated loss)."""
    x = beta * _margin(logps)
    gate = x / 0.05
    # s e^(−x) as one exponential: e^(−x) alone overflows where s is 0
    return -(-gate).sigmoid() * F.logsigmoid(x) + torch.exp(F.logsigmoid(gate) - x)


@register("dpop", reduction="sum", needs_reference=True)
def dpop(logps: PairLogps, *, beta: float = 0.1, lambda_penalty: float = 50.0) -> Tensor:
    """−logσ(β(m − λ max(0, −u_w))), Pal et al. 2024 (DPO-positive)."""
    penalty = lambda_penalty * torch.relu(-logps.chosen_logratios)
    return -F.logsigmoid(beta * (_margin(logps) - penalty))


@register("bce", reduction="mean", needs_reference=True)
def bce(logps: PairLogps) -> Tensor:
    """−logσ(u_w) − logσ(−u_l)."""
    return -F.logsigmoid(logps.chosen_logratios) - F.logsigmoid(-logps.rejected_logratios)


@register(
    "kto",
    reduction="sum",
    needs_reference=True,
    needs_mismatched=True,
    couples_batch=True,
    takes_unpaired=True,
)
def kto(
    logps: PairLogps, *, beta: float = 0.1, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0
) -> Tensor:
    """λ_w(1−σ(β(u_w−K))) + λ_l(1−σ(β(K−u_l))), Ethayarajh et al. 2024.

    K = max(0, mean u of mismatched completions) over the micro-batch, by the pairs' weights, detached. A side
    that a pair lacks adds nothing, so the mean over B of unpaired data is the mean over all its completions.
    """
    if logps.kl_chosen is None or logps.ref_kl_chosen is None:
        raise ValueError("objective kto needs PairLogps.kl_chosen and ref_kl_chosen (mismatched completions)")
    weights = logps.pair_weights
    baseline = (weights * (logps.kl_chosen - logps.ref_kl_chosen)).sum() / weights.sum()
    baseline = baseline.clamp(min=0).detach()
    chosen = 1 - (beta * (logps.chosen_logratios - baseline)).sigmoid()
    rejected = 1 - (beta * (baseline - logps.rejected_logratios)).sigmoid()
    return lambda_chosen * chosen * logps.has_chosen + lambda_rejected * rejected * logps.has_rejected


@register("lsif", reduction="mean", needs_reference=True)
def lsif(logps: PairLogps) -> Tensor:
    """−e^(u_w) + ½e^(2u_l): least-squares density-ratio fitting."""
    return -logps.chosen_logratios.exp() + 0.5 * (2 * logps.rejected_logratios).exp()


@register("ukl", reduction="mean", needs_reference=True)
def ukl(logps: PairLogps) -> Tensor:
    """−z_w + e^(u_l): unnormalised Kullback-Leibler density-ratio fitting."""
    return -logps.chosen + logps.rejected_logratios.exp()


_DDRO_EDGE = 1e-6


@register("ddro", reduction="mean", needs_reference=True)
def ddro(logps: PairLogps) -> Tensor:
    """2 log 2 − u_w − log(2 − q), q = e^(u_l), Higuchi & Suzuki 2025.

    From q = 2 − 1e-6 on the last term continues linearly with slope 10⁶, as published.
    """
    q = logps.rejected_logratios.exp()
    edge = 2 - _DDRO_EDGE
    inside = -torch.log(2 - q.clamp(max=edge))
    beyond = torch.relu(q - edge) / _DDRO_EDGE
    return 2 * math.log(2) - logps.chosen_logratios + inside + beyond


@register("tidpo", reduction="importance", needs_reference=True)
def tidpo(logps: PairLogps, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """DPO on importance-weighted log-probs (token weights 1 − p, detached, normalised to sum 1)."""
    return dpo(logps, beta=beta, epsilon=epsilon)


# --- without a reference ------------------------------------------------------------------------------------


@register("simpo", reduction="mean", needs_reference=False)
def simpo(logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−logσ(βΔ̄ − γ), Meng et al. 2024."""
    return -F.logsigmoid(beta * (logps.chosen - logps.losers) - gamma)


@register("alphapo", reduction="mean", needs_reference=False)
def alphapo(logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Tensor:
    """SimPO on the reward (1 − e^(−αz̄))/α, Gupta et al. 2025."""
    chosen, rejected = (-torch.expm1(-alpha * z) / alpha for z in (logps.chosen, logps.losers))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register("cpo", reduction="mean", needs_reference=False)
def cpo(logps: PairLogps, *, beta: float = 0.1, lambda_nll: float = 1.0) -> Tensor:
    """−logσ(βΔ) − λ z_w, Xu et al. 2024."""
    return -F.logsigmoid(beta * (logps.chosen - logps.losers)) - lambda_nll * logps.chosen


@register("orpo", reduction="mean", needs_reference=False)
def orpo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """−z̄_w − β logσ(logit e^z̄_w − logit e^z̄_l), Hong et al. 2024.

    A response whose log-prob rounds to 0 has infinite odds: they are taken one rounding step below.
    """
    below = -torch.finfo(logps.chosen.dtype).eps
    chosen, rejected = (
        z - torch.log(-torch.expm1(z)) for z in (logps.chosen.clamp(max=below), logps.losers.clamp(max=below))
    )
    return -logps.chosen - beta * F.logsigmoid(chosen - rejected)


@register("slic", reduction="mean", needs_reference=False)
def slic(logps: PairLogps, *, gamma: float = 1.0, lambda_nll: float = 0.1) -> Tensor:
    """max(0, γ − Δ) − λ z_w, Zhao et al. 2023."""
    return torch.relu(gamma - (logps.chosen - logps.losers)) - lambda_nll * logps.chosen


@register("sft", reduction="mean", needs_reference=False, needs_rejected=False, token_weighted=True)
def sft(logps: PairLogps) -> Tensor:
    """−z̄_w, weighted by response tokens over the batch: supervised fine-tuning on the chosen responses."""
    return -logps.chosen
