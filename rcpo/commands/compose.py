"""The prologue that all commands with Hydra overrides share, and Hydra's flags that only show something."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from rcpo.commands.listing import explain
from rcpo.config.composition import (
    PRIMARY,
    REFUSED,
    compose_with,
    hydra_session,
    over_run,
    split_arguments,
    user_part,
)
from rcpo.config.nodes import node_of, refuse_command_keys
from rcpo.config.parsing import parse, read_tree, structure, to_container
from rcpo.config.paths import local
from rcpo.config.refusals import SEVERAL, refusals_explained
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.runs.folder import CONFIG_FILE

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

_ONE = "give one"  # the remedy for several values where a command, or --cfg, takes one


@dataclass(frozen=True)
class Call:
    """A command line that Hydra composes; `own` holds the values of the words that are not Hydra's."""

    hydra: Hydra
    name: str  # of the primary configuration
    flags: argparse.Namespace
    overrides: list[str]
    own: dict[str, str]
    several: str  # the remedy for a key that was given several values
    shown: bool  # the flags asked for information, which is printed: nothing is left to do

    def compose(self, overrides: Sequence[str] | None = None) -> DictConfig:
        """Compose the configuration, with its `hydra` node; raise ConfigError for what Hydra refuses."""
        overrides = self.overrides if overrides is None else overrides
        return compose_with(self.hydra, self.name, overrides, several=self.several)

    def folder(self, key: str) -> Path:
        """The folder that an own word names; raises ConfigError for what can be none."""
        return local(key, self.own[key])

    def config(self) -> RunConfig:
        """Compose and validate the configuration of a run; raise ConfigError."""
        return parse(user_part(self.compose()))

    def config_of(
        self, run_dir: Path, overrides: Sequence[str] | None = None, *, files: bool = True
    ) -> RunConfig:
        """The configuration of the run in a folder, with overrides applied; raises ConfigError."""
        base = to_container(structure(read_tree(run_dir / CONFIG_FILE)))
        base["resume"] = None  # where the run was continued from: another folder by now, where it was moved
        overrides = self.overrides if overrides is None else overrides
        if given := [word for word in overrides if node_of(word) == "hydra"]:
            raise ConfigError(f"{given[0]}: the run in {run_dir} keeps its folder; leave it out")
        return parse(over_run(self.hydra, base, overrides, self.several), files=files)


@contextmanager
def command(
    arguments: Sequence[str],
    *,
    nodes: Sequence[str] = (),
    own: Sequence[str] = (),
    alone: str | None = None,
    folder: str | None = None,
    primary: str = PRIMARY,
) -> Iterator[Call]:
    """Split a command line, open Hydra, and print what its flags ask for.

    `nodes` are the nodes beyond a run's that the command reads, `own` its KEY=VALUE words that are not
    Hydra's, `alone` is the message that refuses -m, `folder` ends the name of the folder that it makes
    where none is given. Raises ConfigError for what is refused.
    """
    flags = split_arguments(arguments)
    words = [word.partition("=") for word in flags.overrides]
    own_values = {key: value for key, sign, value in words if sign and key in own}
    overrides = [word for word in flags.overrides if word.partition("=")[0] not in own_values]
    if alone is not None and flags.multirun:
        raise ConfigError(f"command line: {alone}")
    if folder is not None and not any(word.startswith("hydra.run.dir=") for word in overrides):
        overrides.append(f"hydra.run.dir='outputs/${{now:%Y-%m-%d_%H-%M-%S-%f}}_{folder}'")
    refuse_command_keys(overrides, nodes)
    name = flags.config_name or primary
    with hydra_session(flags.config_dir, flags.config_path) as hydra:
        shown = _asks_for_information(flags)
        if shown:
            _show(hydra, name, flags, overrides)
        yield Call(hydra, name, flags, overrides, own_values, SEVERAL if alone is None else _ONE, shown)


def _asks_for_information(flags: argparse.Namespace) -> bool:
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


def _show(hydra: Hydra, name: str, flags: argparse.Namespace, overrides: list[str]) -> None:
    """Print what the flags ask for; raise ConfigError for overrides that Hydra refuses."""
    # a refusal is explained here, before Hydra prints its own
    cfg = compose_with(hydra, name, overrides, several=_ONE)
    if flags.help_on is not None:
        tree = OmegaConf.to_container(cfg)
        assert isinstance(tree, dict)
        own = Path(flags.config_dir) if flags.config_dir else None
        print("\n".join(explain(flags.help_on, {str(node): values for node, values in tree.items()}, own)))
        return
    with refusals_explained(hydra, name, overrides, _ONE):
        if flags.cfg is not None:
            hydra.show_cfg(name, overrides, flags.cfg, flags.package, flags.resolve)
        elif flags.info is not None:
            hydra.show_info(flags.info, name, overrides)
        else:
            parser = flags.parser  # its help must not advise flags that rcpo refuses
            parser._actions = [each for each in parser._actions if not REFUSED & {*each.option_strings}]
            hydra.hydra_help(name, args_parser=parser, args=flags)
