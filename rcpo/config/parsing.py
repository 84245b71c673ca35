"""From a composed configuration (OmegaConf) to a validated `RunConfig`, and back to a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from rcpo.config.schema import ConfigError, ObjectiveConfig, RunConfig
from rcpo.config.validation import unknown_key, validate

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
    _refuse_unknown(tree)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_EMPTY), _fold_hyperparameters(tree))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    assert isinstance(config, RunConfig)
    return config


def to_container(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries in the layout of `conf/`, ready for YAML or JSON."""
    tree = dataclasses.asdict(config)
    tree["objective"].update(tree["objective"].pop("hyperparameters"))
    return tree


def save_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML; `load_run_config` reads it back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_container(config))), encoding="utf-8")


def read_tree(path: Path) -> DictConfig:
    """An OmegaConf mapping from a YAML file; raises ConfigError where there is none."""
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run") from error
    except (YAMLError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
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
    return f"{key}: {reason}" if key else reason


def known_keys() -> list[str]:
    """Every key of the configuration with dots, nodes and leaves, hyper-parameters excepted."""
    keys = []
    for field in dataclasses.fields(RunConfig):
        keys.append(field.name)
        if field.default_factory is not dataclasses.MISSING:
            node = field.default_factory()
            keys += [f"{field.name}.{leaf.name}" for leaf in dataclasses.fields(node)]
    return [key for key in keys if key != "objective.hyperparameters"]


def _refuse_unknown(tree: dict[Any, Any]) -> None:
    known = set(known_keys())
    nodes = {key.split(".")[0] for key in known if "." in key}
    for name, value in tree.items():
        if name not in known:
            raise ConfigError(unknown_key(str(name), known))
        if name in nodes and not isinstance(value, dict):
            raise ConfigError(f"{name}={value}: {name} holds keys, not a value; set them as {name}.KEY=VALUE")
        if name not in nodes or name == "objective":
            continue
        for leaf in value:
            if f"{name}.{leaf}" not in known:
                raise ConfigError(unknown_key(f"{name}.{leaf}", known))


def _fold_hyperparameters(tree: dict[Any, Any]) -> dict[Any, Any]:
    """The same tree with the objective's own keys gathered under `hyperparameters`."""
    objective = tree.get("objective", {})
    if "hyperparameters" in objective:
        raise ConfigError("objective.hyperparameters is not a key; write them directly: objective.beta=0.1")
    own = {key: value for key, value in objective.items() if key not in _OBJECTIVE_KEYS}
    shared = {key: value for key, value in objective.items() if key in _OBJECTIVE_KEYS}
    return {**tree, "objective": {**shared, "hyperparameters": own}}
