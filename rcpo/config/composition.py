"""Hydra, driven from here: which folders it searches, how a command line is cut up.

Hydra's own entry point is not used: it exits with 1, and its parser refuses overrides that follow a flag.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rcpo.config.foreign_names import counterpart
from rcpo.config.hyperparameters import HYPERPARAMETERS
from rcpo.config.nodes import COMMAND_NODES
from rcpo.config.parsing import describe, known_keys
from rcpo.config.paths import conf_dir
from rcpo.config.refusals import SEVERAL, refusals_explained, refuse_odd_overrides
from rcpo.config.validation import nearest
from rcpo.errors import ConfigError
from rcpo.system.text import os_message

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

PRIMARY = "config"
FOREIGN = "--from-trl"
REFUSED = {"--shell-completion", "--experimental-rerun"}  # flags of Hydra's that rcpo does not take
HELP = "help"  # help=GROUP and help=KEY show keys instead of starting anything
_MAPPINGS = ("data.columns", "data.template_options", "slurm.env")  # nodes whose keys are the user's
# what an option has to give: without it another one's default would be taken
_TELLING = {
    **dict.fromkeys(("objective", "model", "data", "optim", "adapter"), "name"),
    "rc": "enabled",
    "engine": "stage",
}
# Hydra settings that not every kind of run follows: values that ask for nothing, and the remedy
_UNUSED_SETTINGS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "hydra.job.chdir": (
        (None, False),
        "a run stays in the folder where rcpo was started; hydra.run.dir=DIR chooses where its files go",
    ),
    "hydra.output_subdir": (
        (None, ".hydra"),  # Hydra's own default, for a configuration that does not set it
        "the run's folder has the resolved config.yaml, which repeats the run; set it to null",
    ),
    "hydra.job.env_set": (
        (None, {}),
        "set environment variables in the shell, or in slurm.env for a job",
    ),
    "hydra.callbacks": (
        (None, {}),
        "a run calls none of Hydra's; start rcpo from a program that does what they would",
    ),
    "hydra.verbose": (
        (None, False),
        "rcpo.log in the run's folder has all messages",
    ),
    "hydra.job_logging": (
        None,  # conf/config.yaml has values
        "rcpo.log in the run's folder has all messages, and warnings are printed",
    ),
}
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def _pick(name: str, values: DictConfig, default: Any) -> Any:
    """The value of a name, or the default: `${rcpo_pick:${objective.name},{cpo:0.1},2.0}`."""
    return values.get(name, default)


OmegaConf.register_new_resolver("rcpo_pick", _pick, replace=True)


def split_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, which may stand in any order; raises ConfigError for an unknown flag.

    The namespace has what Hydra's parser gives it, `overrides` among it; `help_on` is the topic of `help=`.
    """
    from hydra._internal.utils import get_args_parser

    arguments = _with_foreign(arguments)
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"(?<!\S)-[-\w.]+", message)
        flags = [*(option for action in parser._actions for option in action.option_strings), FOREIGN]
        flags = [option for option in flags if len(option) > 3 and option not in REFUSED]
        hint = f"; {nearest(flag[0], flags)}" if flag and "unrecognized" in message else ""
        if flag and flag[0].startswith("--") and (meant := _meant_key(flag[0].removeprefix("--"))):
            hint = f"; {meant}"
        raise ConfigError(f"command line: {message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    # --info takes an optional value: without one it would swallow the override that follows
    followers = [*arguments[1:], ""]
    safe = [
        "--info=all" if word in ("--info", "-i") and follower not in _INFO else word
        for word, follower in zip(arguments, followers, strict=False)
    ]
    flags = parser.parse_intermixed_args(safe)
    asked = [word for word in flags.overrides if word == HELP or word.startswith(f"{HELP}=")]
    flags.help_on = asked[0].removeprefix(HELP).lstrip("=") if asked else None
    flags.overrides = [word for word in flags.overrides if word not in asked]
    flags.overrides = [_into_mapping(_plain_switch(override)) for override in flags.overrides]
    if flags.config_name == "":
        raise ConfigError("--config-name is empty; give the name of a configuration, or leave it out")
    for override in flags.overrides:
        if override.startswith("="):
            raise ConfigError(f"{override!r}: no key before the sign; overrides are KEY=VALUE")
    _refuse_repeats(flags.overrides)
    flags.parser = parser
    return flags


def _meant_key(flag: str) -> str | None:
    """A hint for a key of rcpo's or of TRL's that was given as a flag; None for any other flag."""
    name = flag.replace("-", "_")
    if name in known_keys():
        return f"a key has no dashes: {name}=VALUE"
    if theirs := counterpart(name):
        return f"{theirs} (KEY=VALUE, without dashes)"
    keys = {*known_keys(), *(f"objective.{setting}" for setting in HYPERPARAMETERS)}
    found = sorted(key for key in keys if key.rpartition(".")[2] == name)
    return f"a key has no dashes: {found[0]}=VALUE" if len(found) == 1 else None


def _with_foreign(arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings of `--from-trl FILE`, printed with what is left of the file."""
    words = list(arguments)
    places = [place for place, word in enumerate(words) if word.partition("=")[0] == FOREIGN]
    if not places:
        return words
    from rcpo.config.foreign import as_overrides, convert, read_foreign

    _, sign, file = words.pop(places[0]).partition("=")
    if not sign:
        if places[0] == len(words):
            raise ConfigError(f"{FOREIGN} needs a YAML file")
        file = words.pop(places[0])
    made = convert(read_foreign(Path(file)))
    settings = as_overrides(made, words)
    print(f"rcpo: {file} is here: {' '.join(settings) or 'nothing'}", file=sys.stderr)
    for key, note in made.notes.items():
        if given := [setting for setting in settings if setting.partition("=")[0] == key]:
            print(f"rcpo: {file}: {given[0]} {note}", file=sys.stderr)
    for key, reason in made.left.items():
        print(f"rcpo: {file}: {key} is not converted{f' ({reason})' if reason else ''}", file=sys.stderr)
    return [*settings, *words]


def _plain_switch(override: str) -> str:
    """`rc=true` as `rc=on`: Hydra takes an unquoted true for a value, never for the name of an option."""
    key, sign, value = override.partition("=")
    if key != "rc":
        return override
    value = re.sub(r"\btrue\b", "on", value, flags=re.IGNORECASE)
    return f"{key}{sign}" + re.sub(r"\bfalse\b", "off", value, flags=re.IGNORECASE)


def _into_mapping(override: str) -> str:
    """`data.columns.prompt=question` with the plus signs that Hydra wants for a key of the user's own."""
    nodes = "|".join(map(re.escape, _MAPPINGS))
    return f"++{override}" if re.match(rf"({nodes})(\.[^=]+=|=\{{)", override) else override


def _refuse_repeats(overrides: Sequence[str]) -> None:
    """Hydra silently takes the last of two values; the other is more likely forgotten than meant."""
    first: dict[str, str] = {}
    for override in overrides:
        key, sign, _ = override.partition("=")
        if sign and first.setdefault(key.lstrip("+"), override) is not override:
            raise ConfigError(f"{key} is given twice: {first[key.lstrip('+')]} and {override}; leave one out")


@contextmanager
def hydra_session(config_dir: str | None = None, config_path: str | None = None) -> Iterator[Hydra]:
    """A Hydra that searches `conf/` (or `config_path` in its place), then the user's own `config_dir`.

    There can be one at a time in a process. Raises ConfigError for a folder that does not exist.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    for flag, given in (("--config-dir", config_dir), ("--config-path", config_path)):
        if given is not None:
            _check_folder(flag, Path(given))
    if config_dir is not None and config_path is None:
        _refuse_shadowed(Path(config_dir))
    search_path = create_config_search_path(str(Path(config_path).resolve() if config_path else conf_dir()))
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        # after conf/, as Hydra has it: it adds options and cannot take the primary configuration's place
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name="rcpo", config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def _check_folder(flag: str, folder: Path) -> None:
    """Raise ConfigError for a folder of options that Hydra would pass over without a word."""
    try:
        if not folder.is_dir():
            raise ConfigError(f"{flag} {folder} is not a folder")
        groups = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        for group in groups:
            os.listdir(group)
        for file in [path for place in (folder, *map(Path, groups)) for path in place.glob("*.yaml")]:
            file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be read: {os_message(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _refuse_shadowed(folder: Path) -> None:
    """Raise ConfigError for a user's option with the name of a shipped one, which would be taken instead."""
    for file in (file for pattern in ("*.yaml", "*/*.yaml", "*/*/*.yaml") for file in folder.glob(pattern)):
        shipped = conf_dir() / file.relative_to(folder)
        if shipped.is_file() and file.is_file() and file.read_bytes() != shipped.read_bytes():
            raise ConfigError(
                f"{file}: rcpo has a {shipped.relative_to(conf_dir())} of its own, and --config-dir can only "
                "add to those; give the file another name, or the whole configuration with --config-path"
            )


def compose(
    overrides: Sequence[str], config_dir: str | None = None, config_name: str = PRIMARY
) -> DictConfig:
    """The composed configuration without its `hydra` node; raises ConfigError for what Hydra refuses."""
    with hydra_session(config_dir) as hydra:
        return user_part(compose_with(hydra, config_name, overrides))


def compose_with(
    hydra: Hydra,
    config_name: str,
    overrides: Sequence[str],
    *,
    multirun: bool = False,
    several: str = SEVERAL,
) -> DictConfig:
    """The composed configuration with its `hydra` node; raises ConfigError for what Hydra refuses.

    `several` is the remedy for a key that was given several values.
    """
    from hydra.types import RunMode

    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    with refusals_explained(hydra, config_name, overrides, several):
        refuse_odd_overrides(hydra, overrides, several)
        cfg = hydra.compose_config(config_name, list(overrides), run_mode=mode)
    if all(key == "hydra" for key in cfg):
        raise ConfigError(f"--config-name {config_name}: it holds no key of rcpo's")
    _refuse_nameless(cfg)
    _refuse_unused_settings(cfg)
    return cfg


def _refuse_unused_settings(cfg: DictConfig) -> None:
    """Raise ConfigError for settings of Hydra's that some runs would not follow."""
    # unresolved: ${rcpo_run_name:…} is known in a job alone
    texts = cast("list[str]", OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False))
    given = [text.partition("=")[0].lstrip("+").replace("/", ".") for text in texts]
    for key, (harmless, remedy) in _UNUSED_SETTINGS.items():
        value = OmegaConf.select(cfg, key)
        asked = any(f"{each}.".startswith(f"{key}.") for each in given)
        if (asked and value) or (harmless is not None and value not in harmless):
            shown = "" if harmless is None else f"={str(value).lower() if isinstance(value, bool) else value}"
            raise ConfigError(f"{key}{shown} is not supported: {remedy}")


def _refuse_nameless(cfg: DictConfig) -> None:
    """Raise ConfigError for an option that leaves out what it is: a default would be taken for it."""
    for group, key in _TELLING.items():
        option = OmegaConf.select(cfg, f"hydra.runtime.choices.{group}")
        node = cfg._get_node(group, validate_access=False)
        if option is None or (node is not None and not isinstance(node, DictConfig)):
            continue
        if node is None or key not in node:
            raise ConfigError(
                f"{group}={option}: the option's file gives no {group}.{key}; add a line: {key}: …"
            )


def user_part(cfg: DictConfig) -> DictConfig:
    """A copy that holds a run's keys alone: without `hydra` and the nodes of commands around a run.

    Values are resolved while those are there, for a study's settings may point into them. Raises ConfigError
    for what cannot be resolved.
    """
    kept = [str(key) for key in cfg if key != "hydra"]
    try:
        tree = OmegaConf.to_container(OmegaConf.masked_copy(cfg, kept), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    assert isinstance(tree, dict)
    return OmegaConf.create({key: value for key, value in tree.items() if key not in COMMAND_NODES})


def over_run(
    hydra: Hydra, tree: dict[str, Any], overrides: Sequence[str], several: str = SEVERAL
) -> DictConfig:
    """A finished run's configuration `tree` with overrides applied: a chosen group replaces the run's node.

    Raises ConfigError for what Hydra refuses; `several` is as in `compose_with`.
    """
    from hydra.core.config_store import ConfigStore

    base, changes = dict(tree), []
    for override in overrides:
        key = override.partition("=")[0]
        if "/" not in key and "." not in key and hydra.config_loader.get_group_options(key):
            base.pop(key, None)
            override = f"+{override}"
        changes.append(override)
    ConfigStore.instance().store(name="finished_run", node=base)
    return user_part(compose_with(hydra, "finished_run", changes, several=several))


def resolved_dir(cfg: DictConfig, suffix: str | None) -> Path:
    """The folder that `hydra.run.dir` stands for."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(cfg)
    folder = str(cfg.hydra.run.dir)
    return Path(folder if suffix is None else f"{folder}_{suffix}")
