"""Prepares a run's reference on some ranks; the pass is stopped or killed on the last of them, or ends."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from rcpo.config.schema import RunConfig
from rcpo.engine.zero import Engine
from rcpo.reference import prepare
from rcpo.system import distributed
from rcpo.system.signals import Stopped
from rcpo.training.session import Session


def run(config: RunConfig, folder: Path, batch: int | None, how: str) -> None:
    """Breaks off after `batch`, counted from 1: `how` is stop or kill. Writes FOLDER/RANK.json.

    With "kill", every earlier batch is kept as soon as it is computed.
    """
    said, batches, forwards = list[str](), 0, 0
    forward = Engine.forward

    def counted(engine: Engine, *given: Any, **named: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return forward(engine, *given, **named)

    def stop() -> bool:
        nonlocal batches
        batches += 1
        due = batches == batch and distributed.rank() == distributed.world_size() - 1
        if due and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return due

    Engine.forward = counted  # type: ignore[method-assign]
    if how == "kill":
        prepare.PROGRESS_EVERY = -1.0
    session = Session(config, folder, training=True)
    try:
        session.prepare_reference(said.append, stop)
    except Stopped as stopped:
        said.append(str(stopped))
    result = {"said": said, "forwards": forwards}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(result))
