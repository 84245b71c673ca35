"""Somebody who types commands on a machine that has a cluster, and looks at what came out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked

ROOT = Path(__file__).resolve().parents[2]
# that anything may take before it counts as hung: a loaded machine is not a failure
PATIENCE = 600.0
CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}
# a run of seconds on two ranks, whose weights go by every part: accumulation, calibration, ZeRO-3
STEPS = 24
TWO_RANKS = [
    *("objective=simpo", "rc=on", "engine=zero3", "train.batch_size=8", "train.micro_batch_size=2"),
    *(f"train.max_steps={STEPS}", "data.train_examples=192", "checkpoint.every=4", "probe.size=0"),
    *("eval.max_examples=8", "eval.generate_examples=0", "wandb.mode=disabled"),
    f"launch.meeting_seconds={PATIENCE:g}",
]
ONE_STEP = [
    *("objective=sft", "model.init=random", "train.max_steps=1", "train.batch_size=4"),
    *("train.micro_batch_size=2", "data.train_examples=4", "reference.track=false", "probe.size=0"),
    *("eval.max_examples=4", "eval.generate_examples=0", "wandb.mode=disabled"),
]


@dataclass(frozen=True)
class User:
    """`folder` is where the commands are typed; `environment` what they find beside the machine's own."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}

    def says(self, command: list[str], code: int = 0) -> str:
        """What a command says; its exit code is checked."""
        kwargs: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # what this machine runs by itself is forked: on the cluster's nodes each rank is a start of its own
        start = forked.Popen if command[0] == sys.executable else subprocess.Popen
        process = start(command, cwd=self.folder, env=self.variables, start_new_session=True, **kwargs)
        try:
            words, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{command} hangs: {process.communicate()[0]}") from None
        assert process.returncode == code, words
        return str(words)

    def rcpo(self, *arguments: str, code: int = 0) -> str:
        """What `rcpo ARGUMENTS` says."""
        return self.says([sys.executable, "-m", "rcpo.cli", *arguments], code)

    def submit(self, *arguments: str) -> str:
        """The id of the job that `rcpo submit` made of this."""
        match = re.search(r"as job (\d+);", self.rcpo("submit", *arguments))
        assert match is not None
        return match[1]

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The run's metrics so far, without what the clock has a part in."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in whole]

    def wait_for_step(self, run: str, step: int, alive: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not any(row["step"] >= step for row in self.rows(run)):
            assert alive() and time.monotonic() < end, f"no step {step} of {run}: {self.words(run)}"
            time.sleep(0.02)

    def words(self, run: str) -> str:
        """What a run's jobs and its log say."""
        paths = [*sorted((self.folder / run).glob("slurm-*.out")), self.folder / run / "rcpo.log"]
        return "\n".join(f"{path.name}: {path.read_text()}" for path in paths if path.exists())

    def same(self, run: str, other: str) -> None:
        """Two runs have the same metrics and the same final bits."""
        assert len(self.rows(other)) == STEPS
        assert self.rows(run) == self.rows(other)
        for file in (self.folder / other / "final").iterdir():
            if file.name in ("README.md", "training.png"):  # the model card has the commands
                continue
            assert file.read_bytes() == (self.folder / run / "final" / file.name).read_bytes(), file
