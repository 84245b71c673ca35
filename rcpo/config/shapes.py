"""Lists, mappings and texts where keys want them: what OmegaConf refuses without the value or the place."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from rcpo.config.validation import unknown_key
from rcpo.errors import ConfigError

MAY_BE_EMPTY = ("data.system_prompt",)  # texts of which the empty one means something


def refuse_shapes(tree: Mapping[Any, Any], schema: type, prefix: str = "") -> None:
    """Raise ConfigError for the first value of `tree` that is not a list, mapping or text where one is due.

    `schema` is the dataclass that the tree will become; keys that it lacks are not looked at.
    """
    hints = _hints(schema)
    for name, value in tree.items():
        if name in hints:
            _check(f"{prefix}{name}", value, hints[name])


_hints = functools.cache(typing.get_type_hints)  # it compiles each annotation anew


def _check(key: str, value: Any, hint: Any) -> None:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    optional = len(options) < len(typing.get_args(hint))
    if optional and value is None:
        return
    kind = options[0] if optional else hint
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            refuse_shapes(value, typing.cast(type, kind), f"{key}.")
    elif origin is list:
        _check_list(key, value, typing.get_args(kind)[0])
    elif origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={_shown(value)} is not a mapping; set its keys: {key}.NAME=VALUE")
    elif isinstance(value, list | dict) and kind in (str, int, float, bool):
        raise ConfigError(f"{key}={_shown(value)} holds several values, where one is due")
    elif value == "" and kind is str and key not in MAY_BE_EMPTY:
        raise ConfigError(f"{key}= is empty; give a value{', or null for none' if optional else ''}")


def _check_list(key: str, value: Any, kind: Any) -> None:
    if value is None:
        raise ConfigError(f"{key}=null is not a list; the empty one is {key}=[]")
    if not isinstance(value, list):
        example = f"[{_shown(value)}]" if not dataclasses.is_dataclass(kind) else "[{path: …}]"
        raise ConfigError(f"{key}={_shown(value)} is not a list; write {key}={example}")
    for number, item in enumerate(value):
        place = f"{key}[{number}]"
        if not dataclasses.is_dataclass(kind):
            _check(place, item, kind)
            continue
        names = [field.name for field in dataclasses.fields(kind)]
        if not isinstance(item, dict):
            raise ConfigError(
                f"{place}={_shown(item)} is not a mapping; write {{{names[0]}: {_shown(item)}}}"
            )
        for name in item:
            if name not in names:
                raise ConfigError(unknown_key(f"{place}.{name}", [f"{place}.{known}" for known in names]))
        refuse_shapes(item, typing.cast(type, kind), f"{place}.")
        _check_numbers(place, item, kind)


def _check_numbers(place: str, item: Mapping[Any, Any], kind: Any) -> None:
    """Numbers inside a list of mappings: OmegaConf would name the last part of their key alone."""
    for name, hint in _hints(kind).items():
        value = item.get(name, 0.0)
        if hint is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{place}.{name}={_shown(value)} is not a number")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
