"""`rcpo train` and `rcpo evaluate`: Hydra composes, the run's folder is made, `launch` gets it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rcpo.commands.compose import show, shows, wants_multirun
from rcpo.config.composition import (
    PRIMARY,
    compose_with,
    hydra_session,
    job_dir,
    over_run,
    resolved_dir,
    split_arguments,
    user_part,
)
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.parsing import parse, read_tree, save_run_config, structure, to_container
from rcpo.config.refusals import refusals_explained
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.folder import refuse_other
from rcpo.launch.logs import configure_log
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.launch.run import launch
from rcpo.runs.folder import CONFIG_FILE
from rcpo.sweeps.multirun import train_many

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra


def train(arguments: Sequence[str]) -> int:
    """`rcpo train ARGUMENTS`: returns the exit code; raises ConfigError for what is refused beforehand."""
    flags = split_arguments(arguments)
    name = flags.config_name or PRIMARY
    with hydra_session(flags.config_dir, flags.config_path) as hydra:
        if shows(flags):
            return show(hydra, name, flags, flags.overrides)
        folder = _folder_to_resume(flags.overrides)
        several = flags.multirun or wants_multirun(hydra, name, flags.overrides)
        refuse_command_keys(flags.overrides, allowed=("sweep",) if several else ())
        if several:
            if folder is not None:
                raise ConfigError("-m starts runs of their own folders: resume=auto continues each of them")
            return train_many(hydra, name, flags.overrides)
        if folder is not None:
            return _continue(hydra, folder, flags.overrides)
        return _single(hydra, name, flags.overrides)


def _single(hydra: Hydra, name: str, overrides: Sequence[str]) -> int:
    cfg = compose_with(hydra, name, overrides)
    config = parse(user_part(cfg))
    check(config, world_size(config))
    ranks = external_ranks()
    if ranks is not None and ranks.rank > 0:
        configure_log(Path("."), file=False)
        return launch(config, None)
    refuse_other(resolved_dir(cfg, None), config)
    with refusals_explained(hydra, name, overrides):
        job = hydra.run(name, _train_job, [*overrides, "hydra.mode=RUN"])
    return int(job.return_value)


def _folder_to_resume(overrides: Sequence[str]) -> Path | None:
    """The folder that `resume=DIR` names; None without it, and for null and auto."""
    values = [override.partition("=")[2].strip("'\"") for override in overrides if override[:7] == "resume="]
    return None if not values or values[0] in ("null", "auto") else Path(values[0])


def _continue(hydra: Hydra, run_dir: Path, overrides: Sequence[str]) -> int:
    """`resume=DIR`: the run's own configuration with overrides applied, in its folder."""
    given = [override for override in overrides if override.startswith("hydra.")]
    if given:
        raise ConfigError(f"{given[0]}: resume={run_dir} continues in that folder, as it was started")
    base = to_container(structure(read_tree(run_dir / CONFIG_FILE)))
    config = parse(over_run(hydra, base, overrides))
    check(config, world_size(config))
    ranks = external_ranks()
    main_rank = ranks is None or ranks.rank == 0
    if main_rank:
        refuse_other(run_dir, config)
        save_run_config(config, run_dir / CONFIG_FILE)
    configure_log(run_dir, file=main_rank)
    return launch(config, run_dir if main_rank else None)


def _train_job(cfg: DictConfig) -> int:
    """Hydra's task for a single run: this process, in the folder that Hydra made."""
    run_dir = job_dir()
    config = parse(user_part(cfg))
    save_run_config(config, run_dir / CONFIG_FILE)
    return launch(config, run_dir)
