"""The configuration of data: what is read, how it becomes tokens, and which sources that means."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    """Preference pairs, or completions for kto and sft; lengths in tokens, None is no limit.

    `path` is a file, a folder or a set on the hub; `subset`, `data_dir`, `split` and `revision` are what
    the datasets library calls so; `sources` are several sets. Held out are `eval_path`, else `eval_split`,
    else `eval_fraction` of the prompts. `columns` maps our names to the file's: names, paths, or Jinja.
    `format` names the form of the rows (`format_module` registers a user's own), `labels` explain labels
    and judgments, `pairing` says how several scored answers become pairs, `learn` which answers of a
    conversation are learned. `train_examples` is how many pairs the embedded task makes. `template` is None
    (messages: the tokenizer's), `tokenizer`, a named one or a Jinja file. `min_margin` and `max_margin`
    bound how far the two scores of a pair may be apart, `ties` keep or drop pairs with equal scores.
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
        # a part of the training split is no part of another set, and a file has one split
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
