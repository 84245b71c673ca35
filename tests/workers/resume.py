"""Runs in parts, on the ranks of one group.

Their data are a JSONL file of 24 pairs and the batch is 16: an epoch is two steps, the second one short. With
the closed loop it is one of 89 beside it, `MANY`, so that control pairs can be set aside.
"""

import json
import random
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcpo.checkpoint.read import newest
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

STEPS, MANY = 7, "many.jsonl"
CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}
OBJECTIVES = {
    "dpo": ObjectiveConfig(name="dpo", reduction="mean", hyperparameters={"beta": 1.0}),
    "bco": ObjectiveConfig(name="bco", reduction="sum", nll_coef=0.5, hyperparameters={"beta": 0.1}),
    "mix": ObjectiveConfig(
        name="mix", reduction=None, hyperparameters={"parts": [{"name": "bco"}, {"name": "simper"}]}
    ),
}


def configuration(
    model: str,
    pairs: str,
    *,
    stage: int = 0,
    objective: str = "dpo",
    rc: str = "step",
    optimizer: str = "adamw",
    micro: int = 4,
    dtype: str = "fp32",
    reference: str = "precompute",
    offload: bool = False,
    sync: int = 0,
) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.resume = "auto"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 16, micro, STEPS
    config.train.dtype = dtype
    config.optim.name, config.optim.lr = optimizer, 0.1 if optimizer == "sgd" else 1e-2
    config.optim.momentum = 0.9 if optimizer == "sgd" else 0.0
    config.engine.stage, config.watch.patience = stage, 3
    config.engine.offload_optimizer, config.engine.offload_parameters = offload, offload and stage == 3
    config.reference.mode, config.reference.cache = reference, "off"
    config.reference.sync_every = sync
    config.objective = OBJECTIVES[objective]
    config.rc.enabled, config.rc.sketch = rc != "off", 32
    config.rc.update = rc if rc == "microbatch" else "step"
    if rc == "loop":
        config.data.path = str(Path(pairs).with_name(MANY))
        config.rc.rule, config.rc.control.every = "loop", 1
    return config


def part(config: RunConfig, folder: Path, stop: int, lost: int = 0, *, save: bool = True) -> Trainer:
    """Trains to a stop in a new session that continues the folder's newest checkpoint; `lost` more steps
    come after the checkpoint that it leaves, as before a crash."""
    found = newest(folder, print)
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    if found is not None:
        trainer.resume(found)
    resume_step = None if found is None else found.step
    with Tracker(folder, config, STEPS, distributed.is_main(), resume_step=resume_step) as tracker:
        while trainer.step < stop:
            tracker.log(step(trainer))
        if save:
            trainer.save(tracker)
            trainer.checkpoints.finish()
        for _ in range(lost):
            tracker.log(step(trainer))
    return trainer


def step(trainer: Trainer) -> dict[str, Any]:
    """A step's row with what it gave reason to warn of, and numbers from each generator."""
    row = trainer.train_step()
    return row | {"warnings": len(trainer.divergence.look(row))} | draws()


def draws() -> dict[str, float]:
    """Numbers from each generator, which this rank has used more often the higher it is."""
    for _ in range(1 + distributed.rank()):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    return {
        f"draw {rank} {place}": x
        for rank, xs in enumerate(distributed.gather_objects(drawn))
        for place, x in enumerate(xs)
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def compare(config: RunConfig, folder: Path, stops: list[int]) -> str:
    """What differs on any rank between a run and one that was interrupted at `stops`; empty if nothing."""
    folder.mkdir(exist_ok=True)
    whole, parts = folder / "whole", folder / "parts"
    expected = part(config, whole, STEPS, save=False).engine.state_dict()
    for stop in stops:
        part(config, parts, stop, lost=stop % 2)
    weights = part(config, parts, STEPS, save=False).engine.state_dict()
    problems = []
    if weights is not None and expected is not None:
        problems = [name for name, value in expected.items() if not torch.equal(value, weights[name])]
        if not any((value - weights[name]).abs().max() == 0 for name, value in expected.items()):
            problems.append("nothing is equal")
    distributed.barrier()
    if distributed.is_main():
        if [row["step"] for row in rows(parts)] != list(range(1, STEPS + 1)):
            problems.append("steps")
        problems += [f"row {a['step']}" for a, b in zip(rows(whole), rows(parts), strict=True) if a != b]
        shutil.rmtree(folder)
    return ", ".join(chain.from_iterable(distributed.gather_objects(problems)))


def compare_all(model: str, pairs: str, output: Path, cases: list[dict[str, Any]]) -> None:
    """Interrupted and uninterrupted runs; `output` gets what differs, by case. A case has the keys of
    `configuration`, and `stops`."""
    results = {}
    for case in cases:
        name = " ".join(f"{key}={value}" for key, value in case.items())
        stops = case.pop("stops")
        results[name] = compare(configuration(model, pairs, **case), output.with_suffix(""), stops)
    if distributed.is_main():
        output.write_text(json.dumps(results, indent=1))


def train_all(model: str, pairs: str, folder: Path, runs: list[dict[str, Any]]) -> None:
    """Each run goes on from what `folder` holds under its `name` to the step `stop`, with a checkpoint."""
    for case in runs:
        name, stop = case.pop("name"), case.pop("stop")
        part(configuration(model, pairs, **case), folder / name, stop)
