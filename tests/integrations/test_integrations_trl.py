"""Calibrated TRL trainers: TRL's own numbers where nothing is calibrated, rcpo's where it is."""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import build, history, sums, sums_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from rcpo.data.batches import GlobalBatches
from rcpo.integrations.trl import (
    CalibratedCPOTrainer,
    CalibratedDPOTrainer,
    CalibratedKTOTrainer,
    CalibratedORPOTrainer,
    RewardCalibrationConfig,
    RewardCalibrationMixin,
)
from rcpo.integrations.trl import _is_newer_than_tested as is_newer_than_tested

HERE = Path(__file__).parent
WORKER = str(HERE.parent / "workers" / "trl_ranks.py")
EXACT = RewardCalibrationConfig(sketch=None)


def with_path(*folders: Path) -> dict[str, str]:
    """This environment, with folders to import from first."""
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *([known] if known else [])])}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_without_calibration_it_is_trls_trainer(tmp_path: Path) -> None:
    rows = sums(tmp_path, 32)
    theirs = build(tmp_path, rows, False, cls=DPOTrainer)
    off = build(tmp_path, rows, None)
    measured = build(tmp_path, rows, RewardCalibrationConfig(enabled=False))
    for trainer in (theirs, off, measured):
        trainer.train()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")
    assert history(off, *names) == history(theirs, *names) == history(measured, *names)
    for trainer in (off, measured):
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer).values(), weights(theirs).values()))
    assert all(row[0] > 0 for row in history(measured, "dynamics/score_norm_chosen"))
    assert "rc/alpha" not in measured.state.log_history[0]


# What TRL documents of its DPO trainer; its source distribution holds no tests to run in their place.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "precomputed reference": {"precompute_ref_log_probs": True},
    "label smoothing": {"label_smoothing": 0.2},
    "weighted mix": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "weighting (WPO)": {"use_weighting": True},
    "length desensitised": {"ld_alpha": 0.5},
    "alpha divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "synchronised reference": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "activation checkpointing": {"gradient_checkpointing": True},
    "truncation": {"max_length": 12},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    "checkpoints": {"save_strategy": "steps", "save_steps": 1},
    "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    "messages": {"messages": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_trl_documents_is_unchanged(tmp_path: Path, name: str) -> None:
    settings = dict(DOCUMENTED[name])
    rows = sums(tmp_path, 16)
    if settings.pop("messages", False):
        rows = [
            {key: [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}] for key in row}
            for row in rows
        ]
    if "eval_strategy" in settings:
        settings["eval_rows"] = rows[:8]
    logs = []
    for cls, rc in ((DPOTrainer, False), (CalibratedDPOTrainer, None), (CalibratedDPOTrainer, EXACT)):
        if "sync_ref_model" in settings:
            path = sums_model(tmp_path)
            settings["ref_model"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trainer = build(tmp_path, rows, rc, cls=cls, max_steps=2, **settings)
        trainer.train()
        timed = ("runtime", "per_second", "total_flos")
        log = trainer.state.log_history
        logs.append([{k: v for k, v in row.items() if not k.endswith(timed)} for row in log])
    theirs, off, calibrated = logs
    assert off == theirs and len(theirs) >= 3
    assert calibrated[0]["rc/alpha"] == 1.0 and calibrated[0]["loss"] == theirs[0]["loss"]


@pytest.mark.slow
def test_the_same_run_as_rcpos(tmp_path: Path) -> None:
    # same model, pairs, order, batches and hyper-parameters
    rows, steps = sums(tmp_path, 32), 20
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "rcpo.cli", "train", "objective=ipo", "objective.tau=0.1", "rc=on"),
        "model=local",
        *(f"model.path={sums_model(tmp_path)}", "data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}"),
        *(f"data.eval_path={tmp_path / 'pairs.jsonl'}", f"train.max_steps={steps}", "train.batch_size=8"),
        *("train.micro_batch_size=8", "optim.lr=2e-4", "wandb.mode=disabled", f"hydra.run.dir={run}"),
        *("eval.max_examples=8", "eval.generate_examples=1"),
    ]
    forked.run(command, check=True)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [json.loads(line) for line in lines]

    batches = GlobalBatches(len(rows), 8, seed=1)
    order = chain.from_iterable(batches.indices(step) for step in range(steps))
    trainer = build(
        tmp_path, [rows[i] for i in order], RewardCalibrationConfig(), max_steps=steps, beta=0.1,
        loss_type=["ipo"], max_length=None, learning_rate=2e-4, optim="adamw_torch_fused",
    )  # fmt: skip
    trainer.train()
    names = ("loss", "rc/alpha", "dynamics/incentive_chosen", "dynamics/score_cosine")
    for mine, theirs in zip(ours, history(trainer, *names), strict=True):
        assert [mine[name] for name in names] == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    final = load_file(run / "final" / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        if name in final:
            torch.testing.assert_close(final[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_the_loop_reads_what_rcpos_does(tmp_path: Path, precompute: bool) -> None:
    # 32 pairs are four steps of one epoch, in which every pair is new
    rows, steps = sums(tmp_path, 32), 4
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "rcpo.cli", "train", "objective=dpo", "rc=loop", "rc.target=0.5"),
        "model=local",
        *(f"model.path={sums_model(tmp_path)}", "data=pairs", f"data.path={tmp_path / 'pairs.jsonl'}"),
        *(f"data.eval_path={tmp_path / 'pairs.jsonl'}", f"train.max_steps={steps}", "train.batch_size=8"),
        *("train.micro_batch_size=8", "optim.lr=2e-3", "wandb.mode=disabled", f"hydra.run.dir={run}"),
        *("eval.max_examples=8", "eval.generate_examples=1"),
    ]
    forked.run(command, check=True)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [json.loads(line) for line in lines]
    batches = GlobalBatches(len(rows), 8, seed=1)
    order = chain.from_iterable(batches.indices(step) for step in range(steps))
    trainer = build(
        tmp_path, [rows[i] for i in order], RewardCalibrationConfig(rule="loop", target=0.5),
        max_steps=steps, beta=0.1, max_length=None, learning_rate=2e-3, optim="adamw_torch_fused",
        precompute_ref_log_probs=precompute,
    )  # fmt: skip
    trainer.train()
    names = ("loss", "rc/alpha", "rc/winner", "rc/loser", "rc/integral")
    for mine, theirs in zip(ours, history(trainer, *names), strict=True):
        assert [mine[name] for name in names] == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours[-1]["rc/alpha"] > 1.1


def test_the_loop_needs_a_trainer_that_shows_its_reference(tmp_path: Path) -> None:
    rows = sums(tmp_path, 8)
    with pytest.raises(ValueError, match=r"rc\.rule=loop reads log-ratios .* use CalibratedDPOTrainer"):
        build(
            tmp_path, rows, RewardCalibrationConfig(rule="loop"), cls=CalibratedCPOTrainer, config=CPOConfig,
            max_length=64,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"rc\.rule=loop .* sync_ref_model=True moves the reference"):
        build(tmp_path, rows, RewardCalibrationConfig(rule="loop"), sync_ref_model=True)
    with pytest.raises(ValueError, match=r"rc\.scope=pair"):
        RewardCalibrationConfig(scope="pair")


LOSSES: list[tuple[list[str], dict[str, Any]]] = [
    (["sigmoid"], {}),
    (["hinge"], {}),
    (["exo_pair"], {"label_smoothing": 0.1}),
    (["nca_pair"], {}),
    (["robust"], {"label_smoothing": 0.1}),
    (["bco_pair"], {}),
    (["sppo_hard"], {}),
    (["aot"], {}),
    (["aot_unpaired"], {}),
    (["apo_zero"], {}),
    (["apo_down"], {}),
    (["discopop"], {}),
    (["ipo"], {}),
    (["sigmoid_norm"], {}),
    (["sigmoid"], {"ld_alpha": 0.5}),
    (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    (["sigmoid"], {"use_weighting": True}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "settings"), LOSSES, ids=lambda value: "+".join(map(str, value)))
def test_calibration_steers_every_loss(
    tmp_path: Path, loss_type: list[str], settings: dict[str, Any]
) -> None:
    # With the EMA off and micro-batch updates, both sides pull alike on the head: α d_w ‖s_w‖ = d_l ‖s_l‖/α
    rc = RewardCalibrationConfig(update="microbatch", ema=0.0, sketch=None, alpha_max=None)
    trainer = build(tmp_path, sums(tmp_path, 8), rc, max_steps=1, loss_type=loss_type, **settings)
    trainer.train()
    row = trainer.state.log_history[0]
    if loss_type in (["apo_down"], ["discopop"]):
        # where both log-ratios are 0 these give the winner no positive incentive: nothing to calibrate by
        assert row["dynamics/incentive_chosen"] < 1e-6 and row["rc/skipped"] == 1
    else:
        r, center = row["dynamics/incentive_ratio"], row["dynamics/band_center"]
        assert row["rc/alpha"] == pytest.approx(math.sqrt(center / r), rel=1e-9)
        assert row["rc/calibrated_ratio"] == pytest.approx(center, rel=1e-9)
    plain = build(tmp_path, sums(tmp_path, 8), None, max_steps=1, loss_type=loss_type, **settings)
    plain.train()
    assert plain.state.log_history[0]["loss"] == row["loss"]


def test_gradients_are_those_of_scaled_sides(tmp_path: Path) -> None:
    # by autograd: the gradient through the chosen rows × α plus that through the rejected ones ÷ α
    rows = sums(tmp_path, 8)
    trainer = build(tmp_path, rows, EXACT, max_steps=1)
    trainer.calibrator.alpha = 3.0
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs).backward()
    steered = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    sides: list[dict[str, torch.Tensor]] = []
    for side in range(2):
        trainer.model.zero_grad()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = trainer.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True,
        )  # fmt: skip
        z = list(output.log_probs.sum(1).chunk(2))
        z[1 - side] = z[1 - side].detach()
        u = [a - a.detach() for a in z]  # the policy is the reference at the start: log-ratios are 0
        (-torch.nn.functional.logsigmoid(trainer.beta * (u[0] - u[1])).mean()).backward()
        sides.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    for name, gradient in steered.items():
        torch.testing.assert_close(gradient, 3 * sides[0][name] + sides[1][name] / 3, rtol=1e-4, atol=1e-6)


def test_head_scores_are_the_heads_gradients(tmp_path: Path) -> None:
    # by autograd of Σ z by the head's matrix, in float32, sums of two losses' sides
    trainer = build(tmp_path, sums(tmp_path, 8), EXACT, max_steps=1)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    output = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
        use_cache=False, fused_lm_head=True,
    )  # fmt: skip
    chosen, rejected = output.log_probs.sum(1).chunk(2)
    head = model.lm_head.weight
    g_w, g_l = (torch.autograd.grad(z.mean(), head, retain_graph=True)[0] for z in (chosen, rejected))
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["dynamics/score_norm_chosen"] == pytest.approx(float(g_w.norm()), rel=1e-5)
    assert row["dynamics/score_norm_rejected"] == pytest.approx(float(g_l.norm()), rel=1e-5)
    cosine = float((g_w * g_l).sum() / g_w.norm() / g_l.norm())
    assert row["dynamics/score_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert row["dynamics/incentive_chosen"] == pytest.approx(0.05, rel=1e-6)  # β σ(0)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_accumulation_changes_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = sums(tmp_path, 32)
    whole = build(tmp_path, rows, EXACT, **settings)
    parts = build(
        tmp_path, rows, EXACT, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    whole.train()
    parts.train()
    names = ("rc/alpha", "dynamics/incentive_ratio", "dynamics/score_norm_chosen", "dynamics/score_cosine")
    for a, b in zip(history(whole, *names), history(parts, *names), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_resumed_run_goes_on_with_its_calibration(tmp_path: Path) -> None:
    rows = sums(tmp_path, 64)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = build(tmp_path / "a", rows, EXACT, **settings)
    whole.train()
    again = build(tmp_path / "a", rows, EXACT, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-3"))
    assert history(again, "loss", "rc/alpha") == history(whole, "loss", "rc/alpha")
    assert again.calibrator.state_dict() == whole.calibrator.state_dict()
    (tmp_path / "a" / "out" / "checkpoint-3" / "reward_calibration.json").unlink()
    with pytest.raises(ValueError, match=r"holds no reward_calibration\.json"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-3"))


def test_lora_measures_the_frozen_head(tmp_path: Path) -> None:
    rows = sums(tmp_path, 8)
    full = build(tmp_path, rows, EXACT, max_steps=1)
    full.train()
    model = AutoModelForCausalLM.from_pretrained(sums_model(tmp_path), dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    lora = build(tmp_path, rows, EXACT, model=adapted, max_steps=1)
    lora.train()
    names = [name for name in full.state.log_history[0] if name.startswith(("dynamics/", "rc/"))]
    for name in names:
        assert lora.state.log_history[0][name] == pytest.approx(full.state.log_history[0][name], rel=1e-6)


CONCATENATED: list[tuple[type, type, dict[str, Any]]] = [
    (CalibratedCPOTrainer, CPOConfig, {"loss_type": "sigmoid"}),
    (CalibratedCPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    (CalibratedCPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.5}),
    (CalibratedORPOTrainer, ORPOConfig, {}),
]


@pytest.mark.parametrize(("cls", "config", "settings"), CONCATENATED)
def test_reference_free_trainers(tmp_path: Path, cls: type, config: type, settings: dict[str, Any]) -> None:
    rows = sums(tmp_path, 8)
    rc = RewardCalibrationConfig(update="microbatch", ema=0.0, sketch=None, alpha_max=None)
    common = {"cls": cls, "config": config, "max_steps": 1, "max_length": 64, **settings}
    trainer = build(tmp_path, rows, rc, **common)
    trainer.train()
    row = trainer.state.log_history[0]
    r, center = row["dynamics/incentive_ratio"], row["dynamics/band_center"]
    assert row["rc/alpha"] == pytest.approx(math.sqrt(center / r), rel=1e-6)
    plain = build(tmp_path, rows, None, **common)
    plain.train()
    assert plain.state.log_history[0]["loss"] == row["loss"]


def test_incentives_of_cpo_are_its_formula(tmp_path: Path) -> None:
    # −logσ(βΔ) − λ(mean over all chosen tokens): d_w = β σ(−βΔ) + λ B/Σn, d_l = β σ(−βΔ), all by hand
    trainer = build(
        tmp_path, sums(tmp_path, 8), EXACT, cls=CalibratedCPOTrainer, config=CPOConfig, max_steps=1,
        max_length=64, beta=0.3, cpo_alpha=0.7,
    )  # fmt: skip
    model = trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
    tokens = int((batch["chosen_labels"][:, 1:] != -100).sum())
    pull = 0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).double().mean()
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["dynamics/incentive_rejected"] == pytest.approx(float(pull), rel=1e-5)
    assert row["dynamics/incentive_chosen"] == pytest.approx(float(pull) + 0.7 * 8 / tokens, rel=1e-5)


def test_kto_with_unequal_sides(tmp_path: Path) -> None:
    pairs = sums(tmp_path, 8)
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": True} for p in pairs[:6]]
    rows += [{"prompt": p["prompt"], "completion": p["rejected"], "label": False} for p in pairs[:2]]
    rc = RewardCalibrationConfig(update="microbatch", ema=0.0, sketch=None, alpha_max=None)
    trainer = build(tmp_path, rows, rc, cls=CalibratedKTOTrainer, config=KTOConfig, max_steps=1, beta=0.1)
    trainer.train()
    row = trainer.state.log_history[0]
    # at the start every log-ratio and K are 0: ∂L/∂z = −β/4 ÷ 8 rows each; per pair (4 of them): 6/4 and 2/4
    assert row["dynamics/incentive_chosen"] == pytest.approx(0.1 / 4 * 6 / 8, rel=1e-5)
    assert row["dynamics/incentive_rejected"] == pytest.approx(0.1 / 4 * 2 / 8, rel=1e-5)
    expected = math.sqrt(row["dynamics/score_norm_rejected"] / row["dynamics/score_norm_chosen"] / 3)
    assert row["rc/alpha"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"update": "Microbatch"}, r"rc\.update=Microbatch is not one of step, microbatch"),
        ({"sketch": 0}, r"rc\.sketch=0 is out of range"),
        ({"alpha": 2.0}, r"rc\.alpha=2 is read by rc=fixed alone"),
        ({"rule": "loop", "signal": "control"}, r"rc\.signal=control: inside TRL"),
    ],
)
def test_settings_of_the_calibration_are_checked_as_on_the_command_line(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RewardCalibrationConfig(**given)


def test_an_old_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcpo.integrations.trl.metadata.version", lambda _: "0.23.1")
    with pytest.raises(ImportError, match=r"needs TRL 0\.24 or newer; 0\.23\.1 is installed"):
        is_newer_than_tested()


def test_a_new_trl_brings_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.24.0", "1.15.0", "1.16.3"):
        monkeypatch.setattr("rcpo.integrations.trl.metadata.version", lambda _, version=version: version)
        assert not is_newer_than_tested()
    monkeypatch.setattr("rcpo.integrations.trl.metadata.version", lambda _: "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with TRL 0\.24 to 1\.16, not with 1\.17\.0"):
        assert is_newer_than_tested()


class Thorough(CalibratedDPOTrainer):
    """A trainer of a TRL that was not tested: its first micro-batch is checked."""

    _thorough = True


def test_an_untested_trl_is_checked_and_changes_nothing(tmp_path: Path) -> None:
    rows = sums(tmp_path, 8)
    known = build(tmp_path, rows, EXACT, max_steps=2)
    checked = build(tmp_path, rows, EXACT, cls=Thorough, max_steps=2)
    known.train()
    checked.train()
    names = ("loss", "grad_norm", "rc/alpha", "dynamics/incentive_ratio")
    assert history(checked, *names) == history(known, *names)
    for cls, config in ((CalibratedCPOTrainer, CPOConfig), (CalibratedORPOTrainer, ORPOConfig)):
        cls = type("Thorough", (cls,), {"_thorough": True})
        build(tmp_path, rows, EXACT, cls=cls, config=config, max_steps=1, max_length=64).train()


def test_an_untested_trl_whose_loss_goes_around_the_log_probs_is_refused(tmp_path: Path) -> None:
    class Plain(DPOTrainer):
        """Adds an NLL of logits, which are not steered."""

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            hidden = self.hidden.pop()
            return loss + 0.1 * getattr(model, "module", model).lm_head(hidden).logsumexp(-1).mean()

    class Around(RewardCalibrationMixin, Plain):
        _thorough = True

    trainer = build(tmp_path, sums(tmp_path, 8), EXACT, cls=Around, max_steps=1)
    trainer.hidden = []
    trainer.model.model.register_forward_hook(lambda *call: trainer.hidden.append(call[2][0]))
    with pytest.raises(ValueError, match="a part of its loss goes around the log-probs"):
        trainer.train()


def test_an_untested_trl_with_other_log_probs_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, sums(tmp_path, 8), EXACT, cls=Thorough, max_steps=1)
    trainer._verify = lambda *_: None  # the check that every version has would find it too
    trainer.model.register_forward_hook(
        lambda model, args, output: (
            setattr(output, "log_probs", 1.1 * output.log_probs)
            if getattr(output, "log_probs", None) is not None
            else None
        )
    )
    with pytest.raises(ValueError, match=r"log-probs differ by .* nats per token from a plain forward pass"):
        trainer.train()


def test_ligers_loss_is_refused_where_it_hides_log_probs(tmp_path: Path) -> None:
    class Fused(DPOTrainer):
        def _compute_loss_liger(self) -> None:
            """As TRL until 1.12."""

    class Calibrated(RewardCalibrationMixin, Fused):
        pass

    with pytest.raises(ValueError, match=r"use_liger_kernel=True computes .*: set use_liger_kernel=False"):
        build(tmp_path, sums(tmp_path, 8), EXACT, cls=Calibrated, use_liger_kernel=True)


def test_cpo_in_units_of_means(tmp_path: Path) -> None:
    # z is a mean where rc.reduction says so: d = ∂L/∂(mean) = length · ∂L/∂(sum), pair by pair
    rows = sums(tmp_path, 8)
    common = {"cls": CalibratedCPOTrainer, "config": CPOConfig, "max_steps": 1, "max_length": 64}
    trainers = [
        build(
            tmp_path, rows, RewardCalibrationConfig(sketch=None, reduction=reduction), cpo_alpha=0.0, **common
        )
        for reduction in (None, "mean")
    ]
    batch = trainers[0]._prepare_inputs(next(iter(trainers[0].get_train_dataloader())))
    model = trainers[0].model.train()
    with torch.no_grad():
        chosen, rejected, *_ = trainers[0].concatenated_forward(model, batch)
    pull = trainers[0].beta * torch.sigmoid(-trainers[0].beta * (chosen - rejected)).double()
    lengths = (batch["rejected_labels"][:, 1:] != -100).sum(1)
    for trainer, expected in zip(trainers, (pull, pull * lengths), strict=True):
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["dynamics/incentive_rejected"] == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_agree_with_one(tmp_path: Path, kind: str) -> None:
    sums_model(tmp_path)
    alone = build(tmp_path, sums(tmp_path, 32), EXACT)
    alone.train()
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [WORKER, str(tmp_path), kind, str(output)]
    forked.run(
        [*command, *worker], imports=["trl.trainer.dpo_trainer"], check=True, env=with_path(HERE, HERE.parent)
    )
    rows = json.loads(output.read_text())
    names = ("rc/alpha", "dynamics/incentive_ratio", "dynamics/score_norm_chosen", "dynamics/score_cosine")
    for row, expected in zip(rows, history(alone, *names), strict=True):
        assert [row[name] for name in names] == pytest.approx(expected, rel=1e-4)


def test_subclasses_of_ones_own_take_the_mixin(tmp_path: Path) -> None:
    class Mine(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            result = super()._compute_loss(model, inputs, return_outputs)
            return (2 * result[0], *result[1:]) if return_outputs else 2 * result

    class Calibrated(RewardCalibrationMixin, Mine):
        pass

    rows = sums(tmp_path, 8)
    once = build(tmp_path, rows, EXACT, max_steps=1)
    twice = build(tmp_path, rows, EXACT, cls=Calibrated, max_steps=1)
    once.train()
    twice.train()
    ratio = [t.state.log_history[0]["dynamics/incentive_chosen"] for t in (twice, once)]
    assert ratio[0] == pytest.approx(2 * ratio[1], rel=1e-9)
    assert DPOConfig is type(once.args) and CalibratedDPOTrainer in type(once).__mro__
