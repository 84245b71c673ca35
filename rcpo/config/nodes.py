"""Configuration nodes that belong to one command, such as `sweep` and `plan`: read and validated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rcpo.config.fields import check_keys
from rcpo.config.parsing import describe
from rcpo.config.shapes import refuse_shapes
from rcpo.config.validation import unknown_key
from rcpo.errors import ConfigError

Node = TypeVar("Node")


# the nodes and groups that a run does not know, and the commands that read them
COMMAND_NODES = {
    "sweep": "rcpo sweep and rcpo train -m",
    "study": "rcpo sweep",
    "plan": "rcpo plan",
    "gpu": "rcpo plan",
    "slurm": "rcpo submit",
    "push": "rcpo push",
    "sample": "rcpo sample and rcpo iterate",
    "score": "rcpo sample and rcpo iterate",
    "pairing": "rcpo sample and rcpo iterate",
    "iterate": "rcpo iterate",
    "rounds": "rcpo iterate",
}


def read_node(cfg: DictConfig, name: str, default: Node) -> Node:
    """A node's dataclass, its keys checked; raises ConfigError.

    A primary configuration of the user's own may lack the node.
    """
    given: Any = OmegaConf.select(cfg, name, default=OmegaConf.create({}))
    if not isinstance(given, DictConfig):
        shown = "null" if given is None else str(given)
        raise ConfigError(f"{name}={shown}: {name} holds keys, not a value; set them as {name}.KEY=VALUE")
    known = {f"{name}.{field.name}" for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    for key in map(str, given):
        if f"{name}.{key}" not in known:
            raise ConfigError(unknown_key(f"{name}.{key}", known))
    try:
        tree = OmegaConf.to_container(given, resolve=True)
        assert isinstance(tree, dict)
        refuse_shapes(tree, type(default), f"{name}.")
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}.{describe(error)}") from error
    assert isinstance(config, type(default))
    check_keys(config, f"{name}.")
    return config


def node_of(override: str) -> str:
    """The node, or top-level key, that an override changes: `slurm` of `+slurm.env.A=1`."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def refuse_command_keys(overrides: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Raise ConfigError for keys that the command at hand does not read."""
    for override in overrides:
        node = node_of(override)
        if node in COMMAND_NODES and node not in allowed:
            raise ConfigError(f"{override}: {node} is read by {COMMAND_NODES[node]} alone")
