"""The engine's start and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from tiny import sums_file, tiny_llama

from rcpo.system import distributed

PROGRAM = """
import sys
from pathlib import Path
from typing import Any
from rcpo.system import distributed
from rcpo.config.schema import RunConfig
from rcpo.engine.zero import Engine
from rcpo.models.policy import Policy; from rcpo.models.loading import load_model

distributed.initialize()
Engine(Policy(load_model(Path(sys.argv[1]), RunConfig().model)), RunConfig(), total_steps=1)
"""


@pytest.mark.slow
def test_starting_compiles_nothing(tmp_path: Path) -> None:
    model, extensions = tiny_llama(tmp_path / "model"), tmp_path / "extensions"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    command = [sys.executable, "-c", PROGRAM, model]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    assert not extensions.exists() or not any(extensions.iterdir())


@pytest.mark.parametrize("stage", ["0", "1"])
def test_gradients_are_clipped_at_the_given_norm_or_not_at_all(tmp_path: Path, stage: str) -> None:
    worker = str(Path(__file__).parents[1] / "workers" / "clipping.py")
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 16)
    command = [sys.executable, worker, model, pairs, stage]
    result = forked.run(command, check=True)
    rows = json.loads(result.stdout.splitlines()[-1])
    norm = rows["null"]["grad_norm"]
    assert norm > 2.0
    # plain SGD: the weights move by the learning rate times the gradient that was left of it
    assert rows["null"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["1000.0"]["moved"] == pytest.approx(norm, rel=1e-4)
    assert rows["2.0"]["moved"] == pytest.approx(2.0, rel=1e-4)
    assert rows["0.5"]["moved"] == pytest.approx(0.5, rel=1e-4)
    assert {row["grad_norm"] for row in rows.values()} == {norm}  # what is logged is the norm before


def test_no_module_runs_after_a_backward_pass_and_a_closed_engine_keeps_no_weights(tmp_path: Path) -> None:
    worker = str(Path(__file__).parents[1] / "workers" / "closing.py")
    result = forked.run([sys.executable, worker, tiny_llama(tmp_path / "model")], check=True)
    left = json.loads(result.stdout.splitlines()[-1])
    assert left == {f"{stage} {dtype}": [0, 0] for stage in range(4) for dtype in ("fp32", "bf16")}


def test_a_restored_loss_scaler_goes_on_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.fp16 import loss_scaler

    from rcpo.engine.zero import scaler_state, set_scaler_state

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


@pytest.mark.parametrize(("gpus", "local", "place"), [(4, "0", 0), (4, "2", 2), (1, "2", 0)])
def test_each_rank_of_a_node_has_the_gpu_of_its_number(
    gpus: int, local: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv(distributed.LOCAL, raising=False)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert distributed.device() == torch.device("cuda", place)
