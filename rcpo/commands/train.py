"""`rcpo train`: one composed configuration becomes a run in its folder; several become a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rcpo.commands.compose import Call, command
from rcpo.config.composition import resolved_dir, user_part
from rcpo.config.nodes import refuse_command_keys
from rcpo.config.parsing import parse
from rcpo.config.paths import local
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.checks import check
from rcpo.launch.folder import ready_folder, refuse_named_run, refuse_other
from rcpo.launch.outcomes import DONE
from rcpo.launch.ranks import is_first, world_size
from rcpo.launch.run import launch
from rcpo.sweeps.multirun import train_many

_MAY_SET_MODE = re.compile(r"[+]*hydra(\.mode|\.searchpath)?=")


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
        config, run_dir = _fresh(call) if folder is None else _continued(call, folder)
    check(config, world_size(config))
    if is_first():
        refuse_other(run_dir, config)
    return launch(config, ready_folder(config, run_dir))


def _wants_multirun(call: Call) -> bool:
    """Whether `hydra.mode`, on the command line or in the user's own files, asks for several runs."""
    flags = call.flags
    own = flags.config_name or flags.config_dir or flags.config_path
    if not (own or any(map(_MAY_SET_MODE.match, call.overrides))):
        return False  # to compose what rcpo ships would tell nothing, and takes a quarter of a second
    from hydra.types import RunMode

    return bool(call.hydra.get_mode(call.name, call.overrides) == RunMode.MULTIRUN)


def _folder_to_resume(overrides: Sequence[str]) -> Path | None:
    """The folder that `resume=DIR` names; None without it, and for null and auto."""
    values = [override.partition("=")[2].strip("'\"") for override in overrides if override[:7] == "resume="]
    return None if not values or values[0] in ("null", "auto") else local("resume", values[0])


def _fresh(call: Call) -> tuple[RunConfig, Path]:
    """The configuration and the folder that the command line stands for."""
    cfg = call.compose()
    config = parse(user_part(cfg))
    refuse_named_run(config.resume)
    return config, resolved_dir(cfg, None).absolute()


def _continued(call: Call, run_dir: Path) -> tuple[RunConfig, Path]:
    """`resume=DIR`: the run's own configuration with overrides applied, and its folder."""
    return call.config_of(run_dir), run_dir
