"""`rcpo train` and `rcpo evaluate`: Hydra composes, the run's folder is made, `launch` gets it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from rcpo.commands.compose import Call, command
from rcpo.config.composition import job_dir, resolved_dir, user_part
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.parsing import parse, save_run_config
from rcpo.config.refusals import refusals_explained
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.folder import refuse_other
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import DONE
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.launch.run import launch
from rcpo.runs.folder import CONFIG_FILE
from rcpo.sweeps.multirun import train_many


def train(arguments: Sequence[str]) -> int:
    """`rcpo train ARGUMENTS`: returns the exit code; raises ConfigError for what is refused beforehand."""
    with command(arguments, nodes=("sweep",)) as call:
        if call.shown:
            return DONE
        folder = _folder_to_resume(call.overrides)
        if call.flags.multirun or _wants_multirun(call):
            if folder is not None:
                raise ConfigError("-m starts runs of their own folders: resume=auto continues each of them")
            return train_many(call.hydra, call.name, call.overrides)
        refuse_command_keys(call.overrides)
        return _single(call) if folder is None else _continue(call, folder)


def _wants_multirun(call: Call) -> bool:
    """Whether `hydra.mode` asks for several runs."""
    from hydra.types import RunMode

    return bool(call.hydra.get_mode(call.name, call.overrides) == RunMode.MULTIRUN)


def _single(call: Call) -> int:
    cfg = call.compose()
    config = parse(user_part(cfg))
    check(config, world_size(config))
    ranks = external_ranks()
    if ranks is not None and ranks.rank > 0:
        configure_log(Path("."), file=False)
        return launch(config, None)
    refuse_other(resolved_dir(cfg, None), config)
    with refusals_explained(call.hydra, call.name, call.overrides):
        job = call.hydra.run(call.name, _train_job, [*call.overrides, "hydra.mode=RUN"])
    return int(job.return_value)


def _folder_to_resume(overrides: Sequence[str]) -> Path | None:
    """The folder that `resume=DIR` names; None without it, and for null and auto."""
    values = [override.partition("=")[2].strip("'\"") for override in overrides if override[:7] == "resume="]
    return None if not values or values[0] in ("null", "auto") else Path(values[0])


def _continue(call: Call, run_dir: Path) -> int:
    """`resume=DIR`: the run's own configuration with overrides applied, in its folder."""
    given = [override for override in call.overrides if override.startswith("hydra.")]
    if given:
        raise ConfigError(f"{given[0]}: resume={run_dir} continues in that folder, as it was started")
    config = call.config_of(run_dir)
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
