"""`load_datasets`: the configured data as tokens, train and held-out, with a report of what became of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcpo.config.data import DataConfig, SourceSpec, eval_sources, train_sources
from rcpo.data import sums
from rcpo.data.cache import Check, Say, TokenCache, TokenRequest
from rcpo.data.encode import Encoder
from rcpo.data.forms import FormOptions
from rcpo.data.invariant import check_prompts
from rcpo.data.limits import Limits
from rcpo.data.readers import RowBlock
from rcpo.data.records import PAIRS, UNPAIRED
from rcpo.data.rendering import reads_date
from rcpo.data.report import DataReport, Tally
from rcpo.data.selection import by_margin, mixture, split_prompts
from rcpo.data.sources import find_source
from rcpo.data.store import PairDataset, TokenStore
from rcpo.data.templates import ChatTemplate, find_template, template_sources
from rcpo.data.tokenise import PairTokeniser
from rcpo.errors import ConfigError
from rcpo.system.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Checker = Callable[[str, str], bool]


@dataclass(frozen=True)
class Datasets:
    """Tokenised pairs to train on and held out (None: nothing is held out).

    `prompts` are the held-out prompts as text, each once, to generate answers to; `checker(prompt, answer)`
    tells right from wrong; empty and None where answers cannot be verified. `template` is what rendered
    messages, where there were any to render. `control` are pairs that `rc=loop` set aside.
    """

    train: PairDataset
    evaluation: PairDataset | None
    report: DataReport
    prompts: list[str] = field(default_factory=list)
    checker: Checker | None = None
    template: ChatTemplate | None = None
    control: PairDataset | None = None

    @property
    def split(self) -> dict[str, str]:
        """Hashes of the prompts of either side, by names for people."""
        held_out = "none" if self.evaluation is None else self.evaluation.prompts_fingerprint
        return {"the training prompts": self.train.prompts_fingerprint, "the held-out prompts": held_out}


def load_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, say: Say = log.info
) -> Datasets:
    """Read, split and tokenise the configured data; the same on every rank. Collective.

    `seed` decides which prompts are held out of `data.path`, and draws the sums to train on. `say` takes
    lines for the user, on rank 0. Raises ConfigError for data that cannot be used.
    """
    load = _load_sums if config.name == "sums" else _load_files
    datasets = load(config, tokenizer, seed, say)
    report, train, evaluation = datasets.report, datasets.train, datasets.evaluation
    if train.kind == UNPAIRED:
        _refuse_one_sided(train, report.source)
    report.train = len(train)
    if evaluation is not None:
        report.evaluation = len(evaluation)
        report.shared_prompts = int(np.isin(evaluation.prompts, train.prompts).sum())
    return datasets


def _refuse_one_sided(train: PairDataset, source: str) -> None:
    """Raise ConfigError where the labels of all completions to train on are the same."""
    wanted, unwanted = (int((train.lengths[:, side] > 0).sum()) for side in (1, 2))
    if wanted and unwanted:
        return
    label, name = ("true", "unwanted") if wanted else ("false", "wanted")
    raise ConfigError(
        f"{source}: the label of all {len(train)} completions to train on is {label}, and without "
        f"{name} ones there is nothing to compare; add some, or imitate the wanted ones: objective=sft on a "
        "file without the label"
    )


def make_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """What turns the configured rows into tokens; raises ConfigError for settings that cannot."""
    template = find_template(
        tokenizer,
        config.template,
        config.template_options,
        config.system_prompt,
        reasoning=config.reasoning,
        day=None if config.date is None else date.fromisoformat(config.date),
    )
    return Encoder(
        _make_tokeniser(config, tokenizer),
        template,
        always=config.template is not None,
        columns=config.columns,
        options=FormOptions(
            config.format, config.format_module, config.labels, config.pairing, config.ties, config.learn
        ),
    )


def writes_date(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template of the configured data writes today's date; raises ConfigError without one."""
    if config.name == "sums":
        return False
    sources = template_sources(tokenizer, config.template)
    return sources is not None and any(map(reads_date, sources[1:]))


def _make_tokeniser(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PairTokeniser:
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation)
    return PairTokeniser(tokenizer, limits)


def _load_sums(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, _: Say) -> Datasets:
    if not sums.operands(config.eval_fraction, held_out=False):
        raise ConfigError(f"data.eval_fraction={config.eval_fraction} leaves no sum to train on; lower it")
    report = DataReport(config.name)
    train = sums.training_pairs(config.train_examples, config.eval_fraction, seed)
    evaluation = sums.held_out_pairs(config.eval_fraction)
    tally = Tally()
    tally.counts["read"] = len(train) + len(evaluation)
    tokeniser = _make_tokeniser(config, tokenizer)
    splits = [
        PairDataset.of(tokeniser.encode(pairs, tally), config.max_length) for pairs in (train, evaluation)
    ]
    report.add(tally)
    prompts = [pair.prompt for pair in evaluation]
    return Datasets(splits[0], splits[1] if prompts else None, report, prompts, sums.answer_is_correct)


def _load_files(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, say: Say) -> Datasets:
    encoder = make_encoder(config, tokenizer)
    report = DataReport(config.path or ", ".join(spec.name for spec in train_sources(config)))
    report.drop, report.learn = config.on_bad == "drop", config.learn

    def check(fitted: Encoder, piece: RowBlock, place: str) -> int:
        return check_prompts(fitted, tokenizer, piece, place)

    loader = _Loader(config, encoder, check, report, say)
    specs, held_out_specs = train_sources(config), eval_sources(config)
    if config.eval_path is None:
        _refuse_same(specs, held_out_specs)
    stores = loader.load(specs)
    rows = _within_margins(stores, config, report)
    prompts = np.concatenate([store.prompts for store in stores])[rows]
    evaluation = None
    if held_out_specs:
        other = loader.load(held_out_specs)
        chosen = _within_margins(other, config, report)
        evaluation = PairDataset(other, config.max_length, rows=chosen, kind=loader.kind)
    else:
        trained, held_out = split_prompts(prompts, config.eval_fraction, seed)
        if len(held_out):
            evaluation = PairDataset(stores, config.max_length, rows=rows[held_out], kind=loader.kind)
        rows = rows[trained]
    if config.sources:
        rows = mixture(rows, [len(store) for store in stores], [spec.weight for spec in specs], seed)
    train = PairDataset(stores, config.max_length, rows=rows, kind=loader.kind)
    if not len(train):
        raise ConfigError("data.sources: their weights leave no example to train on; raise them")
    template = encoder.template if report.counts["templated"] else None
    if template is not None:
        report.template, report.template_notes = template.name, template.notes()
    return Datasets(train, evaluation, report, template=template)


def _refuse_same(specs: Sequence[SourceSpec], held_out: Sequence[SourceSpec]) -> None:
    """Raise ConfigError where the same rows would be trained on and held out."""
    trained = {_rows_of(spec) for spec in specs}
    for spec in held_out:
        if _rows_of(spec) in trained:
            raise ConfigError(
                f"{spec.key('split')}={spec.split} of {spec.path} is what is trained on; hold out another "
                f"part, such as data.split='train[:90%]' data.eval_split='train[90%:]', or a fraction of the "
                "prompts: data.eval_fraction"
            )


def _rows_of(spec: SourceSpec) -> tuple[Any, ...]:
    path = Path(spec.path).expanduser()
    place = str(path.resolve()) if path.exists() else spec.path
    return place, spec.subset, spec.data_dir, spec.revision, spec.split


def _within_margins(stores: Sequence[TokenStore], config: DataConfig, report: DataReport) -> np.ndarray:
    """The rows of some stores whose margins are wanted, ascending; those left out are counted."""
    count = sum(map(len, stores))
    if config.min_margin is None and config.max_margin is None and config.ties == "keep":
        return np.arange(count)
    everything = PairDataset(stores)
    margins = everything.margins
    unknown = np.flatnonzero(np.isnan(margins))
    bounded = config.min_margin is not None or config.max_margin is not None
    # a comparison's own judgment says what a tie is, without any score
    if len(unknown) and (bounded or not report.counts["compared"]):
        raise ConfigError(
            f"{everything.id(int(unknown[0]))}: neither a margin nor two scores, which data.min_margin, "
            "data.max_margin and data.ties=drop go by; give them, name their columns (data.columns), or "
            "leave the three out"
        )
    left_out = by_margin(margins, config.min_margin, config.max_margin, ties=config.ties == "keep")
    kept = np.ones(count, dtype=bool)
    for reason, rows in left_out.items():
        if rows.any():
            report.leave_out(reason, int(rows.sum()), everything.id(int(np.flatnonzero(rows)[0])))
            kept &= ~rows
    if not kept.any():
        reasons = ", ".join(f"{number} with {reason}" for reason, number in report.left_out.items())
        raise ConfigError(f"no pair is left: {reasons}")
    return np.flatnonzero(kept)


class _Loader:
    """Gets the sources' tokens and gathers what became of their rows."""

    def __init__(
        self, config: DataConfig, encoder: Encoder, check: Check, report: DataReport, say: Say
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._check = check
        self._report = report
        self._say = say
        self._cache = TokenCache(cache_folder(config.cache), say)
        self.kind = PAIRS
        self._kinds: dict[str, str] = {}  # kind: the first source of it

    def load(self, specs: Sequence[SourceSpec]) -> list[TokenStore]:
        """Raise ConfigError for a source without a usable row, and for kinds of data that do not mix."""
        return [self._load(spec) for spec in specs]

    def _load(self, spec: SourceSpec) -> TokenStore:
        config = self._config
        drop = config.on_bad == "drop"

        def make() -> TokenRequest:
            source = find_source(spec, self._cache.memo, self._say)
            return TokenRequest(source, self._encoder, self._check, config.max_examples, config.workers, drop)

        store, meta = self._cache.fetch(make)
        self._report.counts.update(meta.counts)
        self._report.forms[spec.name] = meta.form
        for reason, (place, count) in meta.bad.items():
            self._report.dropped[reason] += count
            self._report.examples.setdefault(reason, place)
        read = meta.counts.get("read", 0)
        if not len(store):
            raise ConfigError(f"{spec.name}: no usable example in {read} rows{_reasons(meta.bad)}")
        dropped = meta.counts.get("bad_rows", 0)  # a row of several answers may give several bad pairs
        if dropped > config.max_dropped * read:
            raise ConfigError(
                f"{spec.name}: {dropped} of {read} rows ({dropped / read:.1%}) cannot be used, more than "
                f"data.max_dropped={config.max_dropped:g} allows{_reasons(meta.bad)}; fix the file or how it "
                "is read (data.columns), or raise data.max_dropped"
            )
        for kind in meta.kinds:
            self._kinds.setdefault(kind, spec.name)
        if len(self._kinds) > 1:
            found = ", ".join(f"{kind} ({place})" for kind, place in self._kinds.items())
            raise ConfigError(f"data: one kind of rows at a time, found {found}; give one of them")
        [self.kind] = self._kinds
        return store


def _reasons(bad: dict[str, tuple[str, int]]) -> str:
    reasons = ", ".join(f"{count} {reason} (first: {place})" for reason, (place, count) in bad.items())
    return f": {reasons}" if reasons else ""
