"""What a run goes on from: its end, a checkpoint of its own, or nothing; refuses what is another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from rcpo.checkpoint.read import Checkpoint, any_checkpoint, newest
from rcpo.config.changes import refuse_changes, refuse_other_run
from rcpo.config.schema import RunConfig, TrainConfig
from rcpo.errors import ConfigError
from rcpo.runs.folder import finished_state
from rcpo.runs.inputs import Inputs, Standing, read_inputs, refuse_other_training, standing
from rcpo.system import distributed

log = logging.getLogger(__name__)


def shared_inputs(config: RunConfig) -> Inputs:
    """What the configuration reads, by content, as rank 0 sees it. Collective; raises ConfigError."""
    found: tuple[Inputs, str | None] = {}, None
    if distributed.is_main():
        try:
            found = read_inputs(config), None
        except ConfigError as error:
            found = {}, str(error)
    inputs, problem = distributed.broadcast_object(found)
    if problem is not None:
        raise ConfigError(problem)
    return inputs


def finished_standing(config: RunConfig, run_dir: Path) -> Standing | None:
    """How the finished run in the folder stands to what is configured; None without one. Collective.

    Raises ConfigError where it is another run and cannot go on as this one.
    """
    state = distributed.broadcast_object(finished_state(run_dir))
    if state is None:
        return None
    inputs = shared_inputs(config)
    found: Standing = distributed.broadcast_object(standing(run_dir, state, config, inputs))
    refuse_other_training(run_dir, found, config)
    return found


def find_checkpoint(config: RunConfig, run_dir: Path) -> Checkpoint | None:
    """The verified checkpoint that a run continues from; None for a fresh start. Collective.

    Raises ConfigError where it belongs to a run of another configuration, and where a fresh run would write
    over it.
    """
    if config.resume is None:
        if any_checkpoint(run_dir):
            raise ConfigError(f"{run_dir} holds checkpoints; resume=auto continues them")
        return None
    checkpoint = newest(run_dir, _warn)
    if checkpoint is not None:
        refuse_other_run(checkpoint.state, str(checkpoint.folder), config, distributed.world_size())
    return checkpoint


def refuse_other_contents(
    checkpoint: Checkpoint, contents: Mapping[str, str], config: RunConfig, *, couples_batch: bool
) -> None:
    """Raise ConfigError where the data or the models are not those that the checkpoint's run was given."""
    before = checkpoint.state["contents"]
    found = [f"{what} (by content)" for what, content in contents.items() if before.get(what) != content]
    if couples_batch:
        found += _other_microbatch(checkpoint, config)
    refuse_changes(found, str(checkpoint.folder), config)


def _other_microbatch(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """A micro-batch that follows from another number of ranks is another loss where its pairs are coupled."""
    train = checkpoint.state["config"]["train"]
    before = TrainConfig(batch_size=train["batch_size"], micro_batch_size=train["micro_batch_size"])
    then = before.microbatch(checkpoint.state["world_size"])
    now = config.train.microbatch(distributed.world_size())
    return (
        [] if then == now else [f"train.micro_batch_size (null, by the number of processes): {then} -> {now}"]
    )


def other_layout(checkpoint: Checkpoint, config: RunConfig) -> str | None:
    """What to say where a checkpoint comes from other ranks or another ZeRO stage; None where it does not."""
    then = checkpoint.state["world_size"], checkpoint.state["config"]["engine"]["stage"]
    now = distributed.world_size(), config.engine.stage
    if then == now:
        return None
    return (
        f"the checkpoint was written by {then[0]} process(es) with engine.stage={then[1]}; {now[0]} with "
        f"engine.stage={now[1]} continue it: equal up to rounding, not bit for bit"
    )


def _warn(line: str) -> None:
    if distributed.is_main():
        log.warning(line)
