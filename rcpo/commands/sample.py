"""`rcpo sample`: a folder of pairs, from a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from rcpo.commands.compose import Call, command
from rcpo.config.composition import resolved_dir, user_part
from rcpo.config.nodes import node_of
from rcpo.config.onpolicy import ScoreConfig, onpolicy_config
from rcpo.config.parsing import parse
from rcpo.config.schema import RunConfig
from rcpo.launch.checks import check
from rcpo.launch.folder import keeping
from rcpo.launch.logs import configure_log
from rcpo.launch.outcomes import DONE
from rcpo.launch.ranks import is_first, world_size
from rcpo.models import hub
from rcpo.onpolicy.settings import SETTINGS_FILE, Settings, dated
from rcpo.onpolicy.start import start
from rcpo.runs.folder import refuse_locked

NODES = ("sample", "score", "pairing")
_OWN = (*NODES, "hydra")


def sample(arguments: Sequence[str]) -> int:
    """`rcpo sample ARGUMENTS`: returns the exit code; raises ConfigError for what is refused beforehand."""
    alone = "sample makes one set of pairs at a time, without -m"
    with command(arguments, nodes=NODES, own=("run",), alone=alone, folder="sample") as call:
        if call.shown:
            return DONE
        settings, folder = _settings(call)
    ready(settings)
    path = folder / SETTINGS_FILE
    dated(settings.config, path)
    end = keeping(path)  # what the answers there were made with
    if is_first():
        refuse_locked(folder)
        settings.write(folder)
    configure_log(folder, file=is_first())
    return end(start(settings, folder if is_first() else None))


def _settings(call: Call) -> tuple[Settings, Path]:
    if "run" not in call.own:
        cfg = call.compose()
        return settings_of(cfg, parse(user_part(cfg)), None), resolved_dir(cfg, None)
    run = call.folder("run")
    own = [one for one in call.overrides if node_of(one) in _OWN]
    config = call.config_of(run, [one for one in call.overrides if one not in own])
    cfg = call.compose(own)
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
