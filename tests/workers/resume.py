"""Interrupted and uninterrupted runs in one process group; each rank compares them bit for bit.

Usage: resume.py MODEL PAIRS OUTPUT CASES; CASES is a JSON list of objects with the keys of `configuration`.
PAIRS is a JSONL file of 24 pairs and the batch 16: an epoch is two steps, the second one short.
"""

import json
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rcpo import distributed
from rcpo.checkpoint import Checkpoints
from rcpo.config import ObjectiveConfig, RunConfig
from rcpo.session import Session
from rcpo.tracking import Tracker
from rcpo.trainer import Trainer

STEPS = 7
CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}
OBJECTIVES = {
    "dpo": ObjectiveConfig(name="dpo", reduction="mean", hyperparameters={"beta": 1.0}),
    "bco": ObjectiveConfig(name="bco", reduction="sum", nll_coef=0.5, hyperparameters={"beta": 0.1}),
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
) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.resume = "auto"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, pairs
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 16, micro, STEPS
    config.train.dtype = dtype
    config.optim.name, config.optim.lr = optimizer, 0.1 if optimizer == "sgd" else 1e-2
    config.optim.momentum = 0.9 if optimizer == "sgd" else 0.0
    config.engine.stage = stage
    config.reference.mode, config.reference.cache = reference, "off"
    config.objective = OBJECTIVES[objective]
    config.rc.enabled, config.rc.sketch = rc != "off", 32
    config.rc.update = rc if rc != "off" else "step"
    return config


def run(config: RunConfig, folder: Path, stops: list[int]) -> dict[str, torch.Tensor] | None:
    """Trains to each stop in a new session that continues the last one's checkpoint; the final weights."""
    for stop in stops:
        checkpoints = Checkpoints(folder, keep=2)
        found = checkpoints.newest(print)
        session = Session(config, folder, training=True)
        session.prepare_reference()
        trainer = Trainer(session)
        if found is not None:
            trainer.resume(found)
        resume_step = None if found is None else found.step
        with Tracker(folder, config, STEPS, distributed.is_main(), resume_step=resume_step) as tracker:
            while trainer.step < stop:
                tracker.log(trainer.train_step())
            if stop != stops[-1]:
                trainer.save(tracker)
                if stop % 2:  # steps after the checkpoint that a crash loses
                    tracker.log(trainer.train_step())
    return trainer.engine.state_dict()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def compare(config: RunConfig, folder: Path) -> str:
    """What differs between the two runs on any rank; empty if nothing."""
    folder.mkdir(exist_ok=True)
    whole, parts = folder / "whole", folder / "parts"
    expected, weights = run(config, whole, [STEPS]), run(config, parts, [2, 3, STEPS])
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


def main() -> None:
    model, pairs, output, cases = sys.argv[1:]
    distributed.initialize()
    results = {}
    for case in json.loads(cases):
        config = configuration(model, pairs, **case)
        name = " ".join(f"{key}={value}" for key, value in case.items())
        results[name] = compare(config, Path(output).with_suffix(""))
    if distributed.is_main():
        Path(output).write_text(json.dumps(results, indent=1))
    distributed.shutdown()


if __name__ == "__main__":
    main()
