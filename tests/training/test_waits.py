"""How often a training step waits for the device, counted on a device that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import DEVICE, Waits, counted, move
from tiny import held_out, sums_file, tiny_llama

import rcpo.reference.prepare
import rcpo.training.session
from rcpo.config.schema import RunConfig
from rcpo.engine.optimizers import parameter_groups, schedule
from rcpo.engine.zero import Engine
from rcpo.models.policy import Policy
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

PAIRS, BATCH, MICRO_BATCHES = 22, 8, 2  # the third step has two fillers


class BareEngine(Engine):
    """An engine at stage 0 whose DeepSpeed is a plain optimizer, on the device that is not there."""

    def __init__(self, policy: Policy, config: RunConfig, total_steps: int | None = None) -> None:
        move(policy)
        self.device = DEVICE
        training = total_steps is not None
        groups = parameter_groups(policy, config.optim.weight_decay) if training else []
        optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False) if training else None
        scheduler = None
        if optimizer is not None and total_steps is not None:
            scheduler = schedule(config, total_steps)(optimizer)

        def step() -> None:
            assert optimizer is not None and scheduler is not None
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

        self._engine: Any = SimpleNamespace(
            module=policy,
            train=policy.train,
            eval=policy.eval,
            step=step,
            zero_grad=policy.zero_grad,
            get_lr=lambda: scheduler.get_last_lr() if scheduler else [0.0],
            set_gradient_accumulation_boundary=lambda last: None,
            backward=lambda loss, scale_wrt_gas: loss.backward(),
            zero_optimization_partition_weights=lambda: False,
        )
        self._forward = policy
        self._plain, self._max_norm = True, config.train.max_grad_norm
        policy.examine()


def build(folder: Path, **changes: Any) -> RunConfig:
    config = RunConfig()
    config.model.path = tiny_llama(folder / "model")
    config.data.name, config.data.path = "pairs", sums_file(folder / "pairs.jsonl", PAIRS)
    config.data.eval_path, config.data.cache = held_out(config.data.path), "off"
    config.train.batch_size, config.train.max_steps = BATCH, 3
    config.train.micro_batch_size = BATCH // MICRO_BATCHES
    config.optim.lr = 1e-3
    for key, value in changes.items():
        owner: Any = config
        *path, name = key.split(".")
        for part in path:
            owner = getattr(owner, part)
        assert hasattr(owner, name), key
        setattr(owner, name, value)
    return config


@contextmanager
def trainer(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Trainer, Waits]]:
    for module in (rcpo.training.session, rcpo.reference.prepare):
        monkeypatch.setattr(module, "Engine", BareEngine)
    with Waits() as waits:
        session = Session(config, folder, training=True)
        session.prepare_reference()
        yield Trainer(session), waits


def waits_of_a_step(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Those of the third step, when every average has begun."""
    with trainer(config, folder, monkeypatch) as (made, waits):
        for _ in range(2):
            made.train_step()
        with counted(waits) as found:
            made.train_step()
    return found


NO_NUMBERS = {"objective.hyperparameters": {}}
PER_STEP = 3  # the metrics, the dynamics, the gradient norm
SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {  # changes, waits a step, and a micro-batch
    "rc=off": ({}, PER_STEP, 0),
    "step": ({"rc.enabled": True}, PER_STEP, 0),
    "microbatch": ({"rc.enabled": True, "rc.update": "microbatch"}, PER_STEP, 1),
    "loop": ({"rc.enabled": True, "rc.rule": "loop"}, PER_STEP, 0),
    "separate rows": ({"rc.enabled": True, "data.layout": "separate"}, PER_STEP, 0),
    "an α for each pair": ({"rc.enabled": True, "rc.scope": "pair"}, PER_STEP + 1, 0),
    "a running mean": ({"rc.enabled": True, "objective.name": "bco", **NO_NUMBERS}, PER_STEP + 1, 0),
    "no reference": ({"rc.enabled": True, "objective.name": "simpo", **NO_NUMBERS}, PER_STEP, 0),
    "a reference model": ({"reference.mode": "model", "reference.path": "model"}, PER_STEP, 0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_waits_at_most_three_times_and_a_micro_batch_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, per_step, per_micro_batch = SETTINGS[name]
    if "reference.path" in changes:
        changes = {**changes, "reference.path": str(tmp_path / "model")}
    found = waits_of_a_step(build(tmp_path, **changes), tmp_path, monkeypatch)
    assert 0 < sum(found.values()) <= per_step + MICRO_BATCHES * per_micro_batch, found
