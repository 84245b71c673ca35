"""When a checkpoint is due, and which one is the best."""

from __future__ import annotations

import json
import math
import time

import pytest

from rcpo.config import CheckpointConfig, ConfigError
from rcpo.saving import BestStep, SaveClock


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
    values = [0.5, 0.5, 0.7, math.nan, 0.6, 0.1]
    assert follow(BestStep(CheckpointConfig(best="eval/loss")), values) == [1, 3]
    lowest = BestStep(CheckpointConfig(best="eval/loss", best_mode="min"))
    assert follow(lowest, [math.nan, *values]) == [2, 7]
    assert lowest.steps == [7] and str(lowest) == "eval/loss 0.1"
    assert follow(BestStep(CheckpointConfig()), values) == []


def test_the_best_step_survives_a_resume_unless_another_is_asked_for() -> None:
    config = CheckpointConfig(best="eval/loss")
    first, then = BestStep(config), BestStep(config)
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
