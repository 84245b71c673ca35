"""Trains the same global batches in several splits and ZeRO stages in one process group; rank 0 writes rows.

Usage: split_invariance.py MODEL PAIRS OUTPUT SPLITS STAGES OPTIMIZERS OBJECTIVES
SPLITS are accumulation×micro, e.g. "1x16,4x4". PAIRS is a JSONL file of 24 pairs, so that every other global
batch of 16 is a short one of 8, filled up in some splits.
"""

import itertools
import json
import sys
from pathlib import Path

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

KEEP = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logratios/chosen")
MEASURED = ("dynamics/", "rc/")


OBJECTIVES = {
    "dpo": ObjectiveConfig(name="dpo", reduction="mean", hyperparameters={"beta": 1.0}),
    "tidpo": ObjectiveConfig(name="tidpo", reduction="importance", hyperparameters={"beta": 1.0}),
    "bco": ObjectiveConfig(name="bco", reduction="sum", nll_coef=0.5, hyperparameters={"beta": 0.1}),
    "simpo": ObjectiveConfig(name="simpo", reduction="mean", hyperparameters={"beta": 2.0, "gamma": 1.0}),
    "sft": ObjectiveConfig(name="sft", reduction="mean", hyperparameters={}),
}


def configuration(
    model: str, pairs: str, micro: int, stage: int, optimizer: str, objective: str
) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 16, micro, 5
    config.optim.name, config.optim.schedule, config.optim.warmup_ratio = optimizer, "constant", 0.0
    config.optim.lr = 0.1 if optimizer == "sgd" else 1e-3
    config.engine.stage = stage
    name, _, rule = objective.partition("+")  # such as dpo+loop
    config.objective = OBJECTIVES[name]
    config.rc.enabled = name != "sft"
    if rule == "pair":
        config.rc.scope = rule
    elif rule:
        config.rc.rule, config.rc.signal = rule, "fresh"
    config.rc.sketch = 32
    return config


def rows(config: RunConfig, folder: Path) -> list[dict[str, float]]:
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    steps = [trainer.train_step() for _ in range(session.total_steps)]
    return [{k: v for k, v in row.items() if k in KEEP or k.startswith(MEASURED)} for row in steps]


def main() -> None:
    model, pairs, output, splits, stages, optimizers, objectives = sys.argv[1:]
    distributed.initialize()
    results = {}
    for split in splits.split(","):
        accumulation, micro = map(int, split.split("x"))
        if distributed.world_size() * accumulation * micro != 16:
            raise ConfigError(f"{split} on {distributed.world_size()} ranks is not a batch of 16")
        for stage in map(int, stages.split(",")):
            for optimizer, objective in itertools.product(optimizers.split(","), objectives.split(",")):
                config = configuration(model, pairs, micro, stage, optimizer, objective)
                name = f"{objective} {optimizer} {distributed.world_size()}x{split} zero{stage}"
                results[name] = rows(config, Path(output).parent)
    if distributed.is_main():
        Path(output).write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
