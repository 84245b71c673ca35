"""Steps on responses with several turns, on some ranks; rank 0 writes their rows."""

import json
from pathlib import Path

from rcpo.config.schema import RunConfig
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


def take_steps(config: RunConfig, folder: Path, output: Path) -> None:
    distributed.initialize()
    session = Session(config, folder, training=True)
    session.prepare_reference()
    trainer = Trainer(session)
    rows = [trainer.train_step() for _ in range(config.train.max_steps or 0)]
    if distributed.is_main():
        output.write_text(json.dumps(rows))
    distributed.shutdown()
