"""The engine's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import get_scheduler

from rcpo.config import RunConfig
from rcpo.engine import schedule

PROGRAM = """
import sys
from pathlib import Path
from rcpo import distributed
from rcpo.config import RunConfig
from rcpo.engine import Engine
from rcpo.models import Policy, load_model

distributed.initialize()
Engine(Policy(load_model(Path(sys.argv[1]), RunConfig())), RunConfig(), total_steps=1)
"""


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(name: str, ratio: float) -> None:
    config, steps = RunConfig(), 8
    config.optim.schedule, config.optim.warmup_ratio = name, ratio
    theirs = "constant_with_warmup" if name == "constant" else name
    makers = schedule(config, steps), lambda o: get_scheduler(theirs, o, round(ratio * steps), steps)
    rates: list[list[float]] = []
    for make in makers:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make(optimizer)
        rates.append([])
        for _ in range(steps + 1):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], abs=1e-15)


def test_starting_compiles_nothing(tmp_path: Path) -> None:
    model, extensions = tiny_llama(tmp_path / "model"), tmp_path / "extensions"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    command = [sys.executable, "-c", PROGRAM, model]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    assert not extensions.exists() or not any(extensions.iterdir())
