"""The training prompts of any `data=…`, as text, as tokens, and as their rows have them, each once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.config.data import DataConfig, train_sources
from rcpo.data import sums
from rcpo.data.dataset import load_datasets, make_encoder
from rcpo.data.encode import Encoder, prompt_hash, prompt_key
from rcpo.data.identity import HEX_DIGITS
from rcpo.data.records import SFT, BadRow, Content, Row
from rcpo.data.sources import find_source
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.evaluation.answers import longest_answer
from rcpo.evaluation.harness import plain
from rcpo.onpolicy.kept import whole_rows
from rcpo.onpolicy.ranks import on_main_or_refused
from rcpo.runs.jsonl import write_lines
from rcpo.system.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = "prompts.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt: `content` as its row has it, `text` as the model reads it, `tokens` as training cuts them.

    `id` is of the text alone. `chosen` is the row's own chosen response, `more` what the row's template reads
    besides. `cut`: the tokens are not all of the text.
    """

    id: str
    place: str
    content: Content
    text: str
    tokens: list[int]
    chosen: str | None
    more: dict[str, Any]
    cut: bool = False


@dataclass(frozen=True)
class Prompts:
    """The prompts in the order that their seed draws.

    `ends` are tokens that end an answer besides the model's own. `longest` is how many tokens the data's
    longest chosen response has, as far as 512. `digest` is of all.
    """

    prompts: list[Prompt]
    ends: list[int]
    longest: int
    digest: str

    def share(self, count: int | None, round_: int) -> list[Prompt]:
        """The `round_`-th `count` of them, counted from 1, beginning again after the last; None: all."""
        if count is None or count >= len(self.prompts):
            return self.prompts
        first = (round_ - 1) * count
        return [self.prompts[place % len(self.prompts)] for place in range(first, first + count)]


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path) -> Prompts:
    """The prompts that would be trained on, held-out ones left out; the same on every rank. Collective.

    Rank 0 reads them and leaves them in `folder`, where the others, and a process that goes on, find them.
    Raises ConfigError for data that cannot be used.
    """
    datasets = load_datasets(config, tokenizer, seed)
    path = folder / PROMPTS
    sums_alone = config.name == "sums"

    def make() -> None:
        found = _sums(config, tokenizer, seed) if sums_alone else _rows(config, tokenizer, datasets.train)
        prompts = sorted(found, key=lambda prompt: _drawn(seed, prompt.id))
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(path, map(_written, prompts))

    on_main_or_refused(make)
    prompts = [Prompt(**row) for row in whole_rows(path)]
    template = datasets.template
    ends = [] if template is None else [template.end_id(tokenizer)]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prompts(prompts, ends, longest_answer(datasets.train), digest)


def _written(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON: Parquet's messages may hold times and other values that JSON lacks."""
    row: dict[str, Any] = plain(json.loads(json.dumps(asdict(prompt), default=str)))
    return row


def _drawn(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def _sums(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
    encoder = make_encoder(config, tokenizer)
    pairs = sums.training_pairs(config.train_examples, config.eval_fraction, seed)
    first = {pair.prompt: pair for pair in reversed(pairs)}
    rows = ((pair.id, Row(SFT, pair.prompt, pair.chosen, None)) for pair in first.values())
    return [_prompt(encoder, row, place) for place, row in rows]


def _rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, train: PairDataset) -> Iterable[Prompt]:
    """The prompts that `train` holds, read again for what tokens do not show.

    Each is that of its first row, with the first chosen response that any of its rows has: those of unpaired
    data may begin with an unwanted one.
    """
    encoder = make_encoder(config, tokenizer)
    wanted = {int(prompt) for prompt in train.prompts}
    found: dict[int, Prompt] = {}
    cache = cache_folder(config.cache)
    memo = None if cache is None else cache / "hashes"
    for spec in train_sources(config):
        fitted = None
        for part in find_source(spec, memo, log.info).parts:
            for piece in part.pieces():
                fitted = encoder.fitted(piece, part.place) if fitted is None else fitted
                for number, value in piece.parsed():
                    for row in fitted.read(value):
                        _take(fitted, row, f"{part.label}:{number}", wanted, found)
    if lost := len(wanted) - len(found):
        raise ConfigError(f"data: {lost} prompts of the tokenized data are not in its files any more")
    return found.values()


def _take(
    encoder: Encoder, read: Row | BadRow, place: str, wanted: set[int], found: dict[int, Prompt]
) -> None:
    """Put a row's prompt into `found` if it is one of those `wanted`, or the chosen response that lacks."""
    try:
        _, row, pair = encoder.render(read, place)
    except BadRow:
        return
    if not pair.prompt:
        raise ConfigError(f"{place}: text without a prompt (`text`) leaves nothing to answer")
    name = prompt_hash(prompt_key(row))
    if name in wanted and name not in found:
        found[name] = _prompt(encoder, row, place)
    elif name in found and found[name].chosen is None:
        found[name] = replace(found[name], chosen=_said(row.chosen))


def _prompt(encoder: Encoder, row: Row, place: str) -> Prompt:
    templated, row, pair = encoder.render(row, place)
    whole = encoder.prompt_ids(pair, templated=templated)
    tokens = encoder.cut_prompt(whole, templated=templated)
    digest = hashlib.sha256(pair.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:HEX_DIGITS]
    content = row.prompt
    if encoder.template is not None and not isinstance(content, str):
        content = encoder.template.with_system(content)
    cut = len(tokens) < len(whole)
    return Prompt(digest, place, content, pair.prompt, tokens, _said(row.chosen), _more(row), cut)


def _said(response: Content | None) -> str | None:
    """What a response says, in its first message."""
    if response is None or isinstance(response, str):
        return response
    content = response[0].get("content") or ""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def _more(row: Row) -> dict[str, Any]:
    more = {"tools": row.tools, "chat_template_kwargs": row.options}
    return {name: value for name, value in more.items() if value is not None}


def pair_row(prompt: Prompt, chosen: str, rejected: str) -> Mapping[str, Any]:
    """A pair as `data=pairs` reads it: text beside text, messages beside messages."""
    if isinstance(prompt.content, str):
        return {"prompt": prompt.content, "chosen": chosen, "rejected": rejected}
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": prompt.content, **answers, **prompt.more}
