"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import sums_file, tiny_llama

WORKER = str(Path(__file__).parent / "workers" / "resume.py")

# stages × optimizers × precisions, and what has a state of its own: the calibration and bco's mean
CASES: list[dict[str, Any]] = [
    {"stage": 0, "reference": "model"},
    {"stage": 1},
    {"stage": 2, "objective": "bco"},
    {"stage": 3, "rc": "microbatch"},
    {"stage": 0, "rc": "off", "micro": 8},
    {"stage": 2, "optimizer": "sgd"},
    {"stage": 3, "objective": "bco", "rc": "off", "micro": 8},
    {"stage": 0, "dtype": "bf16"},
    {"stage": 3, "dtype": "bf16", "reference": "model"},
]


def interrupted(folder: Path, ranks: int, cases: list[dict[str, Any]]) -> dict[str, str]:
    """Runs the cases in one group of real processes: what differs, by case."""
    model, pairs, output = folder / "model", folder / "pairs.jsonl", folder / "result.json"
    tiny_llama(model)
    sums_file(pairs, 24)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(model), str(pairs), str(output), json.dumps(cases)]
    subprocess.run([*launcher, WORKER, *arguments], check=True, capture_output=True, timeout=280)
    result: dict[str, str] = json.loads(output.read_text())
    return result


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_bit_is_the_same_after_two_interruptions(tmp_path: Path, ranks: int) -> None:
    # 7 steps of 2 an epoch, continued after steps 2 (an epoch's end) and 3 (the middle of one)
    result = interrupted(tmp_path, ranks, CASES)
    assert len(result) == len(CASES)
    assert not {name: problems for name, problems in result.items() if problems}


def test_one_case_of_them(tmp_path: Path) -> None:
    assert interrupted(tmp_path, 1, [{"stage": 1, "objective": "bco"}]) == {"stage=1 objective=bco": ""}
