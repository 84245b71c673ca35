"""Objectives on a third answer of each pair: the forward pass, the loss, splits, evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.evaluation.heldout import evaluate
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

TPO = {"beta": 0.5, "gamma": 0.1, "lambda_nll": 0.3}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.25
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 16, weighted=True, gold=True)
    config.objective = ObjectiveConfig(name="tpo", hyperparameters=dict(TPO))
    config.rc.enabled, config.rc.sketch = True, 32
    config.train.batch_size, config.train.max_steps = 10, 3
    distributed.initialize()
    return config


def steps(config: RunConfig, folder: Path, micro: int, layout: str) -> list[dict[str, Any]]:
    config.train.micro_batch_size, config.data.layout = micro, layout
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    return [trainer.train_step() for _ in range(config.train.max_steps or 0)]


def test_a_batch_holds_the_gold_answers_and_the_loss_reads_them(config: RunConfig, tmp_path: Path) -> None:
    config.train.micro_batch_size = 2
    session = Session(config, tmp_path / "run", training=True)
    batch = session.collate(session.datasets.train, [0, 1])
    assert batch.sides == ("chosen", "rejected", "gold")
    scored = session.forward(batch)
    losses = session.objective(scored.pairs)
    for place in range(2):
        example = session.datasets.train[place]
        logps = []
        for response in (example.chosen, example.rejected, example.gold):
            ids = torch.tensor([example.prompt + response])
            logits = session.engine.policy.model(ids).logits[0, len(example.prompt) - 1 : -1].detach()
            logps.append(torch.log_softmax(logits.double(), 1)[torch.arange(len(response)), response])
        assert len(logps[2]) > len(logps[1])
        margin = 0.5 * (logps[0].sum() - logps[1].sum()).item() - 0.1
        expected = math.log1p(math.exp(-margin)) - 0.3 * logps[2].mean().item()
        assert losses[place].item() == pytest.approx(expected, rel=1e-5)


def test_splits_and_layouts_agree_with_calibration(config: RunConfig, tmp_path: Path) -> None:
    expected = steps(config, tmp_path / "run", 10, "separate")
    assert expected[-1]["rc/alpha"] != 1 and expected[-1]["loss"] < expected[0]["loss"]
    names = ("loss", "grad_norm", "dynamics/incentive_ratio", "rc/alpha", "logps/rejected")
    for micro, layout in ((5, "shared"), (2, "separate"), (1, "shared")):
        for row, base in zip(steps(config, tmp_path / "run", micro, layout), expected, strict=True):
            assert {name: row[name] for name in names} == pytest.approx(
                {name: base[name] for name in names}, rel=1e-4
            ), (micro, layout)


def test_held_out_pairs_are_evaluated_with_their_gold_answers(config: RunConfig, tmp_path: Path) -> None:
    session = Session(config, tmp_path / "run", training=True)
    session.prepare_reference()
    session.engine.eval()
    record = evaluate(session)
    dataset = session.datasets.evaluation
    assert dataset is not None
    pairs = session.forward(session.collate(dataset, list(range(len(dataset))))).pairs
    assert record["eval/loss"] == pytest.approx(session.objective(pairs).mean().item(), rel=1e-5)


@pytest.mark.parametrize("part", [None, "mix"])
def test_a_pair_without_a_gold_answer_is_named(config: RunConfig, tmp_path: Path, part: str | None) -> None:
    path = Path(str(config.data.path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[6]["gold"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if part is not None:
        config.objective = ObjectiveConfig(
            name=part, reduction=None, hyperparameters={"parts": [{"name": "dpo"}, {"name": "tpo"}]}
        )
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:7: no gold answer, and objective=(tpo|mix) needs"):
        Session(config, tmp_path / "run", training=True)
