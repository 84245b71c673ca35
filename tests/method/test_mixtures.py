"""Weighted sums of objectives: their losses, incentives, states, and what the runner has to know of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama
from torch import Tensor
from workers import resume

from rcpo import PairLogps, RewardCalibrator, get_objective
from rcpo.config.composition import PRIMARY, compose_with, hydra_session, user_part
from rcpo.config.parsing import parse
from rcpo.errors import ConfigError
from rcpo.method.incentives import incentives
from rcpo.method.types import SIDES
from rcpo.system import distributed


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LENGTHS = vector(4, 2, 8), vector(3, 5, 6)


def pairs() -> PairLogps:
    """Sums of token log-probs; the means are those of the chosen responses."""
    chosen = vector(-4.8, -6.2, -3.2)
    return PairLogps(
        *(chosen, vector(-7.5, -3.5, -6.6), vector(-6.4, -4.4, -4.0), vector(-6.3, -5.0, -11.4), *LENGTHS),
        chosen_means=chosen / LENGTHS[0],
        weights=vector(1, 2, 0.5),
        margins=vector(0.2, 0.4, 0.6),
    )


def means(logps: PairLogps) -> PairLogps:
    w, v = LENGTHS
    return logps.replace(
        chosen=logps.chosen / w,
        rejected=logps.losers / v,
        ref_chosen=logps.ref_chosen / w,
        ref_rejected=logps.ref_rejected / v,
    )


MPO = [{"name": "dpo", "weight": 0.8}, {"name": "bco", "weight": 0.2}, {"name": "sft", "weight": 1.0}]


def test_mpo_by_hand() -> None:
    # sums: u_w = (1.6, −1.8, 0.8), u_l = (−1.2, 1.5, 4.8); the supervised part on means −4.8/4 …
    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    rows = [(1.6, -1.2, -1.2), (-1.8, 1.5, -3.1), (0.8, 4.8, -0.4)]
    expected = [
        0.8 * -log_sigmoid(0.1 * (u - v)) + 0.2 * (-log_sigmoid(0.1 * u) - log_sigmoid(-0.1 * v)) - mean
        for u, v, mean in rows
    ]
    torch.testing.assert_close(
        get_objective("mix", parts=MPO)(pairs()), vector(*expected), rtol=1e-12, atol=0
    )


def test_parts_of_other_reductions_need_no_reference() -> None:
    logps = pairs().replace(ref_chosen=None, ref_rejected=None)
    parts = [{"name": "cpo", "reduction": "sum"}, {"name": "simpo", "weight": 2.0}]
    by_sums = get_objective("cpo", reduction="sum")(logps)
    w, v = LENGTHS
    by_means = get_objective("simpo")(logps.replace(chosen=logps.chosen / w, rejected=logps.losers / v))
    torch.testing.assert_close(get_objective("mix", parts=parts)(logps), by_sums + 2 * by_means)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_incentives_add_up(reduction: str) -> None:
    parts = [
        {"name": "dpo", "weight": 0.7, "nll_coef": 0.3},
        {"name": "simpo", "weight": 0.2, "gamma": 0.5},
        {"name": "mappo", "weight": 0.4},
    ]
    logps = pairs() if reduction == "sum" else means(pairs())
    mixed = incentives(get_objective("mix", parts=parts, reduction=reduction), logps)
    expected = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    for settings in parts:
        own = {key: value for key, value in settings.items() if key != "weight"}
        part = get_objective(**own)
        sides = incentives(part, pairs() if part.reduction == "sum" else means(pairs()))
        for side, length in enumerate(LENGTHS):
            # d by the mixture's z: a mean is z / length, a sum z · length
            factor = 1.0 if part.reduction == reduction else 1 / length if reduction == "sum" else length
            expected[side] += settings["weight"] * sides[side] * factor
    for found, wanted in zip(mixed, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_incentives_equal_finite_differences() -> None:
    objective, logps, step = get_objective("mix", parts=MPO, nll_coef=0.5), pairs(), 1e-5
    assert objective.state is not None
    found = incentives(objective, logps)
    for pair in range(3):
        e = step * torch.eye(3, dtype=torch.float64)[pair]
        upper, lower = (
            objective(
                logps.replace(chosen=logps.chosen + h, chosen_means=(logps.chosen + h) / LENGTHS[0])
            ).sum()
            for h in (e, -e)
        )
        assert found[0][pair].item() == pytest.approx(-(upper - lower).item() / (2 * step), rel=1e-7)
        upper, lower = (objective(logps.replace(rejected=logps.losers + h)).sum() for h in (e, -e))
        assert found[1][pair].item() == pytest.approx((upper - lower).item() / (2 * step), rel=1e-7)


def test_calibration_scales_the_two_sides_of_a_mixture() -> None:
    objective, logps = get_objective("mix", parts=MPO), pairs()
    d_w, d_l = incentives(objective, logps)
    calibrator = RewardCalibrator()
    calibrator.alpha = 1.7
    chosen, rejected = logps.chosen.clone().requires_grad_(), logps.losers.clone().requires_grad_()
    leaves = logps.replace(chosen=chosen, rejected=rejected)
    plain, calibrated = objective(logps), objective(calibrator.calibrate(leaves))
    assert torch.equal(plain, calibrated)
    by_chosen, by_rejected = torch.autograd.grad(calibrated.sum(), [chosen, rejected])
    torch.testing.assert_close(by_chosen, -1.7 * d_w, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_rejected, d_l / 1.7, rtol=1e-12, atol=0)


def test_a_parts_running_mean_survives_a_checkpoint() -> None:
    objective, logps = get_objective("mix", parts=MPO), pairs()
    objective.observe(logps)
    assert objective.state is not None
    objective.state.step()
    # β u of both sides by weights 1, 2, 0.5: 0.1 (1.6 − 3.6 + 0.4 − 1.2 + 3 + 2.4) / 7
    alone = get_objective("bco")
    assert alone.state is not None
    alone.state.load_state_dict({"total": 0.1 * 2.6, "count": 7.0})
    other = get_objective("mix", parts=MPO)
    assert other.state is not None
    other.state.load_state_dict(json.loads(json.dumps(objective.state.state_dict())))
    bare = get_objective("mix", parts=[MPO[0], MPO[2]])
    for one in (objective, other):
        torch.testing.assert_close(one(logps), bare(logps) + 0.2 * alone(logps), rtol=1e-12, atol=0)


def test_what_the_runner_has_to_know() -> None:
    mixed = get_objective("mix", parts=MPO)
    assert (mixed.needs_reference, mixed.needs_rejected, mixed.sides, mixed.reduction) == (
        True,
        True,
        ("chosen", "rejected"),
        "sum",
    )
    assert not mixed.spec.token_weighted and not mixed.spec.couples_batch and mixed.margin_ranges == []
    free = get_objective("mix", parts=[{"name": "simpo"}, {"name": "sft"}])
    assert not free.needs_reference and free.reduction == "mean"
    assert get_objective("mix", parts=[{"name": "sft"}]).spec.token_weighted
    coupled = get_objective("mix", parts=[{"name": "kto"}, {"name": "apo_zero_unpaired"}])
    assert coupled.spec.couples_batch and coupled.spec.takes_unpaired
    assert coupled.sides == ("chosen", "rejected", "mismatched")
    assert get_objective("mix", parts=[{"name": "kto"}, {"name": "tpo"}]).sides == SIDES
    scored = get_objective("mix", parts=[{"name": "mappo", "score_scale": 0.1}, {"name": "rpo_sq"}])
    assert scored.margin_ranges == [(0.1, (0.0, 1.0)), (1.0, (-math.inf, math.inf))]
    progressing = get_objective("mix", parts=[{"name": "dpo_shift", "shift_start": 0.5, "shift_end": 1.0}])
    progressing.progress = 1.0
    torch.testing.assert_close(progressing(pairs()), get_objective("dpo")(pairs()), rtol=1e-12, atol=0)


def test_rewards_are_those_of_the_first_part() -> None:
    logps = pairs()
    for reduction, z in (("sum", logps), ("mean", means(logps))):
        parts = [{"name": "simpo"}, {"name": "dpo"}]
        found = get_objective("mix", parts=parts, reduction=reduction).rewards(z)
        for one, other in zip(found, get_objective("simpo").rewards(means(logps)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": []}, r"objective\.parts is empty"),
        (
            {"parts": [{"name": "dpoo"}]},
            r"objective\.parts\[0\]: .*'dpoo' is not registered; did you mean 'dpo'",
        ),
        ({"parts": [{"name": "dpo"}, {"name": "dpo", "gama": 1}]}, r"objective\.parts\[1\]: .*'gama'"),
        (
            {"parts": [{"name": "dpo", "module": "no.such"}]},
            r"objective\.parts\[0\]: objective\.module=no\.such cannot be imported: No module named 'no'",
        ),
        ({"parts": [{"name": "dpo"}, {"name": "tidpo"}]}, r"reduction=importance goes with no other"),
        (
            {"parts": [{"name": "kto"}], "reduction": "mean"},
            r"kto takes reduction=sum, which objective\.reduction",
        ),
        (
            {"parts": [{"name": "dpo"}, {"name": "mix", "parts": [{"name": "sft"}]}]},
            r"objective\.parts\[1\]: a mixture cannot be a part of another; list the inner parts",
        ),
    ],
)
def test_mixtures_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_objective("mix", **settings)


FIVE_LINES = """\
name: mix
parts:
  - {name: dpo, weight: 0.8}
  - {name: bco, weight: 0.2, beta: 0.5}
  - {name: simper, weight: 0.5}
"""


def test_a_mixture_of_five_lines_trains_with_calibration_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "objective"
    folder.mkdir(parents=True)
    (folder / "blend.yaml").write_text(FIVE_LINES)
    with hydra_session(str(tmp_path / "conf")) as hydra:
        composed = parse(user_part(compose_with(hydra, PRIMARY, ["objective=blend", "rc=on"])))
    assert composed.rc.enabled and composed.objective.hyperparameters["parts"][1]["beta"] == 0.5
    model, data = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24, weighted=True)
    config = resume.configuration(model, data)
    config.objective = composed.objective
    distributed.initialize()
    assert resume.compare(config, tmp_path / "runs", [3]) == ""
    trainer = resume.part(config, tmp_path / "run", 2)
    assert trainer.dynamics.calibrator is not None and trainer.dynamics.calibrator.alpha != 1
    assert trainer.objective.state is not None and trainer.objective.state.state_dict()["1"]["count"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.parts=[]", r"objective\.parts=\[\] is not a list of"),
        ("objective.parts=[dpo]", r"objective\.parts\[0\]=dpo is not a part of a list of"),
        ("objective.parts=[{weight:1}]", r"objective\.parts\[0\]=.* is not a part of a list of"),
        ("objective.parts=[{name:dpo,weight:0}]", r"objective\.parts\[0\]\.weight=0 is out of range"),
        ("objective.parts=[{name:dpo,beta:-1}]", r"objective\.parts\[0\]\.beta=-1 is out of range"),
        ("objective.parts=[{name:dpo,divergence:kl}]", r"objective\.parts\[0\]\.divergence=kl is not one of"),
        ("objective.parts=[{name:dpo,nll_coef:x}]", r"objective\.parts\[0\]\.nll_coef='x' is not a number"),
    ],
)
def test_parts_are_checked_as_objectives_are(override: str, message: str) -> None:
    with hydra_session() as hydra, pytest.raises(ConfigError, match=message):
        parse(user_part(compose_with(hydra, PRIMARY, ["objective=mix", override])))
