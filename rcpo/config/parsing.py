"""From a composed configuration (OmegaConf) to a validated `RunConfig`, and back to a file."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.config.shapes import refuse_shapes
from rcpo.config.validation import unknown_key, validate
from rcpo.errors import ConfigError
from rcpo.system.files import replace_text
from rcpo.system.text import first_line

_OBJECTIVE_KEYS = {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"hyperparameters"}
# merged into, so it must not bring the default objective's hyper-parameters along
_EMPTY = RunConfig(objective=ObjectiveConfig(hyperparameters={}))


def parse(cfg: DictConfig, *, files: bool = True) -> RunConfig:
    """The validated dataclasses of a composed configuration; without `files`, those may come later.

    Raises ConfigError with the key, the value and a remedy for unknown keys, missing or unresolvable values,
    wrong types, values out of range and files that do not exist.
    """
    config = structure(cfg)
    validate(config, files=files)
    return config


def structure(cfg: DictConfig) -> RunConfig:
    """The dataclasses of a composed configuration with its keys and types checked, ranges and files not."""
    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    assert isinstance(tree, dict)
    if isinstance(tree.get("tracking", []), str):  # one tracker: tracking=tensorboard
        tree["tracking"] = [tree["tracking"]]
    _refuse_unknown(tree)
    refuse_shapes(tree, RunConfig)
    try:
        merged = OmegaConf.merge(_schema(), _fold_hyperparameters(tree))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    assert isinstance(config, RunConfig)
    return config


@functools.cache
def _schema() -> Any:
    """What configurations are merged into, which copies it: making one takes longer than all the rest."""
    return OmegaConf.structured(_EMPTY)


def to_container(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries in the layout of `conf/`, ready for YAML or JSON."""
    tree = dataclasses.asdict(config)
    tree["objective"].update(tree["objective"].pop("hyperparameters"))
    return tree


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML; `load_run_config` reads it back.

    A file that holds it already is left as it is: a command that finds nothing left to do changes nothing.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(to_container(config)))
    if not path.is_file() or path.read_bytes() != text.encode():
        replace_text(path, text)


def read_tree(path: Path) -> DictConfig:
    """An OmegaConf mapping from a YAML file; raises ConfigError where there is none."""
    try:
        tree = OmegaConf.load(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (YAMLError, OSError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {first_line(error)}") from error
    if not tree:
        raise ConfigError(f"{path} is empty, as a full disk leaves a file")
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} is not a mapping of keys to values")
    return tree


def load_run_config(path: Path) -> RunConfig:
    """The configuration in a run's `config.yaml`, or in the folder that holds one."""
    return parse(read_tree(path / "config.yaml" if path.is_dir() else path))


def describe(error: OmegaConfBaseException) -> str:
    """One line for what OmegaConf refused, with the full key in front."""
    reason = str(error).split("\n")[0].rstrip(".")
    key = getattr(error, "full_key", None) or ""
    if key.startswith("objective.hyperparameters."):
        key = key.replace("hyperparameters.", "", 1)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give one: {key}=VALUE"
    for pattern, text in _REASONS:
        if key and (match := re.search(pattern, reason)):
            found = match.groupdict()
            return f"{key}{text.format(kind=_KINDS.get(found.get('kind', ''), 'a value'), **_values(found))}"
    return f"{key}: {reason}" if key else reason


def _values(found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if name != "kind"}


# What OmegaConf's reasons mean; {value} is the text that it was given.
_REASONS = (
    (
        r"Value '(?P<value>.*)' of type '\w+' could not be converted to (?P<kind>Integer|Float)",
        "='{value}' is not {kind}",
    ),
    (r"Value '(?P<value>.*)' is not a valid (?P<kind>bool)", "='{value}' is not {kind}"),
    (r"Incompatible value 'None' for field of type '(?P<kind>\w+)'", "=null: it has to be {kind}"),
    (r"Cannot merge DictConfig with ListConfig", ": it has to be a list, in brackets"),
    (r"Cannot merge ListConfig with DictConfig", ": it has to be a mapping, in braces"),
    (r"field '.*' is not Optional", "=null: it has to have a value"),
    (r"Cannot convert '\w+' to string: '(?P<value>.*)'", "={value} is not a text"),
)
_KINDS = {
    "Integer": "a whole number",
    "int": "a whole number",
    "Float": "a number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
}


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every key of the configuration with dots, nodes and leaves, hyper-parameters excepted."""
    return tuple(key for key in _keys(RunConfig) if key != "objective.hyperparameters")


def _keys(node: type, prefix: str = "") -> list[str]:
    """The fields of a dataclass and of those in it, with dots."""
    keys = []
    for field in dataclasses.fields(node):
        keys.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(field.default_factory):
            keys += _keys(field.default_factory, f"{prefix}{field.name}.")
    return keys


def _refuse_unknown(tree: dict[Any, Any]) -> None:
    known = set(known_keys())
    _refuse_unknown_in(tree, "", known, {key.rpartition(".")[0] for key in known})


def _refuse_unknown_in(tree: dict[Any, Any], prefix: str, known: set[str], nodes: set[str]) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in known and prefix != "objective.":
            raise ConfigError(unknown_key(key, known))
        if key not in nodes:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value}: {key} holds keys, not a value; set them as {key}.KEY=VALUE")
        _refuse_unknown_in(value, f"{key}.", known, nodes)


def _fold_hyperparameters(tree: dict[Any, Any]) -> dict[Any, Any]:
    """The same tree with the objective's own keys gathered under `hyperparameters`."""
    objective = tree.get("objective", {})
    if "hyperparameters" in objective:
        raise ConfigError("objective.hyperparameters is not a key; write them directly: objective.beta=0.1")
    own = {key: value for key, value in objective.items() if key not in _OBJECTIVE_KEYS}
    shared = {key: value for key, value in objective.items() if key in _OBJECTIVE_KEYS}
    return {**tree, "objective": {**shared, "hyperparameters": own}}
