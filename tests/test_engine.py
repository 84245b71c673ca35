"""The engine's start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import sums_file, tiny_llama
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


@pytest.mark.parametrize("stage", ["0", "1"])
def test_gradients_are_clipped_at_the_given_norm_or_not_at_all(tmp_path: Path, stage: str) -> None:
    worker = str(Path(__file__).parent / "workers" / "clipping.py")
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 16)
    command = [sys.executable, worker, model, pairs, stage]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    rows = json.loads(result.stdout.splitlines()[-1])
    norm = rows["null"]["grad_norm"]
    assert norm > 2.0
    # plain SGD: the weights move by the learning rate times the gradient that was left of it
    assert rows["null"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["1000.0"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["2.0"]["moved"] == pytest.approx(2.0, rel=1e-4)
    assert rows["0.5"]["moved"] == pytest.approx(0.5, rel=1e-4)
    assert {row["grad_norm"] for row in rows.values()} == {norm}  # what is logged is the norm before


def test_a_restored_loss_scaler_goes_on_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.fp16 import loss_scaler

    from rcpo.engine import scaler_state, set_scaler_state

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 says more

    def new() -> loss_scaler.DynamicLossScaler:
        return loss_scaler.DynamicLossScaler(
            init_scale=2**16, scale_window=3, min_scale=1, delayed_shift=2,
            consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.half,
        )  # fmt: skip

    first, other = new(), new()
    for overflow in (True, True, False, False):
        first.update_scale(overflow)
    set_scaler_state(other, json.loads(json.dumps(scaler_state(first))))
    scales = []
    for overflow in (False, False, True, False, True, False, False, False, False):
        first.update_scale(overflow)
        other.update_scale(overflow)
        scales.append((first.cur_scale, other.cur_scale))
    assert all(a == b for a, b in scales) and len({a for a, _ in scales}) > 1
