"""What has to be right about a `DataConfig` before anything is read."""

from __future__ import annotations

import difflib
import os
import re
from datetime import date
from pathlib import Path

from rcpo.config.data import DataConfig
from rcpo.config.paths import is_file, mode_of
from rcpo.config.schema import ConfigError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_data(data: DataConfig) -> None:
    """Raises ConfigError for limits that contradict, and for a source that is not there."""
    if None not in (data.max_prompt_length, data.max_length) and data.max_prompt_length >= data.max_length:  # type: ignore[operator]
        raise ConfigError(
            f"data.max_prompt_length={data.max_prompt_length} leaves no token for a response "
            f"within data.max_length={data.max_length}"
        )
    lowest, highest = data.min_margin, data.max_margin
    if lowest is not None and highest is not None and lowest > highest:
        raise ConfigError(f"data.min_margin={lowest:g} is above data.max_margin={highest:g}: no pair is left")
    _check_date(data.date)
    if data.name == "sums":
        _refuse_margins(data)
        _refuse_files(data)
        return
    if data.path is None and not data.sources:
        raise ConfigError(
            f"data={data.name} needs preference data: data.path= a file (JSONL, JSON, CSV, Parquet, Arrow), "
            "a folder, or a set on the hub"
        )
    _check_path("data.path", data.path)
    _check_path("data.eval_path", data.eval_path)
    for number, source in enumerate(data.sources):
        node = f"data.sources[{number}]"
        if source.path is None and data.path is None:
            raise ConfigError(f"{node} has no path, and data.path is not given either")
        if not 0 < source.weight < 1e6:
            raise ConfigError(
                f"{node}.weight={source.weight:g} is out of range: it is how often an epoch sees the "
                "source's pairs, so 0.5 is every other one and 2 is each of them twice"
            )
        _check_path(f"{node}.path", source.path)
    if data.cache is not None and is_file("data.cache", data.cache):
        raise ConfigError(f"data.cache={data.cache} is a file; give a folder, null (the user's own) or off")


def _refuse_margins(data: DataConfig) -> None:
    for key, value in (("min_margin", data.min_margin), ("max_margin", data.max_margin)):
        if value is not None:
            raise ConfigError(f"data.{key}={value:g}: data=sums has no scores; leave it out")
    if data.ties == "drop":
        raise ConfigError("data.ties=drop: data=sums has no scores; leave it out")


def _check_date(value: str | None) -> None:
    try:
        date.fromisoformat(value or "2026-01-31")
    except ValueError as error:
        raise ConfigError(f"data.date={value} is not a date: write it as 2026-01-31") from error


def _refuse_files(data: DataConfig) -> None:
    """The embedded data come from no file: what names one was meant for data=pairs."""
    for key in ("path", "sources", "columns", "eval_path", "template"):
        if value := getattr(data, key):
            raise ConfigError(
                f"data.{key}={value}: data=sums is the embedded task; add data=pairs to read files"
            )


def _check_path(key: str, value: str | None) -> None:
    """A file, a folder, or what can be a set on the hub."""
    if value is None or mode_of(key, value) is not None:
        return
    if _ON_HUB.fullmatch(value) and not value.lower().endswith(SUFFIXES):
        return
    raise ConfigError(
        f"{key}={value} is no file or folder, nor the name of a set on the hub (OWNER/NAME)"
        f"{_neighbour(Path(value))}"
    )


def _neighbour(path: Path) -> str:
    """A hint with the file of the same folder whose name is most alike."""
    if not path.parent.is_dir():
        return f"; nor does its folder {path.parent} exist"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"; its folder {path.parent} may not be read"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
