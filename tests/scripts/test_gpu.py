"""`scripts/gpu`: its miniature on the CPU, so that what a GPU is asked is known to run."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import forked
import pytest

MAIN = Path(__file__).resolve().parents[2] / "scripts" / "accelerator" / "main.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_miniature_measures_and_checks_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), "--device", "cpu", "--tiny"]
    parts = "correctness,speed,memory,attention"
    done = forked.run([*command, "--only", parts, "--out", str(tmp_path)], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["skipped"] == [], done.stdout
    assert all(value for name, value in found["bf16 against fp32 on the CPU"].items() if "close" in name)
    assert found["sketch against exact"]["device − CPU, relative"] == 0
    assert found["rc=on against rc=off"]["equal"] and found["ZeRO stages"]["close"]
    assert found["resume"]["equal"]
    step = found["tiny, 4 pairs"]
    assert step["tokens/s"] > 0 and sum(step["phases"].values()) == pytest.approx(1)
    assert step["phases"]["forward"] > 0 and step["operations"]["operators"] > 1000
    assert set(found["kinds of attention"]) == {"shared rows, sdpa", "separate rows, sdpa"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's main module; it adds to the path, and finds its neighbours there."""
    monkeypatch.setattr(sys, "path", [str(MAIN.parent), *sys.path])
    for name in ("checks", "made_up", "speed"):
        monkeypatch.setitem(sys.modules, name, None)  # undoes the import at the end of the test
        del sys.modules[name]
    specification = importlib.util.spec_from_file_location("gpu_script", MAIN)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_section_that_fails_or_hangs_costs_the_others_neither_results_nor_time(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = script.Run(Namespace(device="cpu", tiny=False, seconds=60.0, out=str(tmp_path)), tmp_path)

    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    def free() -> int:  # as after an error of CUDA that does not go away
        raise RuntimeError("an illegal memory access")

    assert run.measure("first", lambda: {"value": 1}, takes=1) == {"value": 1}
    assert run.measure("second", broken, takes=1) is None
    with pytest.raises(TimeoutError), script.limited(0.01):
        time.sleep(5)
    monkeypatch.setattr(script, "free", free)
    assert run.measure("third", lambda: {"value": 3}, takes=1) == {"value": 3}
    assert run.measure("fourth", lambda: {"value": 4}, takes=1e6) is None
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["first"] == {"value": 1} and found["third"] == {"value": 3}
    assert [line.partition(":")[0] for line in found["skipped"]] == ["second", "memory after third", "fourth"]


def test_a_part_that_records_its_error_does_not_free_the_others_from_the_limit(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "GRACE", 0.05)
    began = time.monotonic()
    with script.limited(0.05):
        parts = [script.speed.attempted(lambda: time.sleep(20)) for _ in range(3)]
    assert all(part.startswith("TimeoutError") for part in parts) and time.monotonic() - began < 20
    time.sleep(0.1)  # and outside of the block, nothing is raised


def test_a_gpu_is_found_in_conf_by_its_drivers_name(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = script.speed
    for name, rate in {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Tesla T4": None,
    }.items():
        properties = Namespace(name=name)
        monkeypatch.setattr(speed.torch.cuda, "get_device_properties", lambda _, p=properties: p)
        found = speed.nominal_rate(speed.torch.device("cuda"))
        assert found == (None if rate is None else pytest.approx(rate, rel=0.01)), name


def test_a_machine_without_a_gpu_is_told_of_the_miniature() -> None:
    done = forked.run([sys.executable, str(MAIN)], timeout=120)
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr
