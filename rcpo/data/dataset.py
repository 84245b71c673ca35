"""`load_datasets`: the configured data as tokens, train and held-out, with a report of what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rcpo.config import ConfigError, DataConfig
from rcpo.data import sums
from rcpo.data.pairs import read_pairs, split_prompts
from rcpo.data.records import TextPair
from rcpo.data.report import DataReport
from rcpo.data.store import PairDataset
from rcpo.data.tokenise import PairTokeniser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Checker = Callable[[str, str], bool]


@dataclass(frozen=True)
class TextData:
    """What a source yields: pairs as text, and for a verifiable task how to check an answer to a prompt."""

    train: list[TextPair]
    evaluation: list[TextPair]
    checker: Checker | None = None


@dataclass(frozen=True)
class Datasets:
    """Tokenised pairs to train on and held out (None: nothing is held out).

    `prompts` are the held-out prompts as text, each once, to generate answers to; `checker(prompt, answer)`
    tells right from wrong; empty and None where answers cannot be verified.
    """

    train: PairDataset
    evaluation: PairDataset | None
    report: DataReport
    prompts: list[str] = field(default_factory=list)
    checker: Checker | None = None


def load_datasets(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Datasets:
    """Reads, splits and tokenises the configured data; the same on every rank.

    `seed` decides which prompts are held out of `data.path`, and draws the sums to train on.
    Raises ConfigError for data that cannot be used.
    """
    report = DataReport(config.path or config.name, drop=config.on_bad == "drop")
    texts = _SOURCES[config.name](config, seed, report)
    tokeniser = PairTokeniser(tokenizer, config.max_length, config.max_prompt_length)
    train = PairDataset(tokeniser.encode(texts.train, report), config.max_length)
    evaluation = PairDataset(tokeniser.encode(texts.evaluation, report), config.max_length)
    report.train, report.evaluation = len(train), len(evaluation)
    if not train or (texts.evaluation and not evaluation):
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
        raise ConfigError(
            f"{report.source}: every pair of a split was dropped ({reasons}); change the limits"
        )
    trained = {pair.prompt for pair in texts.train}
    report.shared_prompts = sum(pair.prompt in trained for pair in texts.evaluation)
    return Datasets(
        train,
        evaluation if len(evaluation) else None,
        report,
        prompts=list(dict.fromkeys(pair.prompt for pair in texts.evaluation)) if texts.checker else [],
        checker=texts.checker,
    )


def _load_sums(config: DataConfig, seed: int, report: DataReport) -> TextData:
    if not sums.operands(config.eval_fraction, held_out=False):
        raise ConfigError(f"data.eval_fraction={config.eval_fraction} leaves no sum to train on; lower it")
    train = sums.training_pairs(config.train_examples, config.eval_fraction, seed)
    evaluation = sums.held_out_pairs(config.eval_fraction)
    report.read = len(train) + len(evaluation)
    return TextData(train, evaluation, sums.answer_is_correct)


def _load_pairs(config: DataConfig, seed: int, report: DataReport) -> TextData:
    if config.path is None:
        raise ConfigError("data=pairs needs a file of preference pairs: data.path=FILE.jsonl[.gz]")
    pairs = read_pairs(Path(config.path), report)
    if config.eval_path is None:
        return TextData(*split_prompts(pairs, config.eval_fraction, seed))
    return TextData(pairs, read_pairs(Path(config.eval_path), report))


_SOURCES: dict[str, Callable[[DataConfig, int, DataReport], TextData]] = {
    "sums": _load_sums,
    "pairs": _load_pairs,
}
