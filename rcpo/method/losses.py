"""The losses of rcpo's objectives: pure functions from log-probs of B pairs to B losses.

Notation (arXiv 2604.18239): z = log π(y|x) in the objective's reduction, r the same under the reference,
u = z − r, m = u_w − u_l, Δ = z_w − z_l; subscripts w chosen, l rejected. Every function takes a `PairLogps`
and returns losses of shape (B,). Properties that the runner must know (needs_reference, …) are declared
beside the function; no code anywhere branches on an objective's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpo.method.registry import register
from rcpo.method.types import PairLogps

# --- with a reference ---------------------------------------------------------------------------------------


def _margin(logps: PairLogps) -> Tensor:
    return logps.chosen_logratios - logps.rejected_logratios


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda u, _: u,
    "forward_kl": lambda u, _: -torch.exp(-u),
    "js": lambda u, _: math.log(2) + F.logsigmoid(u),
    "alpha": lambda u, alpha: -torch.expm1(-alpha * u) / alpha,
}
"""f′(t) of a divergence, from u = log t: Wang et al. 2023 (f-DPO), up to constants that cancel in pairs."""


@register("dpo", reduction="sum", needs_reference=True)
def dpo(
    logps: PairLogps,
    *,
    beta: float = 0.1,
    epsilon: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """−logσ(βm), Rafailov et al. 2023; label smoothing ε gives conservative DPO (Mitchell 2023).

    Another divergence from the reference than the reverse KL has f′(e^u) in the place of u (f-DPO, Wang et
    al. 2023). The α-divergence is the reverse KL for α → 0, the forward KL for α = 1.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"objective.divergence={divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    score = DIVERGENCES[divergence]
    chosen, rejected = (
        score(u, divergence_alpha) for u in (logps.chosen_logratios, logps.rejected_logratios)
    )
    x = beta * (chosen - rejected)
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


@register("dpo_shift", reduction="sum", needs_reference=True)
def dpo_shift(
    logps: PairLogps,
    *,
    beta: float = 0.1,
    shift_start: float = 0.75,
    shift_end: float = 0.75,
    progress: float = 0.0,
) -> Tensor:
    """−logσ(β(u_w − λu_l)), Yang et al. 2025 (DPO-Shift): a λ below 1 holds the loser back less firmly.

    λ goes linearly from `shift_start` to `shift_end` over the run; it is fixed where they are equal.
    """
    shift = shift_start + (shift_end - shift_start) * progress
    return -F.logsigmoid(beta * (logps.chosen_logratios - shift * logps.rejected_logratios))


@register("cal_dpo", reduction="sum", needs_reference=True)
def cal_dpo(logps: PairLogps, *, beta: float = 0.002) -> Tensor:
    """−logσ(m) + ½(u_w − 1/(2β))² + ½(u_l + 1/(2β))², Xiao et al. 2024 (Cal-DPO).

    The squares hold the rewards to a scale of their own; the weight ½ is that of the authors' code.
    """
    target = 1 / (2 * beta)
    squares = (logps.chosen_logratios - target).square() + (logps.rejected_logratios + target).square()
    return -F.logsigmoid(_margin(logps)) + 0.5 * squares


@register("bdpo", reduction="sum", needs_reference=True)
def bdpo(logps: PairLogps, *, beta: float = 0.1, lambda_mix: float = 0.5) -> Tensor:
    """−logσ(β(u_w − log(λe^(u_l) + 1 − λ))), Cho et al. 2025 (bounded DPO).

    The loser's probability is mixed with the reference's, so that it can win at most −log(1 − λ) by falling.
    """
    mixed = torch.logaddexp(
        logps.rejected_logratios + math.log(lambda_mix),
        torch.full_like(logps.rejected_logratios, math.log1p(-lambda_mix)),
    )
    return -F.logsigmoid(beta * (logps.chosen_logratios - mixed))


@register("mappo", reduction="sum", needs_reference=True, needs_margins=True, margins=(0.0, 1.0))
def mappo(logps: PairLogps, *, beta: float = 0.1, score_scale: float = 1.0) -> Tensor:
    """−logσ(β(u_w − Δu_l)), Lan et al. 2025 (MaPPO), Δ ∈ [0, 1] the pair's scaled score margin."""
    gap = score_scale * logps.score_margins
    return -F.logsigmoid(beta * (logps.chosen_logratios - gap * logps.rejected_logratios))


def _rewards_of_scores(logps: PairLogps, beta: float, score_scale: float) -> tuple[Tensor, Tensor]:
    """βm and ηΔ: what the policy and the scores say of a pair."""
    return beta * _margin(logps), score_scale * logps.score_margins


def _bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(σ(x) ‖ σ(y)) of the pair's order."""
    ahead = x.sigmoid() * (F.logsigmoid(x) - F.logsigmoid(y))
    return ahead + (-x).sigmoid() * (F.logsigmoid(-x) - F.logsigmoid(-y))


@register("rpo_sq", reduction="sum", needs_reference=True, needs_margins=True)
def rpo_sq(logps: PairLogps, *, beta: float = 0.1, score_scale: float = 1.0) -> Tensor:
    """(βm − ηΔ)², Sun et al. 2025 (reward-aware preference optimisation), Δ the pair's score margin."""
    own, given = _rewards_of_scores(logps, beta, score_scale)
    return (own - given).square()


@register("rpo_bwd_kl", reduction="sum", needs_reference=True, needs_margins=True)
def rpo_bwd_kl(logps: PairLogps, *, beta: float = 0.1, score_scale: float = 1.0) -> Tensor:
    """KL(σ(ηΔ) ‖ σ(βm)), Sun et al. 2025 (reward-aware preference optimisation)."""
    own, given = _rewards_of_scores(logps, beta, score_scale)
    return _bernoulli_kl(given, own)


@register("rpo_fwd_kl", reduction="sum", needs_reference=True, needs_margins=True)
def rpo_fwd_kl(logps: PairLogps, *, beta: float = 0.1, score_scale: float = 1.0) -> Tensor:
    """KL(σ(βm) ‖ σ(ηΔ)), Sun et al. 2025 (reward-aware preference optimisation)."""
    own, given = _rewards_of_scores(logps, beta, score_scale)
    return _bernoulli_kl(own, given)


@register("apo_zero_unpaired", reduction="sum", needs_reference=True, takes_unpaired=True)
def apo_zero_unpaired(
    logps: PairLogps, *, beta: float = 0.1, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0
) -> Tensor:
    """λ_w(1 − σ(βu_w)) + λ_l σ(βu_l), D'Oosterlinck et al. 2024: apo_zero on completions with labels.

    A side that a pair lacks adds nothing.
    """
    chosen = 1 - (beta * logps.chosen_logratios).sigmoid()
    rejected = (beta * logps.rejected_logratios).sigmoid()
    return lambda_chosen * chosen * logps.has_chosen + lambda_rejected * rejected * logps.has_rejected


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


@register("simper", reduction="mean", needs_reference=False)
def simper(logps: PairLogps) -> Tensor:
    """−e^z̄_w + e^z̄_l, Xiao et al. 2025 (SimPER): the inverse perplexities; nothing to tune."""
    return -logps.chosen.exp() + logps.losers.exp()


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


@register("tpo", reduction="sum", needs_reference=False, needs_gold=True)
def tpo(logps: PairLogps, *, beta: float = 0.01, gamma: float = 0.0, lambda_nll: float = 1.0) -> Tensor:
    """−logσ(βΔ − γ) − λ z̄_g, Saeidi et al. 2024 (triple preference optimization).

    z̄_g is the mean log-prob a token of the pair's gold answer. On means, with a γ, it is their TPO-L.
    """
    preference = -F.logsigmoid(beta * (logps.chosen - logps.losers) - gamma)
    return preference - lambda_nll * logps.gold


@register("slic", reduction="mean", needs_reference=False)
def slic(logps: PairLogps, *, gamma: float = 1.0, lambda_nll: float = 0.1) -> Tensor:
    """max(0, γ − Δ) − λ z_w, Zhao et al. 2023."""
    return torch.relu(gamma - (logps.chosen - logps.losers)) - lambda_nll * logps.chosen


@register("sft", reduction="mean", needs_reference=False, needs_rejected=False, token_weighted=True)
def sft(logps: PairLogps) -> Tensor:
    """−z̄_w, weighted by response tokens over the batch: supervised fine-tuning on the chosen responses."""
    return -logps.chosen
