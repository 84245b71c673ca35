"""Objectives without a reference: some held-out pairs are compared with the starting policy all the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.evaluation.heldout import evaluate
from rcpo.evaluation.probes import Probe
from rcpo.evaluation.summary import describe
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training import session
from rcpo.training.session import Session, Tracking, tracking


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.objective = ObjectiveConfig(
        name="simpo", reduction="mean", hyperparameters={"beta": 2.0, "gamma": 1.0}
    )
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.reference.cache = "off"
    config.data.name = "pairs"
    config.data.path = config.data.eval_path = sums_file(tmp_path / "pairs.jsonl", 5)
    config.train.batch_size = config.train.micro_batch_size = 5
    config.probe.generate_every = 0
    return config


def scale_head(made: Session) -> None:
    """Another policy than the one that the session started from."""
    with torch.no_grad():
        made.engine.policy.model.get_output_embeddings().weight.mul_(1.5)


def examples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "examples.jsonl").read_text().splitlines()]


def test_some_held_out_pairs_show_whether_the_winner_fell(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "TRACKED", 3)
    made = Session(config, tmp_path, training=True)
    assert made.tracking is Tracking.SOME
    made.prepare_reference()
    assert made.forward.reference is None  # training pays nothing
    evaluate(made)
    before = {row["id"]: row for row in examples(tmp_path)}
    compared = {name for name, row in before.items() if "logratios/chosen" in row}
    assert len(before) == 5 and len(compared) == 3
    assert all(before[name]["logratios/chosen"] == pytest.approx(0, abs=1e-5) for name in compared)

    scale_head(made)
    record = evaluate(made)
    after = {row["id"]: row for row in examples(tmp_path)}
    changes = [after[name]["logps/chosen"] - before[name]["logps/chosen"] for name in compared]
    assert {name for name, row in after.items() if "winner_fell" in row} == compared
    assert record["eval/logratios/examples"] == 3 and record["eval/examples"] == 5
    assert record["eval/logratios/chosen"] == pytest.approx(sum(changes) / 3, rel=1e-4)
    assert abs(record["eval/logratios/chosen"]) > 0.01
    sentence = describe(record, config.objective.reduction)
    assert "log-ratio" in sentence and "of 3 pairs" in sentence
    everything = [row["logps/chosen"] for row in after.values()]
    assert record["eval/logps/chosen"] == pytest.approx(sum(everything) / 5, rel=1e-5)


def test_the_probes_are_among_the_tracked_pairs_and_others_have_no_log_ratio(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "TRACKED", 2)
    config.probe.size, config.probe.every = 3, 1
    made = Session(config, tmp_path, training=True)
    made.prepare_reference()
    probe = Probe(made, None)
    measured = probe._measure()
    known = [position for position in probe._positions if "chosen_logratios" in measured[position]]
    assert known == probe._positions[:2] and set(known) == made.tracked_positions
    assert all(math.isfinite(value) for row in measured.values() for value in row.values())
    with Tracker(tmp_path, config, 1, False) as tracker:
        probe(0, tracker)


@pytest.mark.parametrize(
    ("track", "data", "changes", "reference", "expected"),
    [
        (None, "pairs", True, None, Tracking.SOME),
        (None, "sums", True, None, Tracking.EVERYTHING),
        (True, "pairs", True, None, Tracking.EVERYTHING),
        (False, "sums", True, None, Tracking.NOTHING),
        (None, "pairs", False, None, Tracking.NOTHING),  # a model without a training has not changed
        (None, "pairs", False, "other", Tracking.SOME),
    ],
)
def test_what_is_compared(
    config: RunConfig,
    tmp_path: Path,
    track: bool | None,
    data: str,
    changes: bool,
    reference: str | None,
    expected: Tracking,
) -> None:
    made = Session(config, tmp_path, training=False)
    config.reference.track, config.data.name, config.reference.path = track, data, reference
    assert tracking(config, made.objective, made.datasets, changes=changes) is expected
    if expected is Tracking.SOME:  # with nothing held out nothing can be compared at little cost
        alone = replace(made.datasets, evaluation=None)
        assert tracking(config, made.objective, alone, changes=changes) is Tracking.NOTHING


def test_a_reference_held_as_a_model_is_not_loaded_for_some_pairs(config: RunConfig, tmp_path: Path) -> None:
    config.reference.mode = "model"
    made = Session(config, tmp_path, training=True)
    assert made.tracking is Tracking.SOME and made._reference is not None and made._reference.other is None
    made.prepare_reference()
    assert not made.scores_any_tokens
