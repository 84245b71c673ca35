"""Hydra, driven from here: where `conf/` lies, how a command line is cut up, what a refusal means.

Hydra's own entry point is not used: it exits with 1, and its parser refuses overrides that follow a flag.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from rcpo.config.commands import COMMAND_NODES
from rcpo.config.parsing import describe, known_keys
from rcpo.config.schema import ConfigError
from rcpo.config.validation import nearest, unknown_key
from rcpo.visible import os_message

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

PRIMARY = "config"
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def _pick(name: str, values: DictConfig, default: Any) -> Any:
    """The value of a name, or the default: `${rcpo_pick:${objective.name},{cpo:0.1},2.0}`."""
    return values.get(name, default)


OmegaConf.register_new_resolver("rcpo_pick", _pick, replace=True)


def conf_dir() -> Path:
    """The shipped configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def split_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, which may stand in any order; raises ConfigError for an unknown flag.

    The namespace has what Hydra's parser gives it, `overrides` among it.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"(?<!\S)-[-\w]+", message)
        flags = [option for action in parser._actions for option in action.option_strings if len(option) > 2]
        hint = f"; {nearest(flag[0], flags)}" if flag and "unrecognized" in message else ""
        raise ConfigError(f"command line: {message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    # --info takes an optional value: without one it would swallow the override that follows
    followers = [*arguments[1:], ""]
    safe = [
        "--info=all" if word in ("--info", "-i") and follower not in _INFO else word
        for word, follower in zip(arguments, followers, strict=False)
    ]
    flags = parser.parse_intermixed_args(safe)
    flags.overrides = [_plain_switch(override) for override in flags.overrides]
    for override in flags.overrides:
        if override.startswith("="):
            raise ConfigError(f"{override!r}: no key before the sign; overrides are KEY=VALUE")
    _refuse_repeats(flags.overrides)
    flags.parser = parser
    return flags


def _plain_switch(override: str) -> str:
    """`rc=true` as `rc=on`: Hydra takes an unquoted true for a value, never for the name of an option."""
    key, sign, value = override.partition("=")
    if key != "rc":
        return override
    value = re.sub(r"\btrue\b", "on", value, flags=re.IGNORECASE)
    return f"{key}{sign}" + re.sub(r"\bfalse\b", "off", value, flags=re.IGNORECASE)


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
    """Raises ConfigError for a folder of options that Hydra would pass over without a word."""
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


def compose(
    overrides: Sequence[str], config_dir: str | None = None, config_name: str = PRIMARY
) -> DictConfig:
    """The composed configuration without its `hydra` node; raises ConfigError for what Hydra refuses."""
    with hydra_session(config_dir) as hydra:
        return user_part(compose_with(hydra, config_name, overrides))


def compose_with(
    hydra: Hydra, config_name: str, overrides: Sequence[str], *, multirun: bool = False
) -> DictConfig:
    """The composed configuration with its `hydra` node; raises ConfigError for what Hydra refuses."""
    from hydra.types import RunMode

    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    with refusals_explained(hydra, config_name, overrides):
        return hydra.compose_config(config_name, list(overrides), run_mode=mode)


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


def over_run(hydra: Hydra, tree: dict[str, Any], overrides: Sequence[str]) -> DictConfig:
    """A finished run's configuration `tree` with overrides applied: a chosen group replaces the run's node.

    Raises ConfigError for what Hydra refuses.
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
    return user_part(compose_with(hydra, "finished_run", changes))


@contextmanager
def refusals_explained(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Turns Hydra's and OmegaConf's refusals into one ConfigError each, with the nearest name that exists."""
    from hydra.errors import HydraException

    try:
        yield
    except ConfigError:
        raise
    except HydraException as error:
        raise ConfigError(_explain(error, hydra, config_name, overrides)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "YAML"
        raise ConfigError(f"{place}: {error.problem}") from error
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from error


def _explain(error: Exception, hydra: Hydra, config_name: str, overrides: Sequence[str]) -> str:
    from hydra.errors import MissingConfigException, OverrideParseException

    if not str(error) and isinstance(error.__cause__, OmegaConfBaseException):
        return describe(error.__cause__)
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"^\w+Exception: ", "", lines[-2] if lines[-1].startswith("See http") else lines[-1])
        return f"cannot read {error.override!r} on the command line: {reason}; overrides are KEY=VALUE"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _explain_missing(error.missing_cfg_file, hydra, lines[0])
    if lines[0].startswith("Ambiguous value for argument"):
        override = lines[0].split("'", 1)[1].rsplit("'", 1)[0]
        key, _, value = override.partition("=")
        return f"{override} holds several values: add -m for a run each, or write {key}=[{value}] for a list"
    unknown = re.search(r"Could not (?:override|delete|append)[^']*'([^']+)'", lines[0])
    if unknown:
        return _explain_unknown(unknown[1].split("@")[0], hydra, config_name, overrides, error, lines[0])
    cause = error.__cause__
    reason = f" ({describe(cause)})" if isinstance(cause, OmegaConfBaseException) else ""
    return f"command line: {lines[0]}{reason}"


def _explain_missing(file: str, hydra: Hydra, line: str) -> str:
    group, _, option = file.removesuffix(".yaml").rpartition("/")
    options = hydra.config_loader.get_group_options(group) if group else []
    if group and options:
        return f"{group}={option}: there is no such {group}; {nearest(option, options, limit=40)}"
    return f"configuration file {file} was not found ({line})"


def _explain_unknown(
    key: str, hydra: Hydra, config_name: str, overrides: Sequence[str], error: Exception, line: str
) -> str:
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and "not in struct" not in str(cause):
        return describe(cause)
    roots = {root for root in known_keys() if "." not in root}
    known = roots.union(_composed_keys(hydra, config_name, overrides))
    if key in known:  # here; a sweep composes other choices too
        return f"{key}: not every run of this sweep has that key" if "." in key else f"{key}: {line}"
    return unknown_key(key, known)


def _composed_keys(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> list[str]:
    """All keys that exist under the user's choice of groups."""
    from hydra.errors import HydraException

    choices = [o for o in overrides if re.match(r"[\w/]+=[^,\[({]*$", o) and "." not in o.partition("=")[0]]
    choices = [o for o in choices if hydra.config_loader.get_group_options(o.partition("=")[0])]
    try:
        cfg = compose_with_plain(hydra, config_name, choices)
    except HydraException:  # the choice itself is what Hydra refuses
        return known_keys()
    return [key for root in cfg if root != "hydra" for key in _keys_of(cfg, str(root))]


def _keys_of(tree: DictConfig, name: str, prefix: str = "") -> Iterator[str]:
    """A key of a tree and those of the mapping under it, with dots."""
    yield f"{prefix}{name}"
    node = tree._get_node(name)
    if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
        for leaf in node:
            yield from _keys_of(node, str(leaf), f"{prefix}{name}.")


def compose_with_plain(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Composition without explanations, for their own use."""
    from hydra.types import RunMode

    return hydra.compose_config(config_name, list(overrides), run_mode=RunMode.RUN)
