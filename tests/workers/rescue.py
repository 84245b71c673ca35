"""A checkpoint under way on two ranks, of which one fails alone: no collective operation can follow."""

import json
import time
from pathlib import Path
from typing import Any

from rcpo.checkpoint import write as saving
from rcpo.config.schema import RunConfig
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


def states(folder: Path) -> list[Any]:
    """The ranks' random states in a checkpoint."""
    found: list[Any] = json.loads((folder / "state.json").read_text())["rng"]
    return found


def one_rank_fails(model: str, pairs: str, run_dir: Path) -> None:
    """Rank 1 writes slowly; both ranks end without another word to each other."""
    config = RunConfig()
    config.wandb.mode, config.reference.mode = "disabled", "model"
    config.model.name, config.model.path = "local", model
    config.data.name, config.data.path = "pairs", pairs
    config.train.batch_size, config.train.micro_batch_size = 8, 4
    config.engine.stage = 1
    trainer = Trainer(Session(config, run_dir, training=True))
    write = saving.write_tensors

    def slowly(*given: Any) -> Any:
        time.sleep(0.5 * distributed.rank())
        return write(*given)

    saving.write_tensors = slowly
    trainer.checkpoints.save(trainer.engine, {**trainer.state_dict(), "step": 1})
    saving.rescue_all()
