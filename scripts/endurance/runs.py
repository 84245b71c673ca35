"""Runs of the fault campaign: forked from a process that has everything imported, so that most of one is
training; what became of them, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcpo.config.schema import RunConfig
from rcpo.runs.folder import checkpoint_folders

CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}
PATIENCE = 300.0  # seconds for anything that must end


def configuration(folder: Path, steps: int, stage: int = 0, rc: bool = True) -> RunConfig:
    """A run of seconds on a random model of a few thousand weights, a checkpoint each step."""
    config = RunConfig()
    config.resume = "auto"
    config.wandb.mode = "disabled"
    config.model.path = str(folder / "model")
    config.data.name, config.data.path = "pairs", str(folder / "pairs.jsonl")
    config.data.eval_path, config.data.cache = config.data.path, "off"
    config.reference.cache = str(folder / "cache")
    config.train.batch_size, config.train.micro_batch_size = 8, 2
    config.train.max_steps, config.optim.lr = steps, 1e-2
    config.engine.stage, config.checkpoint.every = stage, 1
    config.rc.enabled, config.rc.sketch = rc, 32
    return config


@dataclass
class Attempt:
    """One start of a run: its ranks' processes, and what they left behind."""

    config: RunConfig
    run_dir: Path
    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.codes]

    @property
    def text(self) -> str:
        """What it said."""
        return self.log.read_text(errors="replace")

    def poll(self) -> None:
        for pid in self.alive:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def wait(self, seconds: float = PATIENCE) -> set[int]:
        """Exit codes of those that ended within the time."""
        end = time.monotonic() + seconds
        while self.alive and time.monotonic() < end:
            self.poll()
            time.sleep(0.001)
        return set(self.codes.values())

    def wait_for_rows(self, number: int) -> None:
        """Until so many steps are logged; raises RuntimeError where the run ends before."""
        path = self.run_dir / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < number:
            self.poll()
            if not self.alive:
                raise RuntimeError(f"{self.run_dir.name} ended with {self.codes}: {self.text[-2000:]}")
            time.sleep(0.002)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Its processes stand still: whatever is done to them in between, they do not end before."""
        for pid in self.alive:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in self.alive:
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)
        self.wait()


def start(
    config: RunConfig, run_dir: Path, ranks: int = 1, before: Callable[[], None] = lambda: None
) -> Attempt:
    """Forks the ranks, each of which calls `before` first."""
    run_dir.mkdir(exist_ok=True)
    logs = Path(config.data.path or "").parent / "logs"  # never on a disk that is full
    logs.mkdir(exist_ok=True)
    log = logs / f"{run_dir.name}.{time.monotonic_ns()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _rank(config, run_dir, (rank, ranks, port), log, before)
            finally:
                os._exit(code)
        pids.append(pid)
    return Attempt(config, run_dir, pids, log)


def _rank(
    config: RunConfig, run_dir: Path, place: tuple[int, int, int], log: Path, before: Callable[[], None]
) -> int:
    """A forked rank, to its exit code."""
    from rcpo.launch.local import run_command
    from rcpo.launch.run import Task, launch
    from rcpo.training.trainer import train

    rank, ranks, port = place
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    before()
    code = launch(config, run_dir, Task(train, run_command))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def finish(config: RunConfig, run_dir: Path, ranks: int = 1) -> Attempt:
    """Starts, or continues, a run that nothing happens to, and waits for its end."""
    attempt = start(config, run_dir, ranks)
    attempt.wait()
    attempt.kill()
    return attempt


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without any."""
    return max((step for step, _ in checkpoint_folders(run_dir)), default=0)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = list(file)
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def differences(run_dir: Path, expected: Path) -> list[str]:
    """What differs between two finished runs: rows and final weights, bit for bit."""
    if not (run_dir / "final").is_dir():
        return [f"{run_dir.name}: no final weights"]
    found = [
        f"{run_dir.name}: final/{file.name} differs"
        for file in sorted((expected / "final").iterdir())
        if file.name not in ("README.md", "training.png")  # the model card has the commands
        and (run_dir / "final" / file.name).read_bytes() != file.read_bytes()
    ]
    if rows(run_dir) != rows(expected):
        found.append(f"{run_dir.name}: metrics.jsonl differs")
    return found
