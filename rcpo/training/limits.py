"""What a model has no row for: positions beyond its last one, tokens beyond its embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError

# Their factors follow the longest row of a batch beyond this length, so a row's log-probs would depend on its
# company: LongRoPE (arXiv 2402.13753) and dynamic NTK.
_BY_LONGEST_ROW = ("longrope", "dynamic")


@dataclass(frozen=True)
class PositionLimit:
    """The most tokens that a row may have, and why."""

    tokens: int
    reason: str


def position_limit(config: PreTrainedConfig) -> PositionLimit | None:
    """Return the longest row that a model scores as it was trained; None where it counts no positions."""
    settings = config.get_text_config().to_dict()
    longest = settings.get("max_position_embeddings") or settings.get("n_positions")
    if not longest:
        return None
    ropes = list(_ropes(settings))
    end = max([longest, *(_stretched(rope) for rope in ropes)])
    limits = [PositionLimit(end, "its positions end there (max_position_embeddings)")]
    for rope in (rope for rope in ropes if rope["rope_type"] in _BY_LONGEST_ROW):
        reason = f"beyond that its positions ({rope['rope_type']}) depend on the longest row of a batch"
        limits.append(PositionLimit(_original(rope, settings) or longest, reason))
    return min(limits, key=lambda limit: limit.tokens)


def _original(rope: dict[str, Any], settings: dict[str, Any]) -> int | None:
    if rope["rope_type"] == "dynamic":
        return None
    return rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")


def _stretched(rope: dict[str, Any]) -> int:
    """Where YaRN ends, which some models do not count into max_position_embeddings; else 0."""
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return int(original * factor) if rope["rope_type"] == "yarn" and original and factor else 0


def _ropes(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rotary settings of a model: one, or one for each type of layer."""
    found = settings.get("rope_parameters") or {}
    for rope in [found, *found.values()]:
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope


def refuse_rows_beyond(
    key: str, config: PreTrainedConfig, dataset: PairDataset, sides: tuple[str, ...]
) -> None:
    """Raise ConfigError for an example that is too long for a model, or has a token that it does not know.

    `key` names the model. A position is counted from the start of the prompt, also in shared rows.
    """
    if not len(dataset):
        return
    limit = position_limit(config)
    lengths = dataset.lengths[:, 0] + dataset.response_lengths(sides).max(axis=1)
    if limit is not None and int(lengths.max()) > limit.tokens:
        row, many = int(lengths.argmax()), int((lengths > limit.tokens).sum())
        others = f", and {many - 1} more are too long" if many > 1 else ""
        raise ConfigError(
            f"{dataset.id(row)} has {int(lengths[row]):,} tokens{others}, and {key} takes {limit.tokens:,}: "
            f"{limit.reason}; set data.max_length={limit.tokens}"
        )
    vocabulary = int(config.get_text_config().vocab_size)
    found = first_unknown(dataset, vocabulary)
    if found is not None:
        row, token = found
        raise ConfigError(
            f"{dataset.id(row)} has token {token}, and the embedding of {key} has {vocabulary:,} rows: its "
            "tokenizer has tokens that were added without resizing the embedding (resize_token_embeddings)"
        )


def first_unknown(dataset: PairDataset, vocabulary: int) -> tuple[int, int] | None:
    """Return the place of the first example with a token from `vocabulary` on, and the token."""
    if dataset.largest_token < vocabulary:
        return None
    for place in range(len(dataset)):
        largest = max((max(part) for part in dataset[place].parts if part), default=0)
        if largest >= vocabulary:
            return place, largest
    return None


def refuse_other_tokens(own: Any, other: Any, where: str) -> None:
    """Raise ConfigError where another model's tokenizer does not give the policy's tokens.

    The data are tokens of the policy's tokenizer, and the other model scores those.
    """
    difference = _difference(own, other)
    if difference is not None:
        raise ConfigError(
            f"{where} has another tokenizer than the policy: {difference}; a reference scores the policy's "
            "tokens, so both need one vocabulary"
        )


def _difference(own: Any, other: Any) -> str | None:
    known = other.get_vocab()
    for token, number in sorted(own.get_vocab().items(), key=lambda entry: entry[1]):
        padding = number == own.pad_token_id and number != own.eos_token_id  # is never scored
        if known.get(token) != number and not padding:
            return f"{token!r} is token {number} here and {known.get(token, 'none')} there"
    for name in ("bos_token", "eos_token"):
        if getattr(own, name) != getattr(other, name):
            return f"{name} is {getattr(own, name)!r} here and {getattr(other, name)!r} there"
    for text in _TEXTS:
        ours, theirs = (list(np.ravel(t(text, add_special_tokens=False)["input_ids"])) for t in (own, other))
        if ours != theirs:
            return f"{text!r} is {_few(ours)} here and {_few(theirs)} there"
    return None


_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "  1234567 + 89 = 1,234,656.00\n\n\tdef f(x): return x**2",
    "Größe, naïve café, 東京, Привет, 🙂",
)


def _few(tokens: list[Any]) -> str:
    return f"{[int(token) for token in tokens[:8]]}{'…' if len(tokens) > 8 else ''}"
