"""Every objective against numbers that were not computed by it: the reference code, and formulas by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcpo.method.incentives import incentives
from rcpo.method.objectives import (
    Objective,
    RunningMean,
    Specification,
    get_objective,
    names,
    register,
    specification,
)
from rcpo.method.types import PairLogps

REFERENCE = json.loads((Path(__file__).parent / "reference" / "objectives.json").read_text())
# Other test modules may register objectives of their own.
NAMES = [name for name in names() if specification(name).loss.__module__ == "rcpo.method.losses"]

# The name in the reference file, ours, and its hyper-parameters under our names.
HYPER = REFERENCE["hyper"]
PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "DPO": ("dpo", {"beta": HYPER["beta"]}),
    "BCE": ("bce", {}),
    "CPO": ("cpo", {"beta": HYPER["cpo_beta"], "lambda_nll": HYPER["cpo_lambda_nll"]}),
    "IPO": ("ipo", {"tau": HYPER["ipo_tau"]}),
    "SIMPO": ("simpo", {"beta": HYPER["beta"], "gamma": HYPER["simpo_target_margin"]}),
    "SLIC": ("slic", {"gamma": HYPER["slic_gamma"], "lambda_nll": HYPER["slic_lambda_coef"]}),
    "LSIF": ("lsif", {}),
    "UKL": ("ukl", {}),
    "DDRO": ("ddro", {}),
}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def published_pairs() -> PairLogps:
    z_w, z_l, r_w, r_l = (vector(*REFERENCE[key]) for key in ("zw", "zl", "ref_w", "ref_l"))
    return PairLogps(z_w, z_l, r_w, r_l)


def test_the_reference_file_holds_nothing_that_is_not_compared() -> None:
    assert set(REFERENCE["objectives"]) == set(PUBLISHED)


@pytest.mark.parametrize("published", PUBLISHED)
def test_losses_of_the_reference_code(published: str) -> None:
    name, hyperparameters = PUBLISHED[published]
    losses = get_objective(name, **hyperparameters)(published_pairs())
    expected = vector(*REFERENCE["objectives"][published]["loss"])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


# --- the published formulas, written again with `math` for one pair of floats -------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logit_exp(z: float) -> float:
    return math.log(math.exp(z) / (1 - math.exp(z)))


def exo_by_hand(w: float, v: float, r: float, s: float) -> float:
    p = sigmoid(0.1 * ((w - r) - (v - s)))
    return p * math.log(p / 0.999) + (1 - p) * math.log((1 - p) / 0.001)


def discopop_by_hand(w: float, v: float, r: float, s: float) -> float:
    x = 0.1 * ((w - r) - (v - s))
    gate = sigmoid(x / 0.05)
    return -(1 - gate) * log_sigmoid(x) + gate * math.exp(-x)


def alphapo_by_hand(w: float, v: float, r: float, s: float) -> float:
    reward_w, reward_l = ((1 - math.exp(-0.25 * z)) / 0.25 for z in (w, v))
    return -log_sigmoid(2 * (reward_w - reward_l) - 1)


def ddro_by_hand(w: float, v: float, r: float, s: float) -> float:
    q, edge = math.exp(v - s), 2 - 1e-6
    tail = -math.log(2 - q) if q <= edge else -math.log(1e-6) + 1e6 * (q - edge)
    return 2 * math.log(2) - (w - r) + tail


MARGIN = 0.3  # of the scores of every pair here
GOLD = -0.7  # the mean log-prob of every pair's gold answer here


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def mixed_by_hand(v: float, s: float) -> float:
    """log of ½ e^v + ½ e^s over e^s: the loser's log-ratio in bdpo."""
    return math.log((0.5 * math.exp(v) + 0.5 * math.exp(s)) / math.exp(s))


# Default hyper-parameters; the arguments are w = z_w, v = z_l, r = r_w, s = r_l.
BY_HAND: dict[str, Callable[[float, float, float, float], float]] = {
    "dpo": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - (v - s))),
    "tidpo": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - (v - s))),
    "robust": lambda w, v, r, s: (
        (-0.9 * log_sigmoid(0.1 * ((w - r) - (v - s))) + 0.1 * log_sigmoid(-0.1 * ((w - r) - (v - s)))) / 0.8
    ),
    "ipo": lambda w, v, r, s: ((w - r) - (v - s) - 5) ** 2,
    "hinge": lambda w, v, r, s: max(0.0, 1 - 0.1 * ((w - r) - (v - s))),
    "exo": exo_by_hand,
    "nca": lambda w, v, r, s: (
        -log_sigmoid(0.1 * (w - r)) - 0.5 * log_sigmoid(-0.1 * (w - r)) - 0.5 * log_sigmoid(-0.1 * (v - s))
    ),
    "bco": lambda w, v, r, s: -log_sigmoid(0.1 * (w - r)) - log_sigmoid(-0.1 * (v - s)),
    "sppo": lambda w, v, r, s: (w - r - 5) ** 2 + (v - s + 5) ** 2,
    "apo_zero": lambda w, v, r, s: 1 - sigmoid(0.1 * (w - r)) + sigmoid(0.1 * (v - s)),
    "apo_down": lambda w, v, r, s: sigmoid(0.1 * (w - r)) + 1 - sigmoid(0.1 * ((w - r) - (v - s))),
    "discopop": discopop_by_hand,
    "dpop": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - (v - s) - 50 * max(0.0, r - w))),
    "dpo_shift": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - 0.75 * (v - s))),
    "cal_dpo": lambda w, v, r, s: (
        -log_sigmoid((w - r) - (v - s)) + ((w - r - 250) ** 2 + (v - s + 250) ** 2) / 2
    ),
    "bdpo": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - mixed_by_hand(v, s))),
    "mappo": lambda w, v, r, s: -log_sigmoid(0.1 * ((w - r) - MARGIN * (v - s))),
    "rpo_sq": lambda w, v, r, s: (0.1 * ((w - r) - (v - s)) - MARGIN) ** 2,
    "rpo_bwd_kl": lambda w, v, r, s: bernoulli_kl(sigmoid(MARGIN), sigmoid(0.1 * ((w - r) - (v - s)))),
    "rpo_fwd_kl": lambda w, v, r, s: bernoulli_kl(sigmoid(0.1 * ((w - r) - (v - s))), sigmoid(MARGIN)),
    "apo_zero_unpaired": lambda w, v, r, s: 1 - sigmoid(0.1 * (w - r)) + sigmoid(0.1 * (v - s)),
    "bce": lambda w, v, r, s: -log_sigmoid(w - r) - log_sigmoid(s - v),
    "lsif": lambda w, v, r, s: -math.exp(w - r) + 0.5 * math.exp(2 * (v - s)),
    "ukl": lambda w, v, r, s: -w + math.exp(v - s),
    "ddro": ddro_by_hand,
    "simpo": lambda w, v, r, s: -log_sigmoid(2 * (w - v) - 1),
    "simper": lambda w, v, r, s: -math.exp(w) + math.exp(v),
    "alphapo": alphapo_by_hand,
    "cpo": lambda w, v, r, s: -log_sigmoid(0.1 * (w - v)) - w,
    "orpo": lambda w, v, r, s: -w - 0.1 * log_sigmoid(logit_exp(w) - logit_exp(v)),
    "slic": lambda w, v, r, s: max(0.0, 1 - (w - v)) - 0.1 * w,
    "tpo": lambda w, v, r, s: -log_sigmoid(0.01 * (w - v)) - GOLD,
    "sft": lambda w, v, r, s: -w,
}
COUPLED = {"aot", "aot_unpaired", "kto"}

# Pair 1 ahead of its reference, pair 2 behind it, pair 3 with q = e^(u_l) = e^0.8 > 2 (ddro's tail).
HAND_PAIRS = [(-1.2, -2.5, -1.6, -2.1), (-3.1, -0.7, -2.2, -1.0), (-0.4, -1.1, -0.5, -1.9)]


def hand_pairs() -> PairLogps:
    z_w, z_l, r_w, r_l = (vector(*column) for column in zip(*HAND_PAIRS, strict=True))
    return PairLogps(
        *(z_w, z_l, r_w, r_l, vector(4, 2, 8), vector(3, 5, 6)),
        kl_chosen=z_w,
        ref_kl_chosen=r_w,
        margins=torch.full_like(z_w, MARGIN),
        gold_means=torch.full_like(z_w, GOLD),
    )


def test_every_objective_has_a_formula_by_hand() -> None:
    assert set(BY_HAND) | COUPLED == set(NAMES)
    assert {name for name in NAMES if specification(name).couples_batch} == COUPLED


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_by_hand(name: str) -> None:
    expected = vector(*(BY_HAND[name](*pair) for pair in HAND_PAIRS))
    # 1e-9: ddro's −log(2 − (2 − 1e-6)) keeps only ten digits of 1e-6 in float64
    rtol = 1e-9 if name == "ddro" else 1e-12
    torch.testing.assert_close(get_objective(name)(hand_pairs()), expected, rtol=rtol, atol=0)


@given(
    w=st.floats(-4, -0.1),
    v=st.floats(-4, -0.1),
    r=st.floats(-4, -0.1),
    s=st.floats(-4, -0.1),
)
def test_losses_by_hand_for_any_pair(w: float, v: float, r: float, s: float) -> None:
    pair = (vector(w), vector(v), vector(r), vector(s), vector(3), vector(3))
    logps = PairLogps(*pair, margins=vector(MARGIN), gold_means=vector(GOLD))
    for name, formula in BY_HAND.items():
        expected = formula(w, v, r, s)
        assert get_objective(name)(logps).item() == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def test_label_smoothing_by_hand() -> None:
    # m = 0.8, βm = 0.08: cDPO is −0.9 logσ(0.08) − 0.1 logσ(−0.08)
    logps = PairLogps(vector(-1.2), vector(-2.5), vector(-1.6), vector(-2.1))
    expected = -0.9 * log_sigmoid(0.08) - 0.1 * log_sigmoid(-0.08)
    for name in ("dpo", "tidpo"):
        assert get_objective(name, epsilon=0.1)(logps).item() == pytest.approx(expected, rel=1e-12)
    # robust with ε = 0.2 divides by 1 − 0.4
    expected = (-0.8 * log_sigmoid(0.08) + 0.2 * log_sigmoid(-0.08)) / 0.6
    assert get_objective("robust", epsilon=0.2)(logps).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("divergence", "alpha", "score"),
    [
        ("reverse_kl", 0.5, lambda u: u),
        ("forward_kl", 0.5, lambda u: 1 - 1 / math.exp(u)),  # f′(t) = 1 − 1/t; the constant cancels
        ("js", 0.5, lambda u: math.log(2 * math.exp(u) / (1 + math.exp(u)))),
        ("alpha", 0.5, lambda u: (1 - math.exp(u) ** -0.5) / 0.5),
        ("alpha", 0.25, lambda u: (1 - math.exp(u) ** -0.25) / 0.25),
        ("alpha", 1.0, lambda u: 1 - 1 / math.exp(u)),  # the forward KL
        ("alpha", 1e-9, lambda u: u),  # towards the reverse KL
    ],
)
def test_divergences_by_hand(divergence: str, alpha: float, score: Callable[[float], float]) -> None:
    objective = get_objective("dpo", divergence=divergence, divergence_alpha=alpha)
    expected = [-log_sigmoid(0.1 * (score(w - r) - score(v - s))) for w, v, r, s in HAND_PAIRS]
    torch.testing.assert_close(objective(hand_pairs()), vector(*expected), rtol=1e-8, atol=0)


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.divergence='kl': choose one of reverse_kl, forward_kl"):
        get_objective("dpo", divergence="kl")(hand_pairs())


def test_shift_goes_linearly_over_the_run() -> None:
    # λ from 0.75 to 0.95: at 0.6 of the run 0.87
    objective = get_objective("dpo_shift", shift_start=0.75, shift_end=0.95)
    for progress, shift in ((0.0, 0.75), (0.6, 0.87), (1.0, 0.95)):
        objective.progress = progress
        expected = [-log_sigmoid(0.1 * ((w - r) - shift * (v - s))) for w, v, r, s in HAND_PAIRS]
        torch.testing.assert_close(objective(hand_pairs()), vector(*expected), rtol=1e-12, atol=0)


def test_scores_are_scaled() -> None:
    logps = hand_pairs().replace(margins=vector(1, 4, 10))
    expected = [
        -log_sigmoid(0.1 * ((w - r) - gap * (v - s)))
        for gap, (w, v, r, s) in zip((0.1, 0.4, 1.0), HAND_PAIRS, strict=True)
    ]
    objective = get_objective("mappo", score_scale=0.1)
    torch.testing.assert_close(objective(logps), vector(*expected), rtol=1e-12, atol=0)
    expected = [
        (0.1 * ((w - r) - (v - s)) - 0.2 * margin) ** 2
        for margin, (w, v, r, s) in zip((1, 4, 10), HAND_PAIRS, strict=True)
    ]
    objective = get_objective("rpo_sq", score_scale=0.2)
    torch.testing.assert_close(objective(logps), vector(*expected), rtol=1e-12, atol=0)


def test_limits_of_dpos_relatives() -> None:
    pairs = hand_pairs()
    dpo = get_objective("dpo")(pairs)
    one = pairs.replace(margins=torch.ones_like(pairs.chosen))
    torch.testing.assert_close(get_objective("mappo")(one), dpo, rtol=1e-12, atol=0)
    mostly = get_objective("bdpo", lambda_mix=1 - 1e-12)
    torch.testing.assert_close(mostly(pairs), dpo, rtol=1e-9, atol=0)
    whole = get_objective("dpo_shift", shift_start=1.0, shift_end=1.0)
    torch.testing.assert_close(whole(pairs), dpo, rtol=1e-12, atol=0)
    # bdpo's loser is bounded: even at u_l → −∞ it wins no more than −log ½
    far = pairs.replace(rejected=pairs.losers - 1e4)
    expected = [-log_sigmoid(0.1 * ((w - r) + math.log(2))) for w, _, r, _ in HAND_PAIRS]
    torch.testing.assert_close(get_objective("bdpo")(far), vector(*expected), rtol=1e-12, atol=0)


def test_apo_zero_of_completions_counts_the_sides_that_are_there() -> None:
    logps = hand_pairs().replace(chosen_lengths=vector(4, 0, 8), rejected_lengths=vector(0, 5, 0))
    objective = get_objective("apo_zero_unpaired", lambda_chosen=2.0, lambda_rejected=3.0)
    # u_w = 0.4 and 0.1 of the first and the last, u_l = 0.3 of the second
    expected = [2 * (1 - sigmoid(0.04)), 3 * sigmoid(0.03), 2 * (1 - sigmoid(0.01))]
    torch.testing.assert_close(objective(logps), vector(*expected), rtol=1e-12, atol=0)


def test_aot_by_hand() -> None:
    # Δ = (1.3, −2.4, 0.7) sorted −2.4, 0.7, 1.3; Δ_ref = (0.5, −1.2, 1.4) sorted −1.2, 0.5, 1.4
    expected = vector(*(-log_sigmoid(0.1 * x) for x in (-2.4 + 1.2, 0.7 - 0.5, 1.3 - 1.4)))
    torch.testing.assert_close(get_objective("aot")(hand_pairs()), expected, rtol=1e-12, atol=0)


def test_aot_unpaired_by_hand() -> None:
    # u_w = (0.4, −0.9, 0.1) sorted −0.9, 0.1, 0.4; u_l = (−0.4, 0.3, 0.8) sorted the same
    expected = vector(*(-log_sigmoid(0.1 * x) for x in (-0.9 + 0.4, 0.1 - 0.3, 0.4 - 0.8)))
    torch.testing.assert_close(get_objective("aot_unpaired")(hand_pairs()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kl", "baseline"), [((0.3, 0.5, 0.1), 0.3), ((-0.3, -0.5, 0.5), 0.0)])
def test_kto_by_hand(kl: tuple[float, ...], baseline: float) -> None:
    # K is the mean of the mismatched pairs' u: 0.9/3 = 0.3, and −0.3/3 < 0 gives 0
    logps = hand_pairs().replace(kl_chosen=vector(*kl), ref_kl_chosen=vector(0, 0, 0))
    u = [(0.4, -0.4), (-0.9, 0.3), (0.1, 0.8)]
    expected = vector(
        *(1.5 * (1 - sigmoid(0.1 * (w - baseline))) + 0.5 * (1 - sigmoid(0.1 * (baseline - v))) for w, v in u)
    )
    objective = get_objective("kto", lambda_chosen=1.5, lambda_rejected=0.5)
    torch.testing.assert_close(objective(logps), expected, rtol=1e-12, atol=0)


def test_kto_of_unpaired_completions_is_the_mean_over_all_of_them() -> None:
    # the first two wanted (the second side is empty, z = r = 0), the third unwanted; K = 0.9/3 = 0.3
    logps = PairLogps(
        chosen=vector(-1.0, -3.0, 0.0).requires_grad_(),
        rejected=vector(0.0, 0.0, -2.0).requires_grad_(),
        ref_chosen=vector(-1.4, -2.1, 0.0),
        ref_rejected=vector(0.0, 0.0, -2.8),
        chosen_lengths=vector(3, 5, 0),
        rejected_lengths=vector(0, 0, 4),
        kl_chosen=vector(0.3, 0.5, 0.1),
        ref_kl_chosen=vector(0, 0, 0),
    )
    losses = get_objective("kto", lambda_rejected=0.5)(logps)
    expected = [1 - sigmoid(0.1 * (u - 0.3)) for u in (0.4, -0.9)] + [0.5 * (1 - sigmoid(0.1 * (0.3 - 0.8)))]
    torch.testing.assert_close(losses, vector(*expected), rtol=1e-12, atol=0)
    d_w, d_l = incentives(get_objective("kto"), logps)
    assert (d_w > 0).tolist() == [True, True, False] and (d_l > 0).tolist() == [False, False, True]
    assert d_w[2] == d_l[0] == d_l[1] == 0


def test_ktos_baseline_is_a_constant_of_the_gradient() -> None:
    kl = vector(0.3, 0.5, 0.1).requires_grad_()
    logps = hand_pairs()
    logps = logps.replace(chosen=logps.chosen.requires_grad_(), kl_chosen=kl, ref_kl_chosen=vector(0, 0, 0))
    assert torch.autograd.grad(get_objective("kto")(logps).sum(), kl, allow_unused=True) == (None,)


# --- Numerical extremes -------------------------------------------------------------------------------------

EXTREMES = (0.0, -1e-9, -1.0, -1e3, -1e4)


def representable(name: str, w: Tensor, v: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Where the loss itself fits into a float64: e^(2·1e3) does not."""
    keep = torch.ones_like(w, dtype=torch.bool)
    if name in ("lsif", "ukl", "ddro"):
        keep &= ((v - s) < 300) & ((w - r) < 300)
    if name == "alphapo":
        keep &= (w > -2000) & (v > -2000)
    return keep


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_probs_give_finite_losses_and_gradients(name: str) -> None:
    grid = torch.cartesian_prod(*[vector(*EXTREMES)] * 4)
    grid = grid[representable(name, *grid.unbind(1))]
    w, v, r, s = (column.clone().requires_grad_() for column in grid.unbind(1))
    given = {"kl_chosen": w.detach(), "ref_kl_chosen": r.detach(), "margins": torch.full_like(w, MARGIN)}
    given["gold_means"] = w.detach()
    losses = get_objective(name)(PairLogps(w, v, r, s, **given))
    assert len(grid) > 100
    assert losses.isfinite().all(), grid[~losses.isfinite()]
    gradients = torch.autograd.grad(losses.sum(), [w, v], allow_unused=True)
    for gradient in gradients:
        assert gradient is None or gradient.isfinite().all(), grid[~gradient.isfinite()]


def one(name: str, u_w: float, u_l: float, **hyperparameters: Any) -> float:
    """The loss of one pair with a reference of zeros."""
    logps = PairLogps(vector(u_w), vector(u_l), vector(0), vector(0))
    return get_objective(name, **hyperparameters)(logps).item()


def test_limits_far_from_the_start() -> None:
    assert one("dpo", -1e4, 0) == pytest.approx(1e3, rel=1e-12)  # −logσ(−1000) = 1000
    assert one("dpo", 0, -1e4) == pytest.approx(0, abs=1e-12)
    assert one("hinge", -1e4, 0) == 1001 and one("hinge", 0, -1e4) == 0
    # exo: p = 0 → log(1/ε); p = 1 → log(1/(1−ε))
    assert one("exo", -1e4, 0) == pytest.approx(-math.log(1e-3), rel=1e-12)
    assert one("exo", 0, -1e4) == pytest.approx(-math.log(0.999), rel=1e-12)
    # discopop: x = −1000 closes the gate, so −logσ(x) = 1000 is left: σ(20x) e^(−x) = e^(19x) → 0
    assert one("discopop", -1e4, 0) == pytest.approx(1e3, rel=1e-12)
    assert one("discopop", 0, -1e4) == pytest.approx(0, abs=1e-12)
    assert one("sppo", -1e4, 0) == pytest.approx(10005.0**2 + 25, rel=1e-12)
    assert one("apo_zero", -1e4, 0) == pytest.approx(1.5, rel=1e-12)


def test_orpo_of_a_certain_response() -> None:
    # z_w = 0 against z_l = −log 2: the odds of a certain winner are infinite, −logσ → 0, the loss is −z_w = 0
    objective = get_objective("orpo")
    z_w, z_l = vector(0.0).requires_grad_(), vector(-math.log(2)).requires_grad_()
    loss = objective(PairLogps(z_w, z_l))
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert all(gradient.isfinite() for gradient in torch.autograd.grad(loss, [z_w, z_l]))
    # z_l = 0 against z_w = −log 2 (log-odds 0): odds one step below: log(1/2.2e-16) = 52 log 2
    loss = objective(PairLogps(vector(-math.log(2)), vector(0.0)))
    assert loss.item() == pytest.approx(math.log(2) + 0.1 * 52 * math.log(2), rel=1e-12)


def test_ddro_beyond_its_edge() -> None:
    # u_l = log 3: q = 3 lies 1 + 1e-6 beyond the edge: −log 1e-6 + 1e6 + 1, slope d_l = q·1e6
    z_l = vector(math.log(3)).requires_grad_()
    loss = get_objective("ddro")(PairLogps(vector(0.25), z_l, vector(0.0), vector(0.0)))
    assert loss.item() == pytest.approx(2 * math.log(2) - 0.25 + 6 * math.log(10) + 1e6 + 1, rel=1e-12)
    (slope,) = torch.autograd.grad(loss, z_l)
    assert slope.item() == pytest.approx(3e6, rel=1e-9)


# --- The registry and what an objective declares ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_an_objective_declares_is_what_it_reads(name: str) -> None:
    objective, logps = get_objective(name), hand_pairs()
    without_reference = logps.replace(ref_chosen=None, ref_rejected=None)
    if objective.needs_reference:
        with pytest.raises(ValueError, match=r"PairLogps\.ref_(chosen|rejected)"):
            objective(without_reference)
    else:
        torch.testing.assert_close(objective(without_reference), objective(logps), rtol=0, atol=0)
    without_rejected = logps.replace(rejected=None, ref_rejected=None)
    if objective.needs_rejected:
        with pytest.raises(ValueError, match=r"PairLogps\.rejected"):
            objective(without_rejected)
    else:
        torch.testing.assert_close(objective(without_rejected), objective(logps), rtol=0, atol=0)
    without_mismatched = logps.replace(kl_chosen=None, ref_kl_chosen=None)
    if objective.spec.needs_mismatched:
        with pytest.raises(ValueError, match="mismatched"):
            objective(without_mismatched)
    if objective.spec.needs_margins:
        with pytest.raises(ValueError, match=r"PairLogps\.margins"):
            objective(logps.replace(margins=None))
    else:
        torch.testing.assert_close(objective(logps.replace(margins=None)), objective(logps), rtol=0, atol=0)
    if objective.spec.needs_gold:
        with pytest.raises(ValueError, match=r"PairLogps\.gold_means"):
            objective(logps.replace(gold_means=None))
    else:
        torch.testing.assert_close(
            objective(logps.replace(gold_means=None)), objective(logps), rtol=0, atol=0
        )
    third = {"kto": ("mismatched",), "tpo": ("gold",)}.get(name, ())
    assert objective.sides == (("chosen",) if name == "sft" else ("chosen", "rejected")) + third


@pytest.mark.parametrize("name", sorted(set(NAMES) - COUPLED))
def test_an_uncoupled_objective_sees_each_pair_alone(name: str) -> None:
    objective, logps = get_objective(name), hand_pairs()
    alone = [objective(logps.select(torch.arange(3) == i)) for i in range(3)]
    torch.testing.assert_close(objective(logps), torch.cat(alone), rtol=1e-15, atol=0)


def test_default_reductions() -> None:
    # a published loss on means has them; the others are on sums
    means = "ipo bce simpo simper alphapo cpo orpo slic lsif ukl ddro sft"
    for name in NAMES:
        expected = "mean" if name in means.split() else "importance" if name == "tidpo" else "sum"
        assert get_objective(name).reduction == expected, name
    assert get_objective("dpo", reduction="mean").reduction == "mean"


def test_unknown_names_and_hyperparameters_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"objective\.name='simpoo' is not registered; did you mean 'simpo'\?"
    ):
        get_objective("simpoo")
    with pytest.raises(ValueError, match=r"known: alphapo, aot"):
        get_objective("zzzzzzzz")
    with pytest.raises(ValueError, match=r"dpo has no hyper-parameter 'betta'; did you mean 'beta'\?"):
        get_objective("dpo", betta=0.1)
    with pytest.raises(ValueError, match=r"simpo has no hyper-parameter 'xyz'; it has: beta, gamma"):
        get_objective("simpo", xyz=1)
    with pytest.raises(ValueError, match=r"bce has no hyper-parameter 'xyz'; it has: none"):
        get_objective("bce", xyz=1)
    with pytest.raises(ValueError, match=r"bco has no hyper-parameter 'running_mean'"):
        get_objective("bco", running_mean=1.0)
    with pytest.raises(
        ValueError, match=r"objective\.reduction='total'; choose one of sum, mean, importance"
    ):
        get_objective("dpo", reduction="total")
    with pytest.raises(ValueError, match=r"nll_coef is not defined for objective\.reduction=importance"):
        get_objective("tidpo", nll_coef=0.5)
    with pytest.raises(ValueError, match=r"reduction='max'"):
        register("never", reduction="max", needs_reference=False)


def test_a_name_is_taken_once() -> None:
    def other(logps: PairLogps) -> Tensor:
        return logps.chosen

    with pytest.raises(ValueError, match=r"'dpo' is registered already, by rcpo\.method\.losses"):
        register("dpo", reduction="sum", needs_reference=True)(other)
    original = specification("dpo").loss
    assert register("dpo", reduction="sum", needs_reference=True)(original) is original  # a module read twice


def of(loss: Callable[..., Tensor], **properties: Any) -> Objective:
    """An objective that is not registered, as a user would write it."""
    settings = {"reduction": "mean", "needs_reference": False} | properties
    return Objective(Specification("mine", loss, **settings), settings["reduction"], 0.0, {})


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PairLogps\.rejected has shape \(2,\).*chosen has \(3,\)"):
        PairLogps(vector(1, 2, 3), vector(1, 2))
    with pytest.raises(ValueError, match=r"PairLogps\.ref_chosen has shape \(3, 1\)"):
        PairLogps(vector(1, 2, 3), vector(1, 2, 3), ref_chosen=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(B,\) is expected"):
        PairLogps(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"mine returned shape \(\) for 3 pairs"):
        of(lambda logps: logps.chosen.sum())(hand_pairs())


def test_nll_by_hand() -> None:
    # lengths 4, 2, 8; z_w = −1.2, −3.1, −0.4. sum: mean log-probs −0.3, −1.55, −0.05; mean: z_w itself
    logps = hand_pairs()
    for reduction, means in [("sum", (-0.3, -1.55, -0.05)), ("mean", (-1.2, -3.1, -0.4))]:
        plain = get_objective("dpo", reduction=reduction)
        with_nll = get_objective("dpo", reduction=reduction, nll_coef=0.5)
        torch.testing.assert_close(
            with_nll(logps) - plain(logps), -0.5 * vector(*means), rtol=1e-12, atol=1e-15
        )
    given_means = logps.replace(chosen_means=vector(-1, -2, -4), chosen_lengths=None)
    added = get_objective("dpo", nll_coef=0.5)(given_means) - get_objective("dpo")(given_means)
    torch.testing.assert_close(added, vector(0.5, 1, 2), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match=r"nll_coef on summed log-probs needs PairLogps\.chosen_lengths"):
        get_objective("dpo", nll_coef=0.5)(logps.replace(chosen_lengths=None))


def test_integer_lengths_lose_no_precision() -> None:
    # 1/3 of −0.3 in float64, whatever the lengths' dtype
    logps = PairLogps(vector(-0.3), vector(-1), vector(0), vector(0), torch.tensor([3]), torch.tensor([3]))
    means = get_objective("dpo", nll_coef=1.0).chosen_means(logps)
    assert means.item() == pytest.approx(-0.1, rel=1e-15)


def test_rewards_by_hand() -> None:
    logps = hand_pairs()
    chosen, rejected = get_objective("dpo", beta=0.5).rewards(logps)
    torch.testing.assert_close(chosen, vector(0.2, -0.45, 0.05), rtol=1e-12, atol=0)  # β u_w
    torch.testing.assert_close(rejected, vector(-0.2, 0.15, 0.4), rtol=1e-12, atol=0)
    chosen, rejected = get_objective("simpo").rewards(logps)  # no reference: β z, β = 2
    torch.testing.assert_close(chosen, vector(-2.4, -6.2, -0.8), rtol=1e-12, atol=0)
    chosen, rejected = get_objective("slic").rewards(logps)  # no β: 1
    torch.testing.assert_close(chosen, vector(-1.2, -3.1, -0.4), rtol=0, atol=0)
    chosen, rejected = get_objective("sft").rewards(logps.replace(rejected=None))
    torch.testing.assert_close(chosen, vector(-1.2, -3.1, -0.4), rtol=0, atol=0)
    assert rejected is None


def test_rewards_of_an_objective_with_a_reference_and_no_rejected_side() -> None:
    objective = of(lambda logps: -logps.chosen_logratios, needs_reference=True, needs_rejected=False)
    chosen, rejected = objective.rewards(hand_pairs().replace(rejected=None, ref_rejected=None))
    torch.testing.assert_close(chosen, vector(0.4, -0.9, 0.1), rtol=1e-12, atol=0)
    assert rejected is None


def test_weights_of_the_batch_mean() -> None:
    assert get_objective("dpo").weights(hand_pairs()).tolist() == [1, 1, 1]
    assert get_objective("sft").weights(hand_pairs()).tolist() == [4, 2, 8]  # response tokens
    with pytest.raises(ValueError, match=r"sft needs PairLogps\.chosen_lengths"):
        get_objective("sft").weights(hand_pairs().replace(chosen_lengths=None))


# --- bco's running mean -------------------------------------------------------------------------------------


def test_bco_uses_the_mean_of_both_rewards_seen_in_earlier_steps() -> None:
    objective, logps = get_objective("bco", beta=0.5), hand_pairs()
    before = objective(logps)
    objective.observe(logps)
    # constant inside a step
    torch.testing.assert_close(objective(logps), before, rtol=0, atol=0)
    assert objective.state is not None
    objective.state.step()
    # rewards 0.5·(0.4 − 0.9 + 0.1 − 0.4 + 0.3 + 0.8) = 0.15 over six values
    delta = 0.15 / 6
    expected = [
        -log_sigmoid(0.5 * u_w - delta) - log_sigmoid(delta - 0.5 * u_l)
        for u_w, u_l in [(0.4, -0.4), (-0.9, 0.3), (0.1, 0.8)]
    ]
    torch.testing.assert_close(objective(logps), vector(*expected), rtol=1e-12, atol=0)


def test_running_mean_over_ranks_and_through_a_checkpoint() -> None:
    mean = RunningMean()
    assert mean.value == 0
    mean.observe(vector(1, 2))
    mean.step(lambda tensor: tensor + vector(6, 1))  # another rank saw one value, 6
    assert mean.value == 3  # (1 + 2 + 6) / 3
    restored = RunningMean()
    restored.load_state_dict(json.loads(json.dumps(mean.state_dict())))
    for state in (mean, restored):
        state.observe(vector(7))
        state.step()
        assert state.value == 4  # (9 + 7) / 4
    mean.step()  # nothing new
    assert mean.value == 4


# --- Pair weights -------------------------------------------------------------------------------------------


def test_pair_weights_in_the_batch_mean() -> None:
    logps = hand_pairs().replace(weights=vector(0.5, 2, 1))
    assert get_objective("dpo").weights(logps).tolist() == [0.5, 2, 1]
    assert get_objective("sft").weights(logps).tolist() == [2, 4, 8]  # times response tokens 4, 2, 8


@pytest.mark.parametrize("name", ["bco", "kto"])
def test_what_pairs_share_counts_a_whole_weight_as_so_many_pairs(name: str) -> None:
    # bco's running mean, kto's K
    pairs = hand_pairs()
    pairs = pairs.replace(kl_chosen=vector(0.3, 0.5, 0.1), ref_kl_chosen=vector(0, 0, 0))
    weighted = pairs.replace(weights=vector(1, 3, 2))
    times = torch.tensor([0, 1, 1, 1, 2, 2])
    losses = []
    for logps in (weighted, pairs.select(times)):
        objective = get_objective(name)
        objective.observe(logps)
        if objective.state is not None:
            objective.state.step()
            # β u = 0.04 −0.09 0.01 and −0.04 0.03 0.08 by 1, 3, 2, both sides
            expected = (0.04 - 0.27 + 0.02 - 0.04 + 0.09 + 0.16) / 12
            assert objective.state.value == pytest.approx(expected, abs=1e-15)
        losses.append(objective(logps))
    torch.testing.assert_close(losses[0][times], losses[1], rtol=1e-12, atol=0)
