"""Every key of every command, by node: type, default, allowed values, and meaning, as `key` declares them."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

from rcpo.config.fields import Key, key_of, keys_of
from rcpo.config.hyperparameters import HYPERPARAMETERS
from rcpo.config.schema import RunConfig

# the nodes that a run does not have, by the module that reads them: only the one asked for is imported
COMMAND_SETTINGS = {
    "sweep": "rcpo.sweeps.settings:SweepConfig",
    "plan": "rcpo.planner.settings:PlanConfig",
    "gpu": "rcpo.planner.settings:GpuConfig",
    "push": "rcpo.models.upload:PushConfig",
    "slurm": "rcpo.slurm.settings:SlurmConfig",
    "sample": "rcpo.config.onpolicy:SampleConfig",
    "score": "rcpo.config.onpolicy:ScoreConfig",
    "pairing": "rcpo.config.onpolicy:PairingConfig",
    "iterate": "rcpo.config.onpolicy:IterateConfig",
}
RUN_NODES = {
    field.name: field.default_factory
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(field.default_factory)
}
_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """A key as people read of it; `default` is its value in Python, `key` what it was declared with."""

    name: str
    type: str
    default: Any
    key: Key


def nodes() -> list[str]:
    """The nodes of all commands, those of a run first."""
    return [*RUN_NODES, *COMMAND_SETTINGS]


def settings_of(node: str) -> type:
    """The dataclass of a node."""
    if node in RUN_NODES:
        return typing.cast(type, RUN_NODES[node])
    module, _, name = COMMAND_SETTINGS[node].partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def summary(node: str) -> str:
    """One line on a node: the first of its dataclass's documentation."""
    return (settings_of(node).__doc__ or "").partition("\n")[0]


def entries(node: str) -> list[Entry]:
    """The keys of a node in their order, an objective's hyper-parameters excepted."""
    return list(_entries(settings_of(node), f"{node}."))


def top_entries() -> list[Entry]:
    """The keys that belong to no node."""
    return [entry for entry in _entries(RunConfig, "") if "." not in entry.name]


def hyperparameters(values: dict[str, Any]) -> list[Entry]:
    """An objective's own keys with their values; rcpo knows nothing of those that only a user's has."""
    return [
        Entry(f"objective.{name}", _type_of(type(value)), value, HYPERPARAMETERS.get(name, Key(doc="")))
        for name, value in values.items()
    ]


def _entries(config: type, prefix: str) -> Iterator[Entry]:
    kinds = _kinds(config, prefix)
    for name, field in keys_of(config, prefix):
        found = key_of(field)
        if found is not None:
            yield Entry(name, kinds[name], _default(field), found)


def _kinds(config: type, prefix: str) -> dict[str, str]:
    hints = typing.get_type_hints(config)
    kinds: dict[str, str] = {}
    for field in dataclasses.fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            kinds |= _kinds(typing.cast(type, hint), f"{name}.")
        else:
            kinds[name] = _type_of(hint)
    return kinds


def _type_of(hint: Any) -> str:
    """A type in words: "integer", "list of text", "number or null"."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        kinds = [_type_of(option) for option in typing.get_args(hint) if option is not NoneType]
        return f"{' or '.join(kinds)} or null"
    if hint is list or typing.get_origin(hint) is list:
        inner = _TYPES.get(typing.get_args(hint)[0]) if typing.get_args(hint) else None
        return f"list of {inner}s".replace("texts", "text") if inner else "list of mappings"
    if hint is dict or typing.get_origin(hint) is dict:
        return "mapping"
    return _TYPES.get(hint, "any")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def as_yaml(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {as_yaml(item)}' for name, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """`conf/keys.md`: all keys in one table for each node."""
    parts = [
        "# All keys: type, default, allowed values, meaning",
        "```bash\nrcpo train objective=simpo help=objective\nrcpo list keys\n```",
        "`rcpo list keys --markdown` prints this page from the declarations in the code; a test compares.\n"
        "`rcpo train help=NODE` shows the keys of a node with the values that your command line gives them.",
        "## Keys outside the nodes\n\n" + _table(top_entries()),
    ]
    for node in nodes():
        parts.append(f"## {node}\n\n{summary(node)}\n\n{_table(entries(node))}")
        if node == "objective":
            parts.append(
                "Hyper-parameters, each of some objectives; their defaults are in `conf/objective/`:\n\n"
                + _table(
                    [Entry(f"objective.{n}", "", None, key) for n, key in HYPERPARAMETERS.items()], own=True
                )
            )
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Entry], own: bool = False) -> str:
    head = ["key", "values", "meaning"] if own else ["key", "type", "default", "values", "meaning"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        allowed = row.key.allowed.replace("|", "\\|")
        middle = [allowed] if own else [row.type, f"`{as_yaml(row.default)}`", allowed]
        lines.append(f"| {' | '.join([f'`{row.name}`', *middle, row.key.doc.replace('|', chr(92) + '|')])} |")
    return "\n".join(lines)
