"""One SGD step for each of several `train.max_grad_norm`. Usage: clipping.py MODEL PAIRS STAGE"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

LR = 1e-3


def one_step(model: str, pairs: str, stage: int, limit: float | None) -> dict[str, float]:
    """The logged norm, and how far the weights moved in units of the learning rate."""
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_fraction = "pairs", pairs, 0.0
    config.train.batch_size = config.train.micro_batch_size = 16
    config.train.max_steps, config.train.max_grad_norm = 1, limit
    config.optim.name, config.optim.lr = "sgd", LR
    config.engine.stage = stage
    config.objective = ObjectiveConfig(name="dpo", reduction="sum", hyperparameters={"beta": 1.0})
    session = Session(config, Path(tempfile.mkdtemp()), training=True)
    session.prepare_reference()
    weights = list(session.engine.policy.parameters())
    before = [weight.detach().clone() for weight in weights]
    row = Trainer(session).train_step()
    moved = sum(float((a.detach() - b).double().square().sum()) for a, b in zip(weights, before)) ** 0.5
    return {"grad_norm": row["grad_norm"], "moved": moved / LR}


def main() -> None:
    model, pairs, stage = sys.argv[1:]
    distributed.initialize()
    rows = {}
    for limit in (None, 1000.0, 2.0, 0.5):
        rows["null" if limit is None else str(limit)] = one_step(model, pairs, int(stage), limit)
    print(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
