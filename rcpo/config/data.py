"""The configuration of data: what is read, how it becomes tokens, and which sources that means."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rcpo.config.fields import key
from rcpo.config.paths import is_file, mode_of
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class SourceConfig:
    """One set of a mixture; a key that is not given has the value of `data`."""

    path: str | None = key(None, "a file, a folder, or OWNER/NAME on the hub", path=True)
    subset: str | None = key(None, "name of the subset, as the datasets library calls it")
    data_dir: str | None = key(None, "folder inside the set")
    split: str | None = key(None, "split to train on")
    eval_split: str | None = key(None, "split to hold out")
    revision: str | None = key(None, "branch, tag, or commit of the hub")
    weight: float = key(1.0, "how often each pair appears per epoch")


@dataclass(kw_only=True)
class DataConfig:
    """Preference pairs, or completions for kto and sft. Lengths are tokens."""

    name: str = key("sums", "the embedded task, or pairs that are read", choices=("sums", "pairs"))
    path: str | None = key(None, "a file, a folder, or OWNER/NAME on the hub", path=True)
    subset: str | None = key(None, "name of the subset, as the datasets library calls it")
    data_dir: str | None = key(None, "folder inside the set")
    split: str = key("train", "split to train on")
    revision: str | None = key(None, "branch, tag, or commit of the hub; null: the newest")
    streaming: bool = key(False, "read a set of the hub without storing it")
    sources: list[SourceConfig] = key([], "several sets: [{path: A, weight: 1}, {path: B, weight: 0.5}]")
    columns: dict[str, str] = key({}, "names of ours to those of the file: names, paths, or Jinja")
    format: str | None = key(None, "form of the rows; null: recognized by their columns")
    format_module: str | None = key(None, "Python module that registers a format of yours")
    labels: dict[Any, Any] = key({}, "what labels and judgments mean: {good: true, bad: false}")
    pairing: str = key(
        "best_worst", "how several scored answers become pairs", choices=("best_worst", "adjacent", "all")
    )
    learn: str = key("last", "answers of a conversation to learn", choices=("last", "all"))
    eval_path: str | None = key(None, "held-out pairs: a file, a folder, or OWNER/NAME on the hub", path=True)
    eval_split: str | None = key(None, "split of held-out pairs")
    eval_fraction: float = key(
        0.1, "share of the prompts to hold out, where no held-out pairs are given", at_least=0, below=1
    )
    train_examples: int = key(6400, "pairs that the embedded task makes", at_least=1)
    max_examples: int | None = key(
        None, "usable pairs of each source and split, at most; null: all", at_least=1
    )
    template: str | None = key(
        None,
        "null: the tokenizer's for messages; tokenizer: also for text; a name; or a Jinja file",
        path=True,
    )
    template_options: dict[str, Any] = key({}, "variables of the template: {enable_thinking: false}")
    system_prompt: str | None = key(None, "system message for conversations without one")
    reasoning: str = key(
        "keep", "what to do with reasoning before an answer", choices=("keep", "strip", "empty")
    )
    date: str | None = key(
        None, "today's date for templates that write it, YYYY-MM-DD; null: the run's first day"
    )
    max_length: int | None = key(None, "longest prompt with response; null: unlimited", at_least=1)
    max_prompt_length: int | None = key(None, "longest prompt; null: unlimited", at_least=1)
    truncation: str = key(
        "keep_end", "which end of a longer prompt to keep", choices=("keep_end", "keep_start")
    )
    on_bad: str = key(
        "refuse", "stop at an unusable row, or leave it out and count it", choices=("refuse", "drop")
    )
    min_margin: float | None = key(None, "leave out pairs whose scores differ by less; null: none")
    max_margin: float | None = key(None, "leave out pairs whose scores differ by more; null: none")
    ches_max: float | None = key(
        None, "leave out training pairs with a higher CHES in the starting model; null: none"
    )
    ties: str = key("keep", "what to do with pairs of equal scores", choices=("keep", "drop"))
    max_dropped: float = key(
        0.05, "share of a source's rows that on_bad=drop may leave out", at_least=0, at_most=1
    )
    cache: str | None = key(None, "folder that keeps tokens; null: the user's cache; off: none", path=True)
    workers: int | None = key(None, "processes that tokenize; null: one per core", at_least=0)
    layout: str = key(
        "auto", "a prompt once for both responses, or twice", choices=("auto", "shared", "separate")
    )
    group_by_length: bool | None = key(
        None, "put pairs of similar length into a micro-batch; null: where that changes no result"
    )


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
    """Raise ConfigError for limits that contradict, and for a source that is not there."""
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
    for name, value in (("min_margin", data.min_margin), ("max_margin", data.max_margin)):
        if value is not None:
            raise ConfigError(f"data.{name}={value:g}: data=sums has no scores; leave it out")
    if data.ties == "drop":
        raise ConfigError("data.ties=drop: data=sums has no scores; leave it out")


def _check_date(value: str | None) -> None:
    try:
        date.fromisoformat(value or "2026-01-31")
    except ValueError as error:
        raise ConfigError(f"data.date={value} is not a date: write it as 2026-01-31") from error


def _refuse_files(data: DataConfig) -> None:
    """The embedded data come from no file: what names one was meant for data=pairs."""
    for name in ("path", "sources", "columns", "eval_path", "template"):
        if value := getattr(data, name):
            raise ConfigError(
                f"data.{name}={value}: data=sums is the embedded task; add data=pairs to read files"
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
