"""Runs that take no time: what a process would have trained, by its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rcpo.config.parsing import load_run_config, to_container
from rcpo.config.schema import RunConfig
from rcpo.launch.outcomes import Outcome
from rcpo.runs.inputs import read_inputs

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
        state = {"step": 3, "world_size": 1, "config": to_container(config), "inputs": read_inputs(config)}
        (run_dir / "finished.json").write_text(json.dumps(state))
        return Outcome(0), False
