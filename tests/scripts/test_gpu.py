"""`scripts/gpu`: its miniature on the CPU, so that what a GPU is asked is known to run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest

MAIN = Path(__file__).resolve().parents[2] / "scripts" / "accelerator" / "main.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_miniature_measures_and_checks_everything_but_a_gpus_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), "--device", "cpu", "--tiny", "--only", "correctness,speed,memory"]
    done = forked.run([*command, "--out", str(tmp_path)], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [line.partition(":")[0] for line in found["skipped"]] == ["memory"], done.stdout
    assert all(value for name, value in found["bf16 against fp32 on the CPU"].items() if "close" in name)
    assert found["sketch against exact"]["device − CPU, relative"] == 0
    assert found["rc=on against rc=off"]["equal"] and found["ZeRO stages"]["close"]
    assert found["resume"]["equal"]
    step = found["tiny, 4 pairs"]
    assert step["tokens/s"] > 0 and sum(step["phases"].values()) == pytest.approx(1)
    assert step["phases"]["forward"] > 0 and step["operations"]["operators"] > 1000
    assert set(found["kinds of attention"]) == {"shared rows, sdpa", "separate rows, sdpa"}


def test_a_machine_without_a_gpu_is_told_of_the_miniature() -> None:
    done = forked.run([sys.executable, str(MAIN)], timeout=120)
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr
