"""`rcpo sweep`: many runs, by grid or by search, and what they show beside each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rcpo.commands.compose import command
from rcpo.config.composition import compose_with
from rcpo.config.refusals import refusals_explained
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE
from rcpo.sweeps import summary
from rcpo.sweeps.multirun import compose_many, multirun, summary_code
from rcpo.sweeps.naming import refuse_shared_folders, run_name
from rcpo.sweeps.search import search
from rcpo.sweeps.settings import sweep_config

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override


def sweep(arguments: Sequence[str]) -> int:
    """`rcpo sweep ARGUMENTS`: the runs that are missing, then the comparison of all.

    `compare=DIR` starts nothing. Returns the exit code of the runs; raises ConfigError for what is refused
    beforehand.
    """
    with command(arguments, nodes=("sweep", "study"), own=("compare",)) as call:
        if call.shown:
            return DONE
        if "compare" in call.own:
            if call.overrides:
                raise ConfigError("compare=DIR starts no run and takes no other argument")
            conclude(call.folder("compare"))
            return DONE
        return _sweep(call.hydra, call.name, call.overrides)


def _sweep(hydra: Hydra, name: str, overrides: Sequence[str]) -> int:
    cfg = compose_many(hydra, name, overrides)
    settings = sweep_config(cfg)
    sweep_dir = Path(cfg.hydra.sweep.dir)
    varied = _sweeps(parsed(hydra, name, cfg, overrides), settings.search)
    overrides = [*overrides, *_defaults(overrides, _naming(cfg, varied))]
    found = None
    if settings.search == "optuna":
        outcomes, found = search(hydra, name, parsed(hydra, name, cfg, overrides), settings, cfg)
    else:
        outcomes = multirun(hydra, name, overrides, cfg)
    conclude(sweep_dir, found)
    return summary_code([outcome.code for outcome in outcomes.values()])


def conclude(sweep_dir: Path, search: dict[str, object] | None = None) -> None:
    """Compare what is in a sweep's folder: the terminal, sweep.json, and sweep.md.

    The table comes first: neither a full disk nor a folder that only others write to hides it.
    """
    comparison = summary.compare(sweep_dir)
    summary.show(comparison, Console(width=None if sys.stdout.isatty() else 160))
    summary.conclude(sweep_dir, search)
    print(f"rcpo: {len(comparison.runs)} complete runs; draw them: rcpo report {sweep_dir}")


def parsed(hydra: Hydra, name: str, cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Override]:
    """The overrides by key, a named sweep's own (`hydra.sweeper.params`) first; the last of a key counts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    with refusals_explained(hydra, name, overrides):
        found = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(lines)
    return {override.get_key_element(): override for override in found}


def combinations(
    hydra: Hydra, name: str, cfg: DictConfig, overrides: Sequence[str]
) -> Iterator[tuple[Path, DictConfig]]:
    """The grid of a sweep, run by run: its folder and its configuration. `cfg` is what the runs share."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    found = parsed(hydra, name, cfg, [*overrides, *_defaults(overrides, [])])
    named = _naming(cfg, _sweeps(found, "grid"))
    (grid,) = BasicSweeper.split_arguments(list(found.values()), None)
    folders = [Path(cfg.hydra.sweep.dir) / run_name(_values(chosen, named)) for chosen in grid]
    refuse_shared_folders((folder, " ".join(chosen)) for folder, chosen in zip(folders, grid, strict=True))
    for folder, chosen in zip(folders, grid, strict=True):
        yield folder, compose_with(hydra, name, chosen)


def _values(chosen: Sequence[str], named: Sequence[str]) -> dict[str, str]:
    lines = (line.partition("=") for line in chosen)
    return {key: value for key, _, value in lines if key in named}


def _sweeps(found: dict[str, Override], search: str) -> list[str]:
    """The keys that vary; raises ConfigError where a grid is given a space."""
    sweeps = {key: override for key, override in found.items() if override.is_sweep_override()}
    spaces = [str(o.input_line) for o in sweeps.values() if not o.is_discrete_sweep()]
    if spaces and search == "grid":
        raise ConfigError(f"{spaces[0]} is a space, not values: add sweep.search=optuna, or give values")
    return list(sweeps)


def _naming(cfg: DictConfig, varied: Sequence[str]) -> list[str]:
    """The keys that a run is named by: those that vary, and a study's own where the call gives one value.

    So the calls that fill a study's folder name a run alike.
    """
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    return list(dict.fromkeys([*map(str, params), *varied]))


def _defaults(overrides: Sequence[str], varied: Sequence[str]) -> list[str]:
    """What makes a sweep one that can be called again: runs named by what varies, which continue."""
    given = {override.partition("=")[0] for override in overrides}
    defaults = {
        "resume": "auto",
        "hydra.sweep.subdir": "${rcpo_run_name:" + ",".join(varied) + "}",
    }
    return [f"{key}={value}" for key, value in defaults.items() if key not in given]
