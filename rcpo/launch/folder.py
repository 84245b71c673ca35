"""The folder of a run: whether a run may start in it, and what it holds when the run starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rcpo.config.changes import refuse_other_run
from rcpo.config.parsing import save_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import REFUSED
from rcpo.launch.ranks import is_first, world_size
from rcpo.runs.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    finished_state,
    refuse_locked,
    stored_state,
)
from rcpo.runs.inputs import read_inputs, refuse_other_training, standing
from rcpo.system.files import replace_text
from rcpo.system.text import os_message


def refuse_other(run_dir: Path, config: RunConfig, processes: int | None = None) -> None:
    """A run writes over no other; raises ConfigError for a folder in use, of another run, or not writable.

    `processes` are its ranks (None: those that it would have here). Called before anything in the folder
    changes; the trainer looks again, at the checkpoint that it loads.
    """
    try:
        present = run_dir
        while not present.exists():
            present = present.parent
    except OSError as error:  # a name that is too long, a folder that cannot be looked into
        raise ConfigError(f"{os_message(error)}; choose another hydra.run.dir") from error
    if not present.is_dir():
        raise ConfigError(f"{run_dir}: {present} is not a folder; choose another hydra.run.dir")
    if not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError(f"{run_dir}: {present} cannot be written to; choose another hydra.run.dir")
    if not run_dir.is_dir():
        return
    if config.resume is None and ((run_dir / METRICS_FILE).exists() or (run_dir / CHECKPOINTS).exists()):
        raise ConfigError(
            f"{run_dir} holds a run already; resume=auto continues it, another hydra.run.dir starts afresh"
        )
    refuse_locked(run_dir)
    before, finished = stored_state(run_dir), finished_state(run_dir)
    if finished is not None:
        found = standing(run_dir, finished, config, read_inputs(config))
        refuse_other_training(run_dir, found, config)
    if before is not None and (finished is None or found.trained):
        refuse_other_run(before, str(run_dir), config, processes or world_size(config))


def refuse_named_run(resume: str | None) -> None:
    """Raise ConfigError where a run that has a folder of its own is told to continue in another one."""
    if resume not in (None, "auto"):
        raise ConfigError(
            f"resume={resume}: only the word resume=DIR of `rcpo train` continues the run in DIR; in a file, "
            "or for several runs, resume is null or auto"
        )


def ready_folder(config: RunConfig, run_dir: Path, record: str = ".") -> Path | None:
    """Make the folder of a run, with its log and, in `record`, its resolved configuration.

    Returns it to rank 0, and None to the other ranks of an outer launcher.
    """
    if is_first():
        (run_dir / record).mkdir(parents=True, exist_ok=True)
        save_run_config(config, run_dir / record / CONFIG_FILE)
    configure_log(run_dir, file=is_first())
    return run_dir if is_first() else None


def keeping(path: Path) -> Callable[[int], int]:
    """Return a function that passes an exit code on and, after a refusal, writes the file as it is now."""
    before = path.read_text(encoding="utf-8") if is_first() and path.exists() else None

    def end(code: int) -> int:
        if code == REFUSED and before is not None:
            replace_text(path, before)
        return code

    return end


def make_folder(folder: Path, key: str) -> None:
    """Make a folder that `key` names; raise ConfigError where it cannot be, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{os_message(error)}: it cannot be a folder; choose another {key}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written to; choose another {key}")
