"""`rcpo sample`: a folder of pairs, from a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rcpo.commands.compose import show, shows
from rcpo.config.composition import (
    PRIMARY,
    compose_with,
    hydra_session,
    over_run,
    resolved_dir,
    split_arguments,
    user_part,
)
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.onpolicy import ScoreConfig, onpolicy_config
from rcpo.config.parsing import parse, read_tree, structure, to_container
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.logs import configure_log
from rcpo.launch.ranks import external_ranks, world_size
from rcpo.models import hub
from rcpo.onpolicy.settings import SETTINGS_FILE, Settings, dated
from rcpo.onpolicy.start import start
from rcpo.runs.folder import CONFIG_FILE, refuse_locked

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

NODES = ("sample", "score", "pairing")
_OWN = (*NODES, "hydra")


def sample(arguments: Sequence[str]) -> int:
    """`rcpo sample ARGUMENTS`: returns the exit code; raises ConfigError for what is refused beforehand."""
    flags = split_arguments(arguments)
    name = flags.config_name or PRIMARY
    if flags.multirun:
        raise ConfigError("command line: sample makes one set of pairs at a time, without -m")
    runs = [override.removeprefix("run=") for override in flags.overrides if override.startswith("run=")]
    overrides = with_folder([one for one in flags.overrides if not one.startswith("run=")], "sample")
    refuse_command_keys(overrides, NODES)
    with hydra_session(flags.config_dir, flags.config_path) as hydra:
        if shows(flags):
            return show(hydra, name, flags, overrides)
        settings, folder = _settings(hydra, name, overrides, Path(runs[0]) if runs else None)
    ready(settings)
    dated(settings.config, folder / SETTINGS_FILE)
    ranks = external_ranks()
    main_rank = ranks is None or ranks.rank == 0
    if main_rank:
        refuse_locked(folder)
        settings.write(folder)
    configure_log(folder, file=main_rank)
    return start(settings, folder if main_rank else None)


def with_folder(overrides: Sequence[str], what: str) -> list[str]:
    """The overrides with a folder of the command's own, where none is given."""
    if any(override.startswith("hydra.run.dir=") for override in overrides):
        return list(overrides)
    return [*overrides, f"hydra.run.dir='outputs/${{now:%Y-%m-%d_%H-%M-%S-%f}}_{what}'"]


def _settings(hydra: Hydra, name: str, overrides: Sequence[str], run: Path | None) -> tuple[Settings, Path]:
    if run is None:
        cfg = compose_with(hydra, name, overrides)
        return settings_of(cfg, parse(user_part(cfg)), None), resolved_dir(cfg, None)
    own = [one for one in overrides if one.lstrip("+~").partition("=")[0].partition(".")[0] in _OWN]
    base = to_container(structure(read_tree(run / CONFIG_FILE)))
    config = parse(over_run(hydra, base, [one for one in overrides if one not in own]))
    cfg = compose_with(hydra, name, own)
    return settings_of(cfg, config, run.resolve()), resolved_dir(cfg, None)


def settings_of(cfg: DictConfig, config: RunConfig, run: Path | None) -> Settings:
    """The validated settings; raises ConfigError."""
    # nothing is trained, so the global batch need not fit this number of processes
    config.train.batch_size = (config.train.micro_batch_size or 1) * world_size(config)
    return Settings(config, onpolicy_config(cfg, config), run)


def ready(settings: Settings) -> None:
    """Refuse what no sampling could use, and download what it needs; raise ConfigError."""
    config = settings.config
    check(config, world_size(config))
    fetch_scorer(config, settings.nodes.score)


def fetch_scorer(config: RunConfig, score: ScoreConfig) -> None:
    """Download the model that scores, so that no rank has to; raise ConfigError where it cannot be had."""
    if score.path is None:
        return
    model = config.model
    pickle, code = model.allow_pickle, model.trust_remote_code
    folder = hub.fetch("score.path", score.path, score.revision, pickle=pickle, code=code)
    hub.check_weights("score.path", folder, pickle=pickle)
