"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import sums_file, tiny_llama

WORKER = str(Path(__file__).parent / "workers" / "resume.py")

CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}

# stages × optimizers × precisions, and what has a state of its own: the calibration and bco's mean; 7 steps
# of 2 an epoch, continued after step 3 in the middle of an epoch, or after 2 at its end
CASES: list[dict[str, Any]] = [
    {"stage": 0, "reference": "model", "stops": [2]},
    {"stage": 1, "stops": [2, 3]},
    {"stage": 2, "objective": "bco"},
    {"stage": 3, "rc": "microbatch"},
    {"stage": 0, "rc": "off", "micro": 8, "optimizer": "sgd"},
    {"stage": 2, "optimizer": "sgd"},
    {"stage": 3, "dtype": "bf16", "reference": "model"},
    {"stage": 0, "dtype": "bf16"},
]


def interrupted(folder: Path, ranks: int, cases: list[dict[str, Any]]) -> dict[str, str]:
    """Runs the cases in one group of real processes: what differs, by case."""
    output = folder / "result.json"
    work("compare", folder, ranks, output, cases)
    result: dict[str, str] = json.loads(output.read_text())
    return result


def work(what: str, folder: Path, ranks: int, output: Path, cases: list[dict[str, Any]]) -> None:
    """Runs the worker on so many ranks."""
    model, pairs = folder / "model", folder / "pairs.jsonl"
    if not model.exists():
        tiny_llama(model)
        sums_file(pairs, 24)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [what, str(model), str(pairs), str(output), json.dumps(cases)]
    subprocess.run([*launcher, WORKER, *arguments], check=True, capture_output=True, timeout=280)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.mark.slow
def test_every_bit_is_the_same_after_interruptions(tmp_path: Path) -> None:
    result = interrupted(tmp_path, 1, CASES)
    assert len(result) == len(CASES)
    assert not {name: problems for name, problems in result.items() if problems}


@pytest.mark.slow
@pytest.mark.serial
def test_every_bit_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    result = interrupted(tmp_path, 2, [case for case in CASES if case.get("optimizer") != "sgd"])
    assert len(result) == 6
    assert not {name: problems for name, problems in result.items() if problems}


def test_one_case_of_them(tmp_path: Path) -> None:
    case = {"stage": 1, "objective": "bco", "stops": [2, 3]}
    assert list(interrupted(tmp_path, 1, [case]).values()) == [""]


@pytest.mark.slow
@pytest.mark.serial
def test_other_ranks_and_stages_continue_the_same_run(tmp_path: Path) -> None:

    common = {"objective": "bco"}
    first = [{"name": "whole", "stop": 7, **common}]
    for ranks, stop, shift in ((1, 3, 0), (2, 5, 1), (1, 7, 3)):
        runs = [{"name": f"{n}", "stop": stop, "stage": (n + shift) % 4, **common} for n in range(4)]
        work("train", tmp_path, ranks, tmp_path, first + runs)
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
            f"data.eval_path={folder / 'pairs.jsonl'}",
            *("model=local", "data=pairs", "wandb.mode=disabled", "reference.mode=model", "engine=zero2"),
            *("train.batch_size=8", "train.micro_batch_size=2", "rc=on"),
            *("eval.max_examples=4", "eval.generate_examples=0", "eval.every=20", "log.every=3"),
            *("launch.processes=2", "checkpoint.every=10"),
        ]

    def start(self, *keys: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rcpo.cli", "train", *keys]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def fresh(self, name: str, *keys: str, steps: int = 60) -> subprocess.Popen[str]:
        return self.start(
            *self.keys, *keys, f"train.max_steps={steps}", f"hydra.run.dir={self.folder / name}"
        )

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
@pytest.mark.serial
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
    assert latest.read_text() == f"step-{stopped}\n" and stopped < 60
    assert f"continues after step {stopped}" in ended(runs.start(f"resume={tmp_path / 'parts'}"), 0)
    assert runs.rows("parts") == runs.rows("whole")
    for file in (tmp_path / "whole" / "final").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / "final" / file.name).read_bytes(), file


@pytest.mark.slow
@pytest.mark.serial
def test_a_lost_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    import psutil

    runs = Runs(tmp_path)
    program = runs.fresh("lost", steps=100000)
    runs.wait_for_row("lost", 5, program)
    second = runs.fresh("lost", "resume=auto", steps=100000)
    assert "is in use: process" in ended(second, 2)
    ranks = [child for child in psutil.Process(program.pid).children() if "rcpo.launch" in child.cmdline()]
    (victim,) = (child for child in ranks if child.environ()["RANK"] == "1")
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    said = ended(program, 1)
    assert time.monotonic() - began < 30
    assert "rank 1 failed" in said and "SIGKILL" in said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks)
