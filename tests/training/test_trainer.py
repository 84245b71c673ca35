"""The same global batch gives the same numbers, whatever its split and the ZeRO stage."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from tiny import sums_file, tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.dataset import Datasets
from rcpo.data.records import Example
from rcpo.data.report import DataReport
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.method.objectives import get_objective
from rcpo.system import distributed
from rcpo.training.objective import refuse_numbers
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

Rows = list[dict[str, float | None]]
WORKER = str(Path(__file__).parents[1] / "workers" / "split_invariance.py")
# start at, or pass, zero
ABSOLUTE = ("logratios", "rewards", "cosine", "band_lower", "/cross", "rc/winner", "rc/loser", "rc/integral")


def run_splits(
    folder: Path, ranks: int, splits: str, stages: str, optimizers: str, objectives: str
) -> dict[str, Rows]:
    """All combinations in one group of real processes; the result by name."""
    model, pairs = folder / "model", folder / "pairs.jsonl"
    if not model.exists():
        tiny_llama(model)
        sums_file(pairs, 24, weighted=True)
    output = folder / f"{ranks}.json"
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(model), str(pairs), str(output), splits, stages, optimizers, objectives]
    forked.run([*launcher, WORKER, *arguments], check=True)
    result: dict[str, Rows] = json.loads(output.read_text())
    return result


def worst_difference(rows: Rows, expected: Rows) -> tuple[float, str]:
    """The largest difference, relative except for names that pass zero, and where it is."""
    worst = (0.0, "")
    for step, (row, base) in enumerate(zip(rows, expected, strict=True)):
        assert row.keys() == base.keys()
        for name, value in base.items():
            other = row[name]
            assert (value is None) == (other is None), (name, step)
            if value is None or other is None:
                continue
            scale = 1.0 if any(word in name for word in ABSOLUTE) else abs(value)
            worst = max(
                worst, (abs(other - value) / scale if other != value else 0.0, f"{name}, step {step}")
            )
    return worst


@pytest.mark.slow
def test_every_split_and_stage_agrees(tmp_path: Path) -> None:
    stages, optimizers = "0,1,2,3", "sgd,adamw"
    alone = run_splits(tmp_path, 1, "1x16,4x4", stages, optimizers, "dpo")
    both = run_splits(tmp_path, 2, "2x4,8x1", stages, optimizers, "dpo")
    results = {**alone, **both}
    assert len(results) == 4 * 4 * 2
    for name, rows in results.items():
        optimizer = name.split()[1]
        base = results[f"dpo {optimizer} 1x1x16 zero0"]
        first, where = worst_difference(rows[:1], base[:1])
        assert first < 1e-5, (name, where, first)
        worst, where = worst_difference(rows, base)
        assert worst < (1e-5 if optimizer == "sgd" else 1e-4), (name, where, worst)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0"])
def test_other_objectives_agree_too(tmp_path: Path, stage: str) -> None:
    # importance weights, a running mean with nll, no reference, a token-weighted loss; other rules for alpha
    objectives = "tidpo,bco,simpo,sft,dpo+loop,dpo+edge,simpo+pair"
    results = run_splits(tmp_path, 1, "1x16,4x4", stage, "sgd", objectives)
    results |= run_splits(tmp_path, 2, "8x1,1x8", stage, "sgd", objectives)  # 1x8: rank 1 has fillers alone
    for name, rows in results.items():
        worst, where = worst_difference(rows, results[f"{name.split()[0]} sgd 1x1x16 zero{stage}"])
        assert worst < 1e-5, (name, where, worst)


def test_the_loss_is_the_weighted_mean_over_the_pairs(tmp_path: Path) -> None:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 8, weighted=True)
    config.objective = ObjectiveConfig(name="simpo", reduction="mean", hyperparameters={})
    config.train.batch_size, config.train.micro_batch_size, config.dynamics.every = 8, 4, 0
    distributed.initialize()
    session = Session(config, tmp_path / "run", training=True)
    row = Trainer(session).train_step()
    # again, pair by pair, before the step: a session starts from the same weights
    session = Session(config, tmp_path / "other", training=True)
    total = weight = 0.0
    for n in range(8):
        pairs = session.forward(session.collate(session.datasets.train, [n])).pairs
        margin = 2 * (pairs.chosen - pairs.losers).item() - 1
        total += (0.1 + 0.3 * (n % 5)) * math.log1p(math.exp(-margin))
        weight += 0.1 + 0.3 * (n % 5)
    assert row["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert row["loss"] != pytest.approx(row["loss"] * weight / 8, rel=1e-2)  # the weights do not add up to 8


def test_weights_are_refused_where_the_losses_are_sorted(tmp_path: Path) -> None:
    config = RunConfig()
    config.data.name, config.data.eval_fraction = "pairs", 0.0
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 8, weighted=True)
    config.objective = ObjectiveConfig(name="aot", hyperparameters={})
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1: a weight, and objective=aot sorts the pairs"):
        Session(config, tmp_path / "run", training=True)


@pytest.mark.parametrize(
    ("margins", "settings", "message"),
    [
        (
            [0.5, None],
            {},
            r"^1: no scores, and objective=mappo needs them; give score_chosen and score_rejected",
        ),
        (
            [0.5, 1.5],
            {},
            r"^1: objective\.score_scale times the margin is 1\.5, and objective=mappo takes 0 to 1",
        ),
        ([-0.5, 0.5], {}, r"^0: objective\.score_scale times the margin is -0\.5"),
        ([5, 10], {"score_scale": 0.1}, None),
    ],
)
def test_scores_that_an_objective_needs(
    margins: list[float | None], settings: dict[str, float], message: str | None
) -> None:
    values = np.full((2, 4), np.nan)
    values[:, 2] = [np.nan if margin is None else margin for margin in margins]
    pairs = PairDataset.of([Example(str(n), [1], [n + 2], [5]) for n in range(2)], values=values)
    datasets = Datasets(pairs, None, DataReport("x"))
    refuse_numbers(get_objective("dpo"), datasets)
    if message is None:
        refuse_numbers(get_objective("mappo", **settings), datasets)
        return
    with pytest.raises(ConfigError, match=message):
        refuse_numbers(get_objective("mappo", **settings), datasets)
