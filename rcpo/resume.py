"""What a run goes on from: its end, a checkpoint of its own, or nothing; refuses what is another run."""

from __future__ import annotations

import logging
from pathlib import Path

from rcpo import distributed
from rcpo.checkpoint import Checkpoint, any_checkpoint, newest
from rcpo.config import ConfigError, RunConfig
from rcpo.config.changes import changes, refuse_changes, refuse_other_run
from rcpo.runfolder import finished_state
from rcpo.session import Session

log = logging.getLogger(__name__)


def is_complete(config: RunConfig, run_dir: Path) -> bool:
    """Whether the folder's run came to its end as configured. Collective.

    Raises ConfigError where it ended otherwise and left no checkpoint to go on from.
    """
    state = distributed.broadcast_object(finished_state(run_dir))
    if state is None:
        return False
    found = changes(state["config"], config)
    if found and not any_checkpoint(run_dir):
        raise ConfigError(
            f"resume={config.resume}: the run in {run_dir} came to its end and left no checkpoint to go on "
            f"from with {'; '.join(found)}"
        )
    return not found


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


def refuse_other_contents(checkpoint: Checkpoint, session: Session) -> None:
    """Raises ConfigError where the data or the models are not those that the checkpoint's run was given."""
    before, now = checkpoint.state["contents"], session.contents
    found = [f"{what} (by content)" for what, content in now.items() if before.get(what) != content]
    refuse_changes(found, str(checkpoint.folder), session.config)


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
