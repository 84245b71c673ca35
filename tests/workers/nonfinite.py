"""Steps whose numbers are not finite, on two ranks and every ZeRO stage; rank 0 writes what happened.

Only rank 1's loss (or, from its gradient alone, rank 1's weights' gradient) goes wrong, and only in step 2.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import held_out
from torch import Tensor

from rcpo.config.schema import RunConfig
from rcpo.errors import RunError
from rcpo.method.objectives import Objective
from rcpo.method.types import PairLogps
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


class Poisoned(Objective):
    """An objective whose losses, or only their gradients, are not finite while `armed`."""

    armed = ""

    def __call__(self, logps: PairLogps) -> Tensor:
        losses = super().__call__(logps)
        if self.armed == "loss":
            return losses * math.inf
        if self.armed == "gradient":
            losses.register_hook(lambda gradient: gradient * math.nan)
        return losses


def configuration(model: str, pairs: str, stage: int, policy: str) -> RunConfig:
    config = RunConfig()
    config.wandb.mode, config.reference.mode = "disabled", "model"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, held_out(pairs)
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 8, 2, 20
    config.train.on_nonfinite, config.train.max_nonfinite = policy, 2
    config.optim.schedule, config.optim.warmup_ratio = "constant", 0.0
    config.engine.stage, config.rc.enabled = stage, True
    return config


def start(config: RunConfig, folder: Path) -> tuple[Trainer, Poisoned]:
    session = Session(config, folder, training=True)
    session.prepare_reference()
    plain = session.objective
    poisoned = Poisoned(plain.spec, plain.reduction, plain.nll_coef, plain.hyperparameters)
    session.objective = session.forward.objective = poisoned
    return Trainer(session), poisoned


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (trainer.engine.state_dict() or {}).items()}


def skipped(config: RunConfig, folder: Path, kind: str) -> dict[str, Any]:
    """Step 1 good, step 2 bad, step 3 good; then bad ones until the run gives up."""
    trainer, objective = start(config, folder)
    rows = [trainer.train_step()]
    before = weights(trainer)
    objective.armed = kind if distributed.rank() == 1 else ""
    rows.append(trainer.train_step())
    same = all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    objective.armed = ""
    rows.append(trainer.train_step())
    moved = any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    objective.armed = kind
    message = ""
    while not message:
        try:
            trainer.train_step()
        except RunError as error:
            message = str(error)
    return {
        "counts": [row["nonfinite_steps"] for row in rows],
        "unchanged": same,
        "moved": moved,
        "losses": [str(row["loss"]) for row in rows],
        "gave_up_at": trainer.step,
        "message": message,
        "alpha": trainer.dynamics.calibrator.alpha if trainer.dynamics.calibrator else None,
    }


def stopped(config: RunConfig, folder: Path, kind: str) -> list[str]:
    """Every rank's message."""
    trainer, objective = start(config, folder)
    trainer.train_step()
    objective.armed = kind if distributed.rank() == 1 else ""
    try:
        trainer.train_step()
    except RunError as error:
        return distributed.gather_objects(str(error))
    return distributed.gather_objects("no error")


def try_all(model: str, pairs: str, output: Path, stages: Iterable[int]) -> None:
    results: dict[str, Any] = {}
    for stage in stages:
        for kind in ("loss", "gradient"):
            folder = output.parent / f"{kind}{stage}"
            if distributed.is_main():
                folder.mkdir()
            distributed.barrier()
            results[f"{kind}{stage}"] = {
                "skip": skipped(configuration(model, pairs, stage, "skip"), folder, kind),
                "stop": stopped(configuration(model, pairs, stage, "stop"), folder, kind),
            }
    if distributed.is_main():
        output.write_text(json.dumps(results, indent=1))
