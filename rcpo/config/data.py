"""The configuration of data: what is read, how it becomes tokens, and which sources that means."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rcpo.config.paths import is_file, mode_of
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class SourceConfig:
    """One set of a mixture; what is not given is that of `data`. An epoch sees its pairs `weight` times."""

    path: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    split: str | None = None
    eval_split: str | None = None
    revision: str | None = None
    weight: float = 1.0


@dataclass(kw_only=True)
class DataConfig:
    """Preference pairs, or completions for kto and sft; lengths in tokens, None for no limit.

    `path` is a file, a folder or a set on the hub; `subset`, `data_dir`, `split` and `revision` are what
    the datasets library calls so; `sources` are several sets. Held out are `eval_path`, else `eval_split`,
    else `eval_fraction` of the prompts. `columns` maps our names to the file's: names, paths, or Jinja.
    `format` names the form of the rows (`format_module` registers a user's own), `labels` explain labels
    and judgments, `pairing` says how several scored answers become pairs, `learn` which answers of a
    conversation are learned. `train_examples` is how many pairs the embedded task makes. `template` is None
    (messages: the tokenizer's), `tokenizer`, a named one or a Jinja file. `min_margin` and `max_margin`
    bound how far the two scores of a pair may be apart, `ties` keep or drop pairs with equal scores.
    `ches_max` bounds how much alike the two responses of a training pair may be to the starting model (CHES).
    `max_dropped` is the share of rows that `on_bad=drop` may leave out. `truncation` is which side of a
    prompt stays. `cache` keeps tokens: a folder, None (the user's) or off. `workers` None is a process a
    core. `layout` says how pairs lie in rows: auto, shared (a prompt once) or separate. `group_by_length`
    None is: unless the micro-batch itself matters.

    `reasoning` says what becomes of the reasoning before an answer: keep, strip, or empty (an empty block if
    generation opens one). `date` (YYYY-MM-DD) is today to a template that writes it; None is the day on which
    the run began.
    """

    name: str = "sums"
    path: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    sources: list[SourceConfig] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    format_module: str | None = None
    labels: dict[Any, Any] = field(default_factory=dict)
    pairing: str = "best_worst"
    learn: str = "last"
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.1
    train_examples: int = 6400
    max_examples: int | None = None
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    reasoning: str = "keep"
    date: str | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation: str = "keep_end"
    on_bad: str = "refuse"
    min_margin: float | None = None
    max_margin: float | None = None
    ches_max: float | None = None
    ties: str = "keep"
    max_dropped: float = 0.05
    cache: str | None = None
    workers: int | None = None
    layout: str = "auto"
    group_by_length: bool | None = None


@dataclass(frozen=True)
class SourceSpec:
    """One split of one set, as it is asked for; `node` and `split_key` are what the user has to change."""

    node: str
    path: str
    subset: str | None
    data_dir: str | None
    split: str
    revision: str | None
    streaming: bool
    weight: float = 1.0
    split_key: str = "split"

    @property
    def name(self) -> str:
        """What messages call it."""
        inside = f"/{self.data_dir}" if self.data_dir else ""
        return f"{self.path}{inside}" + ("" if self._is_whole_file else f" {self.split}")

    @property
    def _is_whole_file(self) -> bool:
        return self.split == "train" and Path(self.path).expanduser().is_file()

    def key(self, leaf: str) -> str:
        """A key of this source with its node."""
        return f"{self.node}.{self.split_key if leaf == 'split' else leaf}"


def train_sources(config: DataConfig) -> list[SourceSpec]:
    """What is read to train on (and, where nothing else is, to hold out of)."""
    entries = config.sources or [SourceConfig()]
    nodes = [f"data.sources[{number}]" for number in range(len(config.sources))] or ["data"]
    return [
        _spec(config, entry, node, entry.split or config.split)
        for node, entry in zip(nodes, entries, strict=True)
        if entry.path or config.path
    ]


def eval_sources(config: DataConfig) -> list[SourceSpec]:
    """What is read to hold out; nothing where a fraction of the prompts is."""
    if config.eval_path is not None:
        entry = SourceConfig(path=config.eval_path)
        # another set does not have the training split's parts, and a file has one split
        own = "train" if Path(config.eval_path).expanduser().is_file() else config.split.partition("[")[0]
        return [_spec(config, entry, "data", config.eval_split or own or "train", "eval_split")]
    entries = config.sources or [SourceConfig()]
    nodes = [f"data.sources[{number}]" for number in range(len(config.sources))] or ["data"]
    return [
        _spec(config, entry, node, split, "eval_split")
        for node, entry in zip(nodes, entries, strict=True)
        if (split := entry.eval_split or config.eval_split) and (entry.path or config.path)
    ]


def _spec(
    config: DataConfig, entry: SourceConfig, node: str, split: str, split_key: str = "split"
) -> SourceSpec:
    own = entry.path is not None
    path = entry.path or config.path
    assert path is not None
    return SourceSpec(
        node=node,
        path=path,
        # another set's own subset, folder and revision are not those of data.path
        subset=entry.subset if own else entry.subset or config.subset,
        data_dir=entry.data_dir if own else entry.data_dir or config.data_dir,
        split=split,
        revision=entry.revision if own else entry.revision or config.revision,
        streaming=config.streaming,
        weight=entry.weight,
        split_key=split_key,
    )


SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".lz4",
)  # fmt: skip


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
        f"{key}={value} is not a file, a folder, or the name of a set on the hub (OWNER/NAME)"
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
