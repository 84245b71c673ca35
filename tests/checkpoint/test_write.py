"""When a checkpoint is due, and which one is the best."""

from __future__ import annotations

import io
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny import sums_file, tiny_llama
from transformers import AutoModelForCausalLM
from workers import best, rescue

from rcpo.checkpoint import write as saving
from rcpo.checkpoint.best import BestStep
from rcpo.checkpoint.read import checkpoint_weights, first_problem, newest
from rcpo.checkpoint.write import CheckpointWriter, SaveClock
from rcpo.config.schema import CheckpointConfig, RunConfig
from rcpo.errors import ConfigError, RunError
from rcpo.runs.folder import checkpoint_folders, read_rows
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training import trainer
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

MODEL = "model.safetensors"


def test_a_checkpoint_is_due_after_the_interval_however_the_wall_clock_jumps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock, never = SaveClock(60), SaveClock(0)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
        now += 25
        assert not clock.due
    now += 10
    assert clock.due and not never.due
    clock.saved(held_up=1.0)
    assert not clock.due
    now += 60
    assert clock.due


def test_a_costly_checkpoint_is_taken_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = SaveClock(60)
    clock.saved(held_up=30.0)  # 5 % of 600 s
    now = 599.0
    assert not clock.due
    now = 600.0
    assert clock.due


def follow(best: BestStep, values: list[float]) -> list[int]:
    """The steps, counted from 1, that were the best when they came."""
    return [n for n, value in enumerate(values, 1) if best.improved(n, {"eval/loss": value})]


def test_the_best_step_by_direction() -> None:
    values = [0.5, 0.5, 0.7, math.nan, math.inf, 0.6, 0.1]  # JSON, and so a checkpoint, holds no infinity
    assert follow(BestStep(CheckpointConfig(best="eval/loss")), values) == [1, 3]
    lowest = BestStep(CheckpointConfig(best="eval/loss", best_mode="min"))
    assert follow(lowest, [math.nan, -math.inf, *values]) == [3, 9]
    assert lowest.steps == [9] and str(lowest) == "eval/loss 0.1"
    assert follow(BestStep(CheckpointConfig()), values) == []


def test_the_best_step_survives_a_resume_unless_another_is_asked_for() -> None:
    config = CheckpointConfig(best="eval/loss")
    first, then = BestStep(config), BestStep(config)
    assert first.state_dict() is None
    then.load_state_dict(None)
    assert then.steps == []
    follow(first, [0.5, 0.7])
    state = json.loads(json.dumps(first.state_dict()))
    then.load_state_dict(state)
    assert then.steps == [2] and not then.improved(3, {"eval/loss": 0.6})
    other = BestStep(CheckpointConfig(best="eval/loss", best_mode="min"))
    other.load_state_dict(state)
    assert other.steps == []


def test_a_metric_that_is_not_measured_is_refused() -> None:
    best = BestStep(CheckpointConfig(best="eval/exact_match"))
    with pytest.raises(ConfigError, match=r"checkpoint.best=eval/exact_match .* eval/loss"):
        best.improved(1, {"eval/loss": 1.0})


@pytest.mark.slow
def test_the_best_step_of_a_run_stays_and_is_written_at_its_end(tmp_path: Path) -> None:
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    on_ranks(2, best.runs, model, pairs, tmp_path, 6)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    values = [row["eval/logratios/chosen"] for row in rows]
    step = 1 + values.index(max(values))
    assert 1 < step < 6 and len(values) == 8  # before the stop, and no checkpoint that would be kept anyway
    expected = load_file(tmp_path / f"{step}.safetensors")
    for name in ("whole", "parts", "killed"):
        run_dir = tmp_path / name
        found_values = [row["eval/logratios/chosen"] for row in read_rows(run_dir / "metrics.jsonl")]
        assert found_values == pytest.approx(values, rel=1e-6)
        assert [number for number, _ in checkpoint_folders(run_dir)] == [8, step]
        found = AutoModelForCausalLM.from_pretrained(run_dir / "best").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        stored = checkpoint_weights(run_dir / "checkpoints" / f"step-{step}")
        assert all(torch.equal(found[key.removeprefix("model.")], value) for key, value in stored.items())
        last = load_file(run_dir / "final" / "model.safetensors")
        assert not all(torch.equal(last[key], value) for key, value in expected.items())


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Of a run of three steps in this process."""
    distributed.initialize()
    config = RunConfig()
    config.wandb.mode, config.reference.mode, config.probe.size = "disabled", "model", 0
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.path = "pairs", sums_file(tmp_path / "pairs.jsonl", 24)
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 8, 8, 3
    config.checkpoint.every, config.checkpoint.background = 1, True
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    result = Session(config, run_dir, training=True)
    result.prepare_reference()
    return result


def silent(session: Session) -> Tracker:
    return Tracker(session.run_dir, session.config, 3, True, console=Console(file=io.StringIO()))


class OutOfMemory(RuntimeError):
    """Like torch's: neither a RunError nor an OSError."""


@pytest.mark.parametrize("where", ["evaluation", "probe", "step"])
def test_a_checkpoint_that_is_being_written_survives_any_exception(
    session: Session, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.config.eval.every = 1
    slow = saving.write_tensors
    monkeypatch.setattr(saving, "write_tensors", lambda *given: (time.sleep(0.3), slow(*given))[1])

    def fails_at_two(*_: Any) -> dict[str, Any]:
        if trainer.step == 2:
            raise OutOfMemory("no memory is left")
        return {"eval/loss": 1.0}

    trainer = Trainer(session)
    if where == "step":
        monkeypatch.setattr(trainer.divergence, "look", fails_at_two)
    with silent(session) as tracker, pytest.raises(OutOfMemory):
        trainer.run(
            tracker,
            fails_at_two if where == "evaluation" else None,
            fails_at_two if where == "probe" else None,
        )
    found = newest(session.run_dir, print)
    assert found is not None and found.step == 1
    assert not list((session.run_dir / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("where", ["evaluation", "probe"])
def test_weights_are_saved_before_the_last_evaluation_which_may_fail(session: Session, where: str) -> None:
    saved: list[list[str]] = []

    def fails_at_the_end(*_: Any) -> dict[str, Any]:
        if trainer.step == 3:
            saved.append(sorted(path.name for path in (session.run_dir / "final").glob("*.safetensors")))
            raise OutOfMemory("no memory is left\nand a second line")
        return {}

    trainer = Trainer(session)
    with silent(session) as tracker, pytest.raises(RunError) as failure:
        trainer.run(
            tracker,
            fails_at_the_end if where == "evaluation" else None,
            fails_at_the_end if where == "probe" else None,
        )
    assert saved == [["model.safetensors"]]
    message = str(failure.value)
    assert "OutOfMemory: no memory is left." in message and "\n" not in message
    assert message.endswith(f"rcpo evaluate run={session.run_dir}")
    assert json.loads((session.run_dir / "finished.json").read_text())["evaluated"] is False
    rows = (session.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]  # the last step's numbers are kept too


def test_the_last_row_holds_the_last_evaluation(session: Session) -> None:
    with silent(session) as tracker:
        Trainer(session).run(tracker, lambda _: {"eval/loss": 0.25})
    rows = [json.loads(row) for row in (session.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("eval/loss") for row in rows] == [None, None, 0.25]
    assert json.loads((session.run_dir / "finished.json").read_text())["evaluated"] is True


class Killed(BaseException):
    """Nothing comes after it, as after SIGKILL."""


@pytest.mark.parametrize(("last", "expected"), [(0.7, 2), (1.0, 3)])
def test_a_run_that_is_killed_in_its_last_evaluation_lacks_nothing_afterwards(
    session: Session, last: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = session.config, session.run_dir
    config.eval.every, config.checkpoint.best, config.resume = 1, "eval/loss", "auto"
    values = {1: 0.5, 2: 0.9, 3: last}
    run = Trainer(session)

    def killed(_: Session) -> dict[str, Any]:
        if run.step == 3:
            monkeypatch.setattr(Tracker, "log", lambda *_: None)
            raise Killed
        return {"eval/loss": values[run.step]}

    with silent(session) as tracker, pytest.raises(Killed):
        run.run(tracker, killed)
    monkeypatch.undo()
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2]
    weights = checkpoint_weights(run_dir / "checkpoints" / "step-2")
    if expected == 3:
        weights = {f"model.{name}": value for name, value in load_file(run_dir / "final" / MODEL).items()}

    assert trainer.train(config, run_dir, lambda _: {"eval/loss": last}) == 0
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [(row["step"], row["eval/loss"]) for row in rows] == list(values.items())
    assert {*rows[1]} == {*rows[2]}  # all that a row has
    found = load_file(run_dir / "best" / MODEL)
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in found.items())
    state = json.loads((run_dir / "finished.json").read_text())
    assert state["evaluated"] is True and state["last_row"] is None and state["best"]["step"] == expected
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"}
    assert trainer.train(config, run_dir, lambda _: {"eval/loss": 9.0}) == 0  # there is nothing left to do
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"} == before


@pytest.mark.slow
def test_rank_0_finishes_a_checkpoint_when_the_other_rank_has_failed(tmp_path: Path) -> None:
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    on_ranks(2, rescue.one_rank_fails, model, pairs, tmp_path / "run")
    ((step, folder),) = checkpoint_folders(tmp_path / "run")
    assert step == 1 and first_problem(folder) is None
    assert len(list((folder / "tensors").iterdir())) == len(rescue.states(folder)) == 2


@pytest.mark.parametrize("dies_after", [None, 40])
def test_a_failed_run_waits_while_another_ranks_part_grows(
    dies_after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.distributed, "world_size", lambda: 2)
    writer = CheckpointWriter(tmp_path, RunConfig())
    scratch = writer._scratch(7)
    for folder in ("tensors", "records"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "records" / "00000-of-00002.safetensors.json").touch()
    part = saving._Part(scratch, "00000-of-00002.safetensors", {}, {})
    part.problem = None
    seconds = 0

    def other_rank(_: float) -> None:
        nonlocal seconds
        seconds += 10
        if dies_after is not None and seconds > dies_after:
            return
        with (scratch / "tensors" / "00001-of-00002.safetensors").open("ab") as file:
            file.write(b"0123")
        if seconds == 80:
            (scratch / "records" / "00001-of-00002.safetensors.json").touch()

    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: seconds, sleep=other_rank))
    with nullcontext() if dies_after is None else pytest.raises(OSError, match="a rank's part is missing"):
        writer._wait_for_all(saving._Pending(7, {}, (), part))
    assert seconds == (80 if dies_after is None else dies_after + 30)
