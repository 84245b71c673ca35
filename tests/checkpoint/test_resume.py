"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import combinations, product
from pathlib import Path
from typing import Any

import forked
import pytest
from ranks import on_ranks
from tiny import held_out, sums_file, tiny_llama
from workers import resume

CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}

# What a run may be, in the words; 7 steps of 2 an epoch, interrupted in the middle of one or at its
# end. Micro-batches of 4 accumulate, the others do not.
LEVELS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2),
    "stage": (0, 1, 2, 3),
    "rc": ("off", "step"),
    "micro": (4, None),
    "stops": ([3], [2]),
}
# Every two levels meet in one of them, with what has a state of its own beside: optimizers, precisions, bco's
# mean, the calibration by micro-batches, the closed loop (an epoch of 5 steps, then control pairs).
# `RCPO_RESUME=all` takes the levels' whole product.
CASES: list[dict[str, Any]] = [
    {"ranks": 1, "stage": 0, "rc": "off", "micro": None, "stops": [2], "optimizer": "sgd"},
    {"ranks": 1, "stage": 1, "rc": "off", "micro": 4, "stops": [3], "objective": "bco"},
    {"ranks": 1, "stage": 2, "rc": "step", "micro": None, "stops": [3], "optimizer": "sgd"},
    {"ranks": 1, "stage": 3, "rc": "step", "micro": 4, "stops": [2], "reference": "model", "sync": 2},
    {"ranks": 1, "stage": 0, "rc": "microbatch", "micro": 4, "stops": [2, 3], "dtype": "bf16"},
    {"ranks": 1, "stage": 2, "rc": "off", "micro": 4, "stops": [3], "offload": True},
    {"ranks": 1, "stage": 3, "rc": "step", "micro": None, "stops": [2], "dtype": "bf16", "offload": True},
    {"ranks": 2, "stage": 0, "rc": "step", "micro": 4, "stops": [3]},
    {"ranks": 2, "stage": 1, "rc": "step", "micro": None, "stops": [2], "objective": "mix"},
    {"ranks": 2, "stage": 2, "rc": "off", "micro": 4, "stops": [2], "objective": "bco"},
    {
        "ranks": 2,
        "stage": 3,
        "rc": "off",
        "micro": None,
        "stops": [3],
        "dtype": "bf16",
        "reference": "model",
        "sync": 3,
    },
    {"ranks": 2, "stage": 3, "rc": "microbatch", "micro": 4, "stops": [2, 3]},
    {"ranks": 1, "stage": 0, "rc": "loop", "micro": 4, "stops": [3]},
    {"ranks": 2, "stage": 3, "rc": "loop", "micro": 4, "stops": [6]},
]
if os.environ.get("RCPO_RESUME") == "all":
    CASES = [dict(zip(LEVELS, levels)) for levels in product(*LEVELS.values())]


def interrupted(folder: Path, ranks: int) -> None:
    """Runs the cases of so many ranks: nothing differs."""
    cases = [{**case, "micro": case["micro"] or 16 // ranks} for case in CASES if case["ranks"] == ranks]
    for case in cases:
        del case["ranks"]
    model, pairs = tiny_llama(folder / "model"), sums_file(folder / "pairs.jsonl", 24)
    sums_file(folder / resume.MANY, 89)
    output = folder / "result.json"
    on_ranks(ranks, resume.compare_all, model, pairs, output, cases)
    result = json.loads(output.read_text())
    assert len(result) == len(cases) > 0
    assert not {name: problems for name, problems in result.items() if problems}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.mark.parametrize(("one", "other"), [*combinations(LEVELS, 2)])
def test_every_two_levels_meet_in_a_case(one: str, other: str) -> None:
    met = [(case[one], case[other]) for case in CASES]
    assert all(pair in met for pair in product(LEVELS[one], LEVELS[other]))


@pytest.mark.slow
def test_every_bit_is_the_same_after_interruptions(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_bit_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)


@pytest.mark.slow
def test_other_ranks_and_stages_continue_the_same_run(tmp_path: Path) -> None:
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    common = {"objective": "bco"}
    first = [{"name": "whole", "stop": 7, **common}]
    for ranks, stop, shift in ((1, 3, 0), (2, 5, 1), (1, 7, 3)):
        parts = [{"name": f"{n}", "stop": stop, "stage": (n + shift) % 4, **common} for n in range(4)]
        on_ranks(ranks, resume.train_all, model, pairs, tmp_path, first + parts)
        first = []
    expected = rows_of(tmp_path / "whole")
    for stage in range(4):
        found = rows_of(tmp_path / f"{stage}")
        assert [row["step"] for row in found] == list(range(1, 8))
        for name in ("loss", "grad_norm", "rc/alpha", "examples_seen", "learning_rate", "epoch"):
            for row, base in zip(found, expected, strict=True):
                relative = 1e-5 if name == "grad_norm" else 1e-6  # it is 2 here
                close = math.isclose(row[name], base[name], rel_tol=relative, abs_tol=1e-6)
                assert close, (stage, name, row["step"], row[name] - base[name])


class Runs:
    """`rcpo train` with two processes, on a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = [
            f"model.path={tiny_llama(folder / 'model')}",
            f"data.path={sums_file(folder / 'pairs.jsonl', 24)}",
            f"data.eval_path={held_out(folder / 'pairs.jsonl')}",
            *("model=local", "data=pairs", "wandb.mode=disabled", "reference.mode=model", "engine=zero2"),
            *("train.batch_size=8", "train.micro_batch_size=2", "rc=on"),
            *("eval.max_examples=4", "eval.generate_examples=0", "eval.every=8", "log.every=3"),
            *("launch.processes=2", "checkpoint.every=4"),
        ]

    def start(self, *keys: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rcpo.cli", "train", *keys]
        return forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def fresh(self, name: str, *keys: str, steps: int = 24) -> subprocess.Popen[str]:
        keys = (*self.keys, *keys, f"train.max_steps={steps}", f"hydra.run.dir={self.folder / name}")
        return self.start(*keys)

    def wait_for_row(self, name: str, number: int, program: subprocess.Popen[str]) -> None:
        path = self.folder / name / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < number:
            assert program.poll() is None, program.communicate()
            time.sleep(0.01)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return rows_of(self.folder / name)


def ended(program: subprocess.Popen[str], code: int) -> str:
    out, err = program.communicate(timeout=120)
    assert program.returncode == code, (program.returncode, out, err)
    return out + err


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    ended(runs.fresh("whole"), 0)
    program = runs.fresh("parts")
    runs.wait_for_row("parts", 2, program)
    program.send_signal(signal.SIGUSR1)
    said = ended(program, 75)
    assert "stopped after step" in said
    (stopped,) = {int(line.split()[3].rstrip(";")) for line in said.splitlines() if "stopped after" in line}
    latest = tmp_path / "parts" / "checkpoints" / "latest"
    assert latest.read_text() == f"step-{stopped}\n" and stopped < 24
    assert f"continues after step {stopped}" in ended(runs.start(f"resume={tmp_path / 'parts'}"), 0)
    assert runs.rows("parts") == runs.rows("whole")
    for file in (tmp_path / "whole" / "final").iterdir():
        if file.name in ("README.md", "training.png"):  # the model card has the commands
            continue
        assert file.read_bytes() == (tmp_path / "parts" / "final" / file.name).read_bytes(), file


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    import psutil

    runs = Runs(tmp_path)
    program = runs.fresh("lost", steps=100000)
    runs.wait_for_row("lost", 5, program)
    second = runs.fresh("lost", "resume=auto", steps=100000)
    assert "is in use: process" in ended(second, 2)
    # forked in their order, each with a process that would fork for it; what would fork for the run has none
    ranks = [child for child in psutil.Process(program.pid).children() if child.children()]
    _, victim = sorted(ranks, key=lambda child: (child.create_time(), child.pid))
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    said = ended(program, 1)
    assert (
        time.monotonic() - began < 60
    )  # at most 30 for a checkpoint under way, not the 30 minutes of a time-out
    assert "rank 1 failed" in said and "SIGKILL" in said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks)
