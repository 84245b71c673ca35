"""Three lines of calibration in one's own loop: the same α under every way of spreading it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama

WORKER = str(Path(__file__).parent.parent / "workers" / "recipe.py")


@pytest.mark.slow
@pytest.mark.serial
def test_the_same_alpha_everywhere(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    runs = {}
    for kind, ranks in {"plain": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}.items():
        output = tmp_path / f"{kind}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, WORKER, model, kind, str(output)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        runs[kind] = json.loads(output.read_text(encoding="utf-8"))
    assert runs["plain"][0][0] == 1.0 and runs["plain"][0][1] != 1.0
    for kind, rows in runs.items():
        for row, expected in zip(rows, runs["plain"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5), kind
