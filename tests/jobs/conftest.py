"""Runs that take no time: what a process would have trained, by its configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcpo.config import RunConfig, load_run_config, to_container
from rcpo.launch.outcomes import Outcome
from rcpo.launch.pool import Pool

Values = dict[str, float]


class Runs:
    """The folders that were started, in order; `value` makes a run's evaluation, or its failure."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.value: Callable[[RunConfig], Values | Outcome] = lambda config: {"eval/rewards/accuracies": 1.0}

    def process(self, run_dir: Path, given_up: Callable[[], bool] | None) -> tuple[Outcome, bool]:
        self.started.append(run_dir.name)
        config = load_run_config(run_dir)
        result = self.value(config)
        if isinstance(result, Outcome):
            return result, False
        for step in range(1, 4):
            row = {"step": step, **{name: value * step / 3 for name, value in result.items()}}
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if given_up is not None and given_up():
                return Outcome(75, "stopped by a signal"), True
        (run_dir / "evaluation.json").write_text(json.dumps(result))
        state = {"step": 3, "world_size": 1, "config": to_container(config)}
        (run_dir / "finished.json").write_text(json.dumps(state))
        return Outcome(0), False


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runs]:
    """Every run of this test is of no time, in an empty folder; log handlers are then as before."""
    found = Runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pool, "_wait", lambda pool, run_dir, slot, given_up: found.process(run_dir, given_up))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield found
    root.handlers[:], root.level = handlers, level
