"""kto on single completions with labels, from the file to the evaluation, with calibration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny import tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.evaluation.heldout import evaluate
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

WANTED = [{"prompt": f"{n}+{n}=", "completion": f"it is {2 * n}", "label": True} for n in range(10, 22)]
UNWANTED = [{"prompt": f"{n}+{n}=", "completion": f"= {2 * n + 1}", "label": False} for n in range(30, 34)]


def run(folder: Path, *overrides: str) -> tuple[int, str]:
    environment = {**os.environ, "RCPO_CACHE": str(folder / "cache")}
    words = ["train", "data=pairs", "wandb.mode=disabled", *overrides]
    result = forked.rcpo(words, folder, environment)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_every_completion_counts_once_and_each_side_has_its_own_means(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WANTED + UNWANTED))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WANTED[:3] + UNWANTED[:2]))
    code, output = run(
        tmp_path, "objective=kto", "objective.lambda_rejected=3", "rc=on", "data.path=train.jsonl",
        "data.eval_path=eval.jsonl", "train.batch_size=16", "train.micro_batch_size=16", "train.epochs=3",
        "optim.lr=1e-4", "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, output
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    # the policy is its own reference: u = K = 0, so 1 − σ(0) for each, times 1 or 3
    assert steps[0]["loss"] == pytest.approx((12 * 0.5 + 4 * 1.5) / 16, abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["logratios/chosen"] > steps[-1]["logratios/rejected"]
    assert "rewards/margins" not in steps[0] and "rewards/accuracies" not in steps[0]
    # d·s is each side's part of the gradient: d per 16/2, 12 of them ½ · ½ · β, 4 of them three times that
    assert steps[0]["dynamics/incentive_chosen"] == pytest.approx(0.1 * 12 * 0.25 / 8, rel=1e-4)
    assert steps[0]["dynamics/incentive_rejected"] == pytest.approx(0.1 * 4 * 0.75 / 8, rel=1e-4)
    assert steps[1]["rc/alpha"] != 1
    record = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert record["eval/examples"] == 5 and record["eval/rewards/chosen"] > record["eval/rewards/rejected"]
    assert "eval/rewards/accuracies" not in record
    examples = [json.loads(line) for line in (tmp_path / "run/evaluation/examples.jsonl").open()]
    assert [row.get("rewards/rejected") is None for row in examples] == [True] * 3 + [False] * 2
    assert json.loads((tmp_path / "run/data.json").read_text())["train"] == 16


def test_held_out_completions_have_the_dynamics_of_a_batch_of_them(tmp_path: Path) -> None:
    """12 of one side and 4 of the other: each norm is a mean over its own, as in training."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WANTED + UNWANTED))
    config = RunConfig()
    config.wandb.mode, config.reference.cache = "disabled", "off"
    config.model.path = tiny_llama(tmp_path / "model")
    config.data.name, config.data.path, config.data.cache = "pairs", str(tmp_path / "rows.jsonl"), "off"
    config.data.eval_path = config.data.path
    config.eval.batch_size, config.eval.generate_examples = 5, 0
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 16, 4, 1
    config.objective = ObjectiveConfig(name="apo_zero_unpaired", hyperparameters={"beta": 0.1})
    distributed.initialize()
    session = Session(config, tmp_path, training=True)
    session.prepare_reference()
    record, row = evaluate(session), Trainer(session).train_step()
    names = [name for name in row if name.startswith("dynamics/") and "/samples/" not in name]
    assert row["dynamics/incentive_chosen"] == pytest.approx(0.1 * 12 * 0.25 / 8, rel=1e-4)  # as above
    assert len(names) == 10
    for name in names:
        assert record[f"eval/{name}"] == pytest.approx(row[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("objective", "rows", "reason"),
    [
        ("dpo", WANTED[:1] + UNWANTED[:1], "objective=dpo needs pairs, and the data has single completions"),
        ("sft", WANTED[:1] + UNWANTED[:1], "objective=sft would imitate unwanted completions too"),
        ("dpo", [{"text": "1+1=2"}], "objective=dpo needs a rejected response"),
    ],
)
def test_an_objective_refuses_data_of_another_kind(
    tmp_path: Path, objective: str, rows: list[dict[str, Any]], reason: str
) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output = run(tmp_path, f"objective={objective}", "data.path=x.jsonl", "data.eval_fraction=0")
    assert code == 2 and reason in output
