"""Hydra's flags that show something and start nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from rcpo.commands.listing import explain
from rcpo.config.composition import REFUSED, compose_with
from rcpo.config.refusals import refusals_explained
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra


def shows(flags: argparse.Namespace) -> bool:
    """Whether a flag asks for information, not a run; raises ConfigError for flags that contradict."""
    if flags.experimental_rerun is not None:
        raise ConfigError(
            "command line: --experimental-rerun is not supported; a run's config.yaml repeats it"
        )
    if flags.shell_completion:
        raise ConfigError("command line: tab completion is installed by `rcpo --install-completion`")
    shown = (flags.cfg is not None, flags.info is not None, flags.hydra_help, flags.help_on is not None)
    if sum((*shown, flags.multirun)) > 1:
        raise ConfigError("command line: give one of -m, --cfg, --info, --hydra-help, and help=")
    if flags.resolve and flags.cfg is None:
        raise ConfigError("command line: --resolve goes with --cfg job, --cfg hydra or --cfg all")
    return any(shown)


def show(hydra: Hydra, name: str, flags: argparse.Namespace, overrides: list[str]) -> int:
    """Print what the flags ask for; raise ConfigError for overrides that Hydra refuses."""
    cfg = compose_with(hydra, name, overrides)  # a refusal is explained here, before Hydra prints its own
    if flags.help_on is not None:
        tree = OmegaConf.to_container(cfg)
        assert isinstance(tree, dict)
        own = Path(flags.config_dir) if flags.config_dir else None
        print("\n".join(explain(flags.help_on, {str(node): values for node, values in tree.items()}, own)))
        return DONE
    with refusals_explained(hydra, name, overrides):
        if flags.cfg is not None:
            hydra.show_cfg(name, overrides, flags.cfg, flags.package, flags.resolve)
        elif flags.info is not None:
            hydra.show_info(flags.info, name, overrides)
        else:
            parser = flags.parser  # its help must not advise flags that rcpo refuses
            parser._actions = [each for each in parser._actions if not REFUSED & {*each.option_strings}]
            hydra.hydra_help(name, args_parser=parser, args=flags)
    return DONE


def wants_multirun(hydra: Hydra, name: str, overrides: Sequence[str]) -> bool:
    """Whether `hydra.mode` asks for several runs."""
    from hydra.types import RunMode

    return bool(hydra.get_mode(name, list(overrides)) == RunMode.MULTIRUN)
