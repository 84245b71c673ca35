"""Incentives against the reference code, closed forms and finite differences; the calibrated backward."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcpo.method.calibration import RewardCalibrator
from rcpo.method.incentives import incentives
from rcpo.method.logps import sequence_logps, token_weights
from rcpo.method.objectives import Objective, Specification, get_objective, names, specification
from rcpo.method.types import PairLogps

REFERENCE = json.loads((Path(__file__).parent / "reference" / "objectives.json").read_text())
NAMES = [name for name in names() if specification(name).loss.__module__ == "rcpo.method.losses"]
REDUCTIONS = ("sum", "mean", "importance")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def published() -> dict[str, Objective]:
    hyper = REFERENCE["hyper"]
    return {
        "DPO": get_objective("dpo", beta=hyper["beta"]),
        "BCE": get_objective("bce"),
        "CPO": get_objective("cpo", beta=hyper["cpo_beta"], lambda_nll=hyper["cpo_lambda_nll"]),
        "IPO": get_objective("ipo", tau=hyper["ipo_tau"]),
        "SIMPO": get_objective("simpo", beta=hyper["beta"], gamma=hyper["simpo_target_margin"]),
        "SLIC": get_objective("slic", gamma=hyper["slic_gamma"], lambda_nll=hyper["slic_lambda_coef"]),
        "LSIF": get_objective("lsif"),
        "UKL": get_objective("ukl"),
        "DDRO": get_objective("ddro"),
    }


@pytest.mark.parametrize("name", REFERENCE["objectives"])
def test_incentives_of_the_reference_code(name: str) -> None:
    z_w, z_l, r_w, r_l = (vector(*REFERENCE[key]) for key in ("zw", "zl", "ref_w", "ref_l"))
    d_w, d_l = incentives(published()[name], PairLogps(z_w, z_l, r_w, r_l))
    expected = REFERENCE["objectives"][name]
    torch.testing.assert_close(d_w, vector(*expected["incentive_w"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(d_l, vector(*expected["incentive_l"]), rtol=1e-12, atol=0)


# Policy = reference and z_w = z_l = −log 2, so u = m = Δ = 0 and σ(0) = 1/2. Columns: loss, d_w, d_l.
LOG2 = math.log(2)
SIGMOID1 = 1 / (1 + math.exp(-1))
MARGIN = 0.3  # of the scores of every pair here
P = 1 / (1 + math.exp(-MARGIN))
AT_THE_START = {
    "dpo": (LOG2, 0.05, 0.05),  # β/2
    "tidpo": (LOG2, 0.05, 0.05),
    "aot": (LOG2, 0.05, 0.05),
    "aot_unpaired": (LOG2, 0.05, 0.05),
    "robust": (LOG2, 0.0625, 0.0625),  # (0.9 β/2 + 0.1 β/2) / 0.8
    "ipo": (25, 10, 10),  # (0 − 5)², 2·5
    "hinge": (1, 0.1, 0.1),  # β
    # KL(½ ‖ 0.999); the slope by x = βm is σ'(0) [log(½/0.999) − log(½/0.001)] = −¼ log 999
    "exo": (
        0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
        0.025 * math.log(999),
        0.025 * math.log(999),
    ),
    "nca": (2 * LOG2, 0.025, 0.025),  # d_w = β/2 − β/4, d_l = β/4
    "bco": (2 * LOG2, 0.05, 0.05),
    "sppo": (50, 10, 10),  # 2·5² and 2·5
    "apo_zero": (1, 0.025, 0.025),  # βσ'(0) = β/4
    "apo_down": (1, 0, 0.025),  # winner: −β/4 + β/4
    # s = ½, ds/dx = ¼/0.05 = 5: slope by x = 5·(−log 2) − ½·½ + 5 − ½; both incentives are negative here
    "discopop": (0.5 * LOG2 + 0.5, -0.1 * (4.25 - 5 * LOG2), -0.1 * (4.25 - 5 * LOG2)),
    "dpop": (LOG2, 0.05, 0.05),  # no penalty at u_w = 0
    "dpo_shift": (LOG2, 0.05, 0.0375),  # β/2, and 0.75 of it
    "cal_dpo": (LOG2 + 250**2, 250.5, 250.5),  # σ(0), and the square's slope 250
    "bdpo": (LOG2, 0.05, 0.025),  # half of the mixture is the policy
    "mappo": (LOG2, 0.05, 0.015),  # 0.3 β/2
    "rpo_sq": (0.09, 0.06, 0.06),  # (0 − 0.3)², 2·0.3 β
    "rpo_bwd_kl": (
        P * math.log(2 * P) + (1 - P) * math.log(2 * (1 - P)),
        0.1 * (P - 0.5),  # the slope by x = βm is σ(x) − P
        0.1 * (P - 0.5),
    ),
    "rpo_fwd_kl": (
        0.5 * math.log(0.5 / P) + 0.5 * math.log(0.5 / (1 - P)),
        0.1 * 0.3 / 4,  # σ'(0) [log(½/P) − log(½/(1−P))] = −¼ · 0.3
        0.1 * 0.3 / 4,
    ),
    "apo_zero_unpaired": (1, 0.025, 0.025),  # βσ'(0)
    "simper": (0, 0.5, 0.5),  # e^z
    "bce": (2 * LOG2, 0.5, 0.5),
    "kto": (1, 0.025, 0.025),  # K = 0, βσ'(0)
    "lsif": (-0.5, 1, 1),  # e^0, e^(2·0)
    "ukl": (LOG2 + 1, 1, 1),
    "ddro": (2 * LOG2, 1, 1),  # q/(2 − q) = 1
    "simpo": (math.log(1 + math.e), 2 * SIGMOID1, 2 * SIGMOID1),  # −logσ(−γ), βσ(γ)
    # d reward/dz = e^(−αz) = 2^(1/4)
    "alphapo": (math.log(1 + math.e), 2 * SIGMOID1 * 2**0.25, 2 * SIGMOID1 * 2**0.25),
    "cpo": (2 * LOG2, 1.05, 0.05),  # β/2 + λ
    "orpo": (1.1 * LOG2, 1.1, 0.1),  # d log-odds/dz = 1/(1 − p) = 2: 1 + β·½·2
    "slic": (1 + 0.1 * LOG2, 1.1, 1),
    "tpo": (LOG2 + 0.7, 0.005, 0.005),  # β/2; the gold answer pulls on neither side
    "sft": (LOG2, 1, 0),
}


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start(name: str) -> None:
    z = vector(-LOG2, -LOG2)
    margins = torch.full_like(z, MARGIN)
    gold = torch.full_like(z, -0.7)
    logps = PairLogps(z, z, z, z, kl_chosen=z, ref_kl_chosen=z, margins=margins, gold_means=gold)
    objective = get_objective(name)
    loss, d_w, d_l = (vector(value, value) for value in AT_THE_START[name])
    close = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(objective(logps), loss, **close)
    torch.testing.assert_close(incentives(objective, logps)[0], d_w, **close)
    torch.testing.assert_close(incentives(objective, logps)[1], d_l, **close)


# --- Finite differences and the backward pass, every objective and reduction ---------------------------

PAIRS = 5
LENGTHS = torch.tensor([3, 1, 4, 2, 6, 2, 5, 1, 3, 4])  # chosen, then rejected
SEQUENCES = torch.repeat_interleave(torch.arange(2 * PAIRS), LENGTHS)


def token_logps(seed: int) -> Tensor:
    """Log-probs of the response tokens under a made-up policy, (31,)."""
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(int(LENGTHS.sum()), generator=generator, dtype=torch.float64) * 1.5 - 0.05


def reduce_pairs(reduction: str, tokens: Tensor) -> tuple[PairLogps, Tensor]:
    """The pairs, as the scorer makes them, and each token's weight in its sequence's z."""
    weights = token_weights(tokens, SEQUENCES, LENGTHS, reduction)
    means = token_weights(tokens, SEQUENCES, LENGTHS, "mean")
    z, r, mean = (
        sequence_logps(values, c, SEQUENCES, 2 * PAIRS).view(2, PAIRS)
        for values, c in ((tokens, weights), (token_logps(99), weights), (tokens, means))
    )
    kl, ref_kl = token_logps(5)[:PAIRS], token_logps(6)[:PAIRS]
    margins = torch.full((PAIRS,), MARGIN, dtype=torch.float64)
    logps = PairLogps(
        *(*z, *r, LENGTHS[:PAIRS], LENGTHS[PAIRS:], mean[0], kl, ref_kl),
        margins=margins,
        gold_means=token_logps(7)[:PAIRS],
    )
    return logps, weights


def objectives(name: str, reduction: str, nll_coef: float) -> Objective:
    objective = get_objective(name, reduction=reduction, nll_coef=nll_coef)
    if objective.state is not None:  # bco's δ away from 0
        objective.state.observe(vector(0.3))
        objective.state.step()
    return objective


STEP = 1e-5


def noise(objective: Objective, logps: PairLogps) -> float:
    """What rounding leaves of a difference quotient: 1e-10 for most, 1e-4 on ddro's tail (slope 10⁶)."""
    return 1e-8 + 2e-16 * float(objective(logps).detach().abs().max()) / STEP


def finite_differences(objective: Objective, logps: PairLogps, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(d_w, d_l) by central differences of the summed loss; the chosen mean moves by `slope` with z_w."""
    assert logps.rejected is not None and logps.chosen_means is not None
    d_w, d_l = torch.zeros(PAIRS, dtype=torch.float64), torch.zeros(PAIRS, dtype=torch.float64)
    for pair in range(PAIRS):
        e = STEP * torch.eye(PAIRS, dtype=torch.float64)[pair]
        upper, lower = (
            objective(logps.replace(chosen=logps.chosen + h, chosen_means=logps.chosen_means + h * slope))
            for h in (e, -e)
        )
        d_w[pair] = -(upper - lower).sum() / (2 * STEP)
        upper, lower = (objective(logps.replace(rejected=logps.rejected + h)) for h in (e, -e))
        d_l[pair] = (upper - lower).sum() / (2 * STEP)
    return d_w, d_l


CASES = [
    (name, reduction, nll_coef)
    for name in NAMES
    for reduction in REDUCTIONS
    for nll_coef in (0.0, 0.7)
    if not (nll_coef and reduction == "importance")
]


@pytest.mark.parametrize(("name", "reduction", "nll_coef"), CASES)
def test_incentives_equal_finite_differences(name: str, reduction: str, nll_coef: float) -> None:
    objective = objectives(name, reduction, nll_coef)
    logps, _ = reduce_pairs(reduction, token_logps(1))
    # ∂ mean/∂z_w: for sums 1/3, 1/1, 1/4, 1/2, 1/6; else the mean is z itself
    slope = 1 / vector(3, 1, 4, 2, 6) if reduction == "sum" else torch.ones(PAIRS, dtype=torch.float64)
    expected = finite_differences(objective, logps, slope)
    found = incentives(objective, logps)
    assert sum(side.abs().sum() for side in found) > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=noise(objective, logps))
        assert not ours.requires_grad


ALPHA = 1.7


@pytest.mark.parametrize(("name", "reduction", "nll_coef"), CASES)
def test_backward_with_calibration(name: str, reduction: str, nll_coef: float) -> None:
    """At the tokens of pair i: −α d_w c_t on the chosen and (d_l/α) c_t on the rejected side."""
    objective = objectives(name, reduction, nll_coef)
    tokens = token_logps(2).requires_grad_()
    logps, weights = reduce_pairs(reduction, tokens)
    calibrator = RewardCalibrator()
    calibrator.alpha = ALPHA
    if not objective.needs_rejected:
        with pytest.raises(ValueError, match="rc=on needs a rejected side"):
            calibrator.calibrate(logps.replace(rejected=None))
        return
    plain, calibrated = objective(logps), objective(calibrator.calibrate(logps))
    assert torch.equal(plain, calibrated), "forward values must not change by a single bit"

    (gradient,) = torch.autograd.grad(calibrated.sum(), tokens)
    slope = 1 / vector(3, 1, 4, 2, 6) if reduction == "sum" else torch.ones(PAIRS, dtype=torch.float64)
    with torch.no_grad():
        d_w, d_l = finite_differences(objective, logps, slope)
    expected = torch.cat([-ALPHA * d_w, d_l / ALPHA])[SEQUENCES] * weights
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=noise(objective, logps))


@pytest.mark.parametrize("name", [name for name in NAMES if specification(name).needs_rejected])
def test_calibration_keeps_every_bit_of_the_forward_pass(name: str) -> None:
    objective = get_objective(name)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        z_w, z_l, r_w, r_l = -torch.rand(4, 200, generator=generator, dtype=dtype) * 3
        margins = torch.full_like(z_w, MARGIN)
        logps = PairLogps(
            *(z_w, z_l, r_w, r_l), kl_chosen=z_w, ref_kl_chosen=r_w, margins=margins, gold_means=r_w
        )
        for alpha in (1 / 3, 7.3):
            calibrator = RewardCalibrator()
            calibrator.alpha = alpha
            assert torch.equal(objective(calibrator.calibrate(logps)), objective(logps))


def test_published_calibration_is_the_stop_gradient_form() -> None:
    # z_w_rc = α z_w + (1−α) sg(z_w), z_l_rc = z_l/α + (1−1/α) sg(z_l): the same gradients through the loss
    z_w, z_l = vector(-1.0, -2.0).requires_grad_(), vector(-1.5, -0.5).requires_grad_()
    calibrator = RewardCalibrator()
    calibrator.alpha = ALPHA
    ours = get_objective("simpo")(calibrator.calibrate(PairLogps(z_w, z_l))).sum()
    w = ALPHA * z_w + (1 - ALPHA) * z_w.detach()
    v = z_l / ALPHA + (1 - 1 / ALPHA) * z_l.detach()
    theirs = torch.nn.functional.softplus(1 - 2 * (w - v)).sum()
    for a, b in zip(
        torch.autograd.grad(ours, [z_w, z_l]), torch.autograd.grad(theirs, [z_w, z_l]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_incentives_leave_the_graph_of_the_log_probs_alone() -> None:
    z_w, z_l = vector(-1.0).requires_grad_(), vector(-2.0).requires_grad_()
    logps = PairLogps(z_w * 2, z_l * 2)
    with torch.no_grad():  # as in an evaluation
        d_w, _ = incentives(get_objective("simpo"), logps)
    # Δ = 2: βσ(γ − βΔ) = 2σ(1 − 4)
    assert d_w.item() == pytest.approx(2 / (1 + math.exp(3)), rel=1e-12)
    assert z_w.grad is None and z_l.grad is None
    get_objective("simpo")(logps).sum().backward()
    assert z_w.grad is not None and z_w.grad.item() == pytest.approx(-4 / (1 + math.exp(3)), rel=1e-12)


def test_a_loss_of_the_rejected_side_alone_has_no_incentive_for_the_chosen() -> None:
    d_w, d_l = incentives(lambda logps: 3 * logps.losers, PairLogps(vector(-1.0), vector(-2.0)))
    assert (d_w.tolist(), d_l.tolist()) == ([0.0], [3.0])


def test_a_side_that_the_loss_ignores_has_no_incentive() -> None:
    logps = PairLogps(vector(-1.0), vector(-2.0), vector(-1.0), vector(-2.0))
    assert incentives(get_objective("sft"), logps)[1].tolist() == [0.0]
    assert incentives(get_objective("sft"), logps.replace(rejected=None))[1].tolist() == [0.0]


def test_the_chosen_mean_moves_with_z_from_where_it_is() -> None:
    # the loss m² − m of a mean m = −3 that is not z / length = −4 / 2: (2m − 1) ∂m/∂z = −7 · ½
    def squared(logps: PairLogps) -> Tensor:
        assert logps.chosen_means is not None
        return logps.chosen_means.square()

    spec = Specification("squared", squared, "sum", needs_reference=False)
    objective = Objective(spec, "sum", 1.0, {})
    z = torch.tensor([-4.0])
    logps = PairLogps(z, z, chosen_lengths=torch.tensor([2]), chosen_means=torch.tensor([-3.0]))
    d_w, d_l = incentives(objective, logps)
    assert (d_w.item(), d_l.item()) == (3.5, 0.0)
