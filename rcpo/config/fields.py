"""One source for each key: default, documentation, and allowed values, on the field of its dataclass.

Validation, `help=`, tab completion, and `conf/keys.md` read it. It imports the standard library alone.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rcpo.errors import ConfigError

_METADATA = "key"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key means, and which values it takes; bounds hold for each number of a list.

    `path` marks keys whose value may be a file or a folder.
    """

    doc: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError where `value` is neither None nor allowed; `name` is the key's."""
        for place, item in _items(name, value):
            if self.choices:
                check_choice(place, item, self.choices)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                self._check_number(place, item)

    def check_number(self, name: str, value: Any) -> None:
        """The same for a key that no type protects: also raise ConfigError for what is not a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            typed = (
                "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
            )
            raise ConfigError(f"{name}={typed} is not a number")
        self._check_number(name, value)

    @property
    def bounds(self) -> str:
        """The bounds in words: "at least 0 and less than 1"; empty without any."""
        low = _bound("greater than", self.above) or _bound("at least", self.at_least)
        high = _bound("less than", self.below) or _bound("at most", self.at_most)
        return " and ".join(filter(None, (low, high)))

    @property
    def allowed(self) -> str:
        """Choices or bounds in a few characters: "fp32, bf16, fp16", "> 0", "0 ≤ x < 1"."""
        if self.choices:
            return ", ".join(self.choices)
        low, high = _first(self.above, self.at_least), _first(self.below, self.at_most)
        over, under = "<≤"[self.above is None], "<≤"[self.below is None]
        if low is None:
            return "" if high is None else f"{under} {shown(high)}"
        if high is None:
            return f"{'>≥'[self.above is None]} {shown(low)}"
        return f"{shown(low)} {over} x {under} {shown(high)}"

    def _check_number(self, name: str, value: float) -> None:
        outside = (
            not math.isfinite(value)
            or (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )
        if outside:
            closed = self.below is not None or self.at_most is not None
            finite = [] if math.isfinite(value) or closed else ["finite"]
            wanted = " and ".join(filter(None, [self.bounds, *finite]))
            raise ConfigError(f"{name}={shown(value)} is out of range: it has to be {wanted}")


def key(
    default: Any,
    doc: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
) -> Any:
    """A dataclass field with a default, one line of documentation, and the values that it takes.

    None always passes: the field's type states whether it is allowed.
    """
    metadata = {
        _METADATA: Key(
            doc=doc,
            above=above,
            at_least=at_least,
            below=below,
            at_most=at_most,
            choices=choices,
            path=path,
        )
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> Key | None:
    """What a field was declared with; None for a node, and for a field without `key`."""
    found = field.metadata.get(_METADATA)
    assert found is None or isinstance(found, Key)
    return found


def check_keys(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value of a dataclass that its key does not take."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_keys(value, f"{name}.")
        elif (found := key_of(field)) is not None:
            found.check(name, value)


def keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """The leaves of a dataclass, an instance or a class, in their order: dotted name and field."""
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):
            yield from keys_of(field.default_factory, f"{name}.")
        else:
            yield name, field


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise ConfigError where a value is neither None nor one of the known ones."""
    if value is not None and value not in known:
        near = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{name}={value} is not one of {', '.join(known)}{hint}")


def check_pattern(name: str, pattern: str | None) -> None:
    """Raise ConfigError where a text, if there is one, is not a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"{name}={pattern} is not a regular expression: {error}") from error


def shown(value: float) -> str:
    """A number as people write it: whole ones with all their digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{name}[{place}]", item) for place, item in enumerate(value))
    else:
        yield name, value


def _bound(words: str, value: float | None) -> str:
    return "" if value is None else f"{words} {shown(value)}"


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
