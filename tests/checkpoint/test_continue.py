"""What a run goes on from, what it refuses, and the best step, each told in full; without an engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rcpo.checkpoint import resume
from rcpo.checkpoint.best import BestStep
from rcpo.checkpoint.read import Checkpoint
from rcpo.config.parsing import to_container
from rcpo.config.schema import CheckpointConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.system import distributed

OTHER = "eval/logratios/chosen"  # another metric that may choose the best step


def a_config(**train: Any) -> RunConfig:
    config = RunConfig(resume="auto")
    config.data.name = "sums"  # reads no file
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


def a_checkpoint(config: RunConfig, **state: Any) -> Checkpoint:
    found = {"config": to_container(config), "world_size": 1, "contents": {}}
    return Checkpoint(Path("run/checkpoints/step-5"), 5, found | state)


# --- inputs ---------------------------------------------------------------------------------------------


def test_rank_0_reads_the_inputs_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RunConfig] = []
    monkeypatch.setattr(resume, "read_inputs", lambda config: (read.append(config), {"the data": "a"})[1])
    assert resume.shared_inputs(a_config()) == {"the data": "a"} and len(read) == 1
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: ({"the data": "of rank 0"}, None))
    assert resume.shared_inputs(a_config()) == {"the data": "of rank 0"} and len(read) == 1


def test_what_rank_0_cannot_read_is_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: RunConfig) -> Any:
        raise ConfigError("data.path=x does not exist")

    monkeypatch.setattr(resume, "read_inputs", refuses)
    with pytest.raises(ConfigError, match=r"^data.path=x does not exist$"):
        resume.shared_inputs(a_config())
    monkeypatch.setattr(distributed, "is_main", lambda: False)  # it does not look itself
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: ({}, "told by rank 0"))
    with pytest.raises(ConfigError, match=r"^told by rank 0$"):
        resume.shared_inputs(a_config())


def test_a_run_that_has_not_ended_has_no_standing_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "read_inputs", lambda config: pytest.fail("it read the inputs"))
    assert resume.finished_standing(a_config(), tmp_path) is None


def test_a_finished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    state = {"config": to_container(a_config()), "inputs": {}, "evaluated": True}
    (tmp_path / "finished.json").write_text(json.dumps(state))
    found = resume.finished_standing(a_config(), tmp_path)
    assert found is not None and found.complete
    with pytest.raises(ConfigError, match=r"train.epochs: \S+ -> 9"):
        resume.finished_standing(a_config(epochs=9), tmp_path)


# --- checkpoints ----------------------------------------------------------------------------------------


def test_an_empty_folder_is_a_fresh_start_with_or_without_resume(tmp_path: Path) -> None:
    config = a_config()
    assert resume.find_checkpoint(config, tmp_path) is None
    config.resume = None
    assert resume.find_checkpoint(config, tmp_path) is None


def test_a_fresh_run_in_a_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    config = a_config()
    config.resume = None
    with pytest.raises(ConfigError) as refusal:
        resume.find_checkpoint(config, tmp_path)
    assert str(refusal.value) == f"{tmp_path} holds checkpoints; resume=auto continues them"


def test_contents_that_changed_or_are_new_are_refused_by_name() -> None:
    config = a_config()
    before = a_checkpoint(config, contents={"the data": "a", "the model": "b", "gone": "c"})
    resume.refuse_other_contents(before, {"the data": "a", "the model": "b"}, config, couples_batch=False)
    now = {"the data": "x", "the model": "b", "the adapter": "d"}
    with pytest.raises(ConfigError) as refusal:
        resume.refuse_other_contents(before, now, config, couples_batch=False)
    lines = str(refusal.value).splitlines()
    assert lines[1:-1] == ["  the data (by content)", "  the adapter (by content)"]
    assert str(before.folder) in lines[0]


@pytest.mark.parametrize(
    ("then", "now", "ranks", "change"),
    [  # pairs of each micro-batch, then and now: null is the largest divisor up to 16 of a rank's share
        (None, None, (1, 2), "16 -> 8"),
        (None, 8, (2, 1), None),
        (None, None, (2, 2), None),
        (4, None, (1, 2), "4 -> 8"),
    ],
)
def test_coupled_pairs_stay_in_micro_batches_of_one_size(
    then: int | None,
    now: int | None,
    ranks: tuple[int, int],
    change: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = a_checkpoint(a_config(batch_size=16, micro_batch_size=then), world_size=ranks[0])
    config = a_config(batch_size=16, micro_batch_size=now)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks[1])
    resume.refuse_other_contents(before, {}, config, couples_batch=False)
    if change is None:
        resume.refuse_other_contents(before, {}, config, couples_batch=True)
        return
    with pytest.raises(ConfigError) as refusal:
        resume.refuse_other_contents(before, {}, config, couples_batch=True)
    line = f"  train.micro_batch_size (null, by the number of processes): {change}"
    assert line in str(refusal.value).splitlines()


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (2, 2), (1, 3)])
def test_another_number_of_ranks_or_another_stage_is_told(
    ranks: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config()
    config.engine.stage = 2
    before = a_checkpoint(config)
    assert resume.other_layout(before, config) is None
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    config.engine.stage = stage
    assert resume.other_layout(before, config) == (
        f"the checkpoint was written by 1 process(es) with engine.stage=2; {ranks} with "
        f"engine.stage={stage} continue it: equal up to rounding, not bit for bit"
    )


def test_rank_0_alone_warns(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    resume._warn("first")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    resume._warn("second")
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, "first")]


# --- the best step --------------------------------------------------------------------------------------


def test_without_a_metric_no_step_is_the_best() -> None:
    best = BestStep(CheckpointConfig())
    assert best.improved(1, {"eval/loss": 1.0}) is False
    assert best.steps == [] and best.step is None and best.state_dict() is None


@pytest.mark.parametrize(("mode", "sign", "values"), [("max", 1, [-3, -4, -2]), ("min", -1, [3, 4, 2])])
def test_a_best_step_may_have_a_value_of_any_sign(mode: str, sign: int, values: list[float]) -> None:
    best = BestStep(CheckpointConfig(best="eval/loss", best_mode=mode))
    assert [best.improved(step, {"eval/loss": value}) for step, value in enumerate(values)] == [
        True, False, True,
    ]  # fmt: skip
    assert best.state_dict() == {"metric": "eval/loss", "sign": sign, "step": 2, "value": float(values[2])}
    assert best.steps == [2]


def test_a_tie_goes_to_the_earlier_step() -> None:
    best = BestStep(CheckpointConfig(best="eval/loss"))
    assert best.improved(3, {"eval/loss": 0.0}) is True
    assert best.improved(4, {"eval/loss": 0.0}) is False
    assert best.steps == [3] and str(best) == "eval/loss 0"


def test_the_metrics_that_there_are_are_named() -> None:
    best = BestStep(CheckpointConfig(best="eval/exact_match"))
    with pytest.raises(ConfigError) as refusal:
        best.improved(1, {"eval/loss": 1.0, "loss": 2.0, OTHER: 0.5})
    message = str(refusal.value)
    there = message.partition("there are: ")[2].split(", ")
    assert sorted(there) == sorted(["eval/loss", OTHER])
    assert message.startswith("checkpoint.best=eval/exact_match is not measured in this run; ")


def test_another_metric_begins_anew() -> None:
    state = {"metric": "eval/loss", "sign": 1, "step": 2, "value": 9.0}
    for config, steps in [
        (CheckpointConfig(best="eval/loss"), [2]),
        (CheckpointConfig(best=OTHER), []),
        (CheckpointConfig(best="eval/loss", best_mode="min"), []),
    ]:
        best = BestStep(config)
        best.load_state_dict(state)
        assert best.steps == steps
        assert best.improved(3, {"eval/loss": 8.0, OTHER: 0.1}) is (steps == [])
