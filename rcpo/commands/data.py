"""`rcpo data`: a dataset as the model will see it, before anything is trained on it."""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rcpo.commands.compose import command
from rcpo.config.schema import RunConfig
from rcpo.data.cache import Say
from rcpo.data.dataset import Datasets, load_datasets
from rcpo.data.diagnosis import ches, ches_lines, ches_of, responses, sampled
from rcpo.data.judged import TIE_WEIGHT
from rcpo.data.records import PAIRS, Example
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE
from rcpo.method.types import PAIR
from rcpo.models import hub
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_config, load_tokenizer, load_whole, model_folder
from rcpo.system import distributed
from rcpo.system.text import visible
from rcpo.training.limits import refuse_rows_beyond
from rcpo.training.objective import build_objective, refuse_numbers, scored_sides

if TYPE_CHECKING:
    from rcpo.training.forward import PairOutput

SHOW = "show"  # the word that adds a diagnosis, with or without a number of examples
SHOWN = 3  # examples, without `show=`
LONGEST = 1200  # characters of a part that are shown: its first and last halves
BINS, BAR = 12, 40  # of a histogram: rows, and columns of the longest bar
STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red", "gold": "yellow"}


def preview(arguments: Sequence[str]) -> int:
    """`rcpo data ARGUMENTS`: returns the exit code; raises ConfigError for what cannot be used."""
    words = [f"{SHOW}={SHOWN}" if word == SHOW else word for word in arguments]
    with command(words, own=(SHOW,), alone="data takes one dataset at a time, without -m") as call:
        if call.shown:
            return DONE
        config = call.config()
    logging.basicConfig(level=logging.WARNING)
    _show(config, _number(call.own.get(SHOW, str(SHOWN))), diagnose=SHOW in call.own)
    return DONE


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"show={text} is not a number of examples")
    return int(text)


def _show(config: RunConfig, count: int, *, diagnose: bool) -> None:
    console = Console(highlight=False)
    model = config.model
    folder = model_folder(model)
    if model.path is not None:
        folder = hub.tokenizer_folder("model.path", model.path, model.revision)
    tokenizer = load_tokenizer(folder, model)

    def say(line: str) -> None:
        console.print(Text(visible(line)), soft_wrap=True)

    datasets = load_datasets(config.data, tokenizer, config.seed, say)
    if config.data.ches_max is not None:
        datasets = _within_ches(config, tokenizer, datasets, say)
    for line in (*datasets.report.lines(), _special_tokens(tokenizer, datasets)):
        say(line)
    for example in datasets.train[:count]:
        console.print(_panel(example, tokenizer))
    for name, dataset in (("train", datasets.train), ("held out", datasets.evaluation)):
        if dataset is not None:
            console.print(length_table(name, dataset))
    console.print(histogram(datasets.train))
    for line in duplicates(datasets):
        say(line)
    if diagnose and datasets.train.kind == PAIRS:
        for line in _diagnosis(config, tokenizer, datasets):
            say(line)


def _within_ches(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, say: Say
) -> Datasets:
    """What training would keep; raises ConfigError where the model's weights are not on this machine."""
    if not _is_here(config):
        raise ConfigError(
            f"data.ches_max={config.data.ches_max:g} needs the model, and model.path={config.model.path} is "
            "not a folder on this machine; download it first, or leave data.ches_max out"
        )
    from rcpo.training.ches import within_ches  # DeepSpeed takes seconds to import

    start = _start(config)
    refuse_rows_beyond("the policy", load_config(start.base, config.model), datasets.train, PAIR)
    distributed.initialize()
    atexit.register(distributed.shutdown)
    return within_ches(datasets, config, start, tokenizer, say)


def _is_here(config: RunConfig) -> bool:
    path = config.model.path
    return path is None or Path(path).expanduser().is_dir()


def _start(config: RunConfig) -> ModelSource:
    """What training would start from."""
    given = None if config.adapter.name == "none" else config.adapter.path
    adapter = None if given is None else hub.folder("adapter.path", given)
    return ModelSource(model_folder(config.model), config.model.init, adapter=adapter)


def _diagnosis(config: RunConfig, tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> Iterator[str]:
    """Lines on the pairs, and on what the model makes of them where its weights are on this machine."""
    dataset, objective = datasets.train, build_objective(config)
    refuse_numbers(objective, datasets)
    yield from responses(dataset)
    if not _is_here(config):
        where = f"model.path={config.model.path} is not a folder on this machine"
        yield f"CHES and the band need the model: {where}"
        return
    from rcpo.models.policy import Policy  # these take seconds to import
    from rcpo.training.start_band import band_lines

    start = _start(config)
    settings, sides = load_config(start.base, config.model), scored_sides(objective, dataset)
    refuse_rows_beyond("the policy", settings, dataset, sides)
    model = load_whole(start, config.model, config.train.dtype, config.seed)
    policy = Policy(model.eval())
    policy.examine()
    if not policy.fused:
        yield "CHES and the band need an output head that is W h + b with a known scale or cap"
        return
    pad, places = tokenizer.pad_token_id, sampled(dataset)
    assert isinstance(pad, int)
    tokens = int(dataset.lengths[places][:, :3].sum())
    purpose = "CHES and the band" if objective.needs_rejected else "CHES"
    yield f"the model reads {len(places):,} pairs with {tokens:,} tokens for {purpose} …"
    found: dict[int, float] = {}

    def seen(part: Sequence[int], output: PairOutput) -> None:
        if objective.sides == PAIR:
            scores = ches(output.hidden, output.batch.sequences, output.batch.lengths)
            found.update(zip(part, scores.tolist(), strict=True))

    band = band_lines(policy, objective, dataset, config, pad, seen) if objective.needs_rejected else []
    left = np.setdiff1d(places, np.fromiter(found, dtype=np.int64))
    if len(left):  # a last batch that is not full; all pairs where the band takes other sides
        found.update(zip(left.tolist(), ches_of(policy, dataset, left, pad).tolist(), strict=True))
    yield from ches_lines(np.array([found[place] for place in places.tolist()]), places, dataset.id)
    yield from band


def _special_tokens(tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> str:
    template = datasets.template
    ends_itself = template is not None and template.frame.ends
    ending = template.frame.ending.strip() if template is not None and ends_itself else tokenizer.eos_token
    known = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
    names = ", ".join(f"{name} {token}" for name, token in known.items() if token is not None)
    return f"special tokens: {names}; a response ends with {ending}, which is learned"


def _panel(example: Example, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """An example's parts in their colours; the prompt is given, and so are turns within a response."""
    body = Text()
    for name, ids in zip(STYLES, example.parts, strict=True):
        if ids:
            spans = (example.contexts or {}).get(name, ())
            what = "given" if name == "prompt" else "learned"
            if spans:
                what = f"{len(ids) - sum(end - first for first, end in spans)} of them learned"
            body.append(f"{name} ({len(ids)} tokens, {what})\n", style="bold")
            place = 0
            for first, end in (*spans, (len(ids), len(ids))):
                body.append_text(tokens_as_text(ids[place:first], tokenizer, STYLES[name]))
                body.append_text(tokens_as_text(ids[first:end], tokenizer, STYLES["prompt"]))
                place = end
            body.append("\n")
    body.right_crop(1)
    return Panel(body, title=Text(visible(example.id, lines=False)), title_align="left")


def tokens_as_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    """Decoded tokens in a style, special ones reversed; a long text without its middle."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    mark = tokenizer("x", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(mark))  # behind a mark no decoder takes a first space away
    text = Text()
    for is_special, group in groupby(ids, key=special.__contains__):
        words = tokenizer.decode([*mark, *group])[start:]
        text.append(visible(words), style=f"{style} reverse" if is_special else style)
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    gap = Text(f"\n… {len(text) - LONGEST:,} characters …\n", style="italic")
    return text[:half].append_text(gap).append_text(text[-half:])


def length_table(name: str, dataset: PairDataset) -> Table:
    """Tokens of each part: shortest, median, 95th percentile, longest; of parts that are there."""
    table = Table(title=f"{name}: {len(dataset):,} examples, tokens", title_justify="left")
    for column in ("part", "examples", "shortest", "median", "95 %", "longest", "in all"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, lengths in zip(STYLES, dataset.lengths.T, strict=True):
        there = lengths[lengths > 0]
        if len(there):
            figures = (len(there), there.min(), *np.percentile(there, [50, 95]), there.max(), there.sum())
            table.add_row(part, *(f"{int(figure):,}" for figure in figures))
    return table


def histogram(dataset: PairDataset) -> Text:
    """How many examples have how many tokens in their longest sequence, prompt and response."""
    lengths = dataset.lengths[:, 0] + dataset.lengths[:, 1:].max(axis=1)
    counts, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    text = Text("prompt and longest response, tokens\n", style="bold")
    for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False):
        bar = "█" * round(BAR * count / max(counts))
        text.append(f"{int(np.ceil(low)):>7,} to {int(high):>7,} {count:>9,} {bar}\n", style="none")
    text.right_crop(1)
    return text


def duplicates(datasets: Datasets) -> list[str]:
    """What is there more than once: in training, there with its sides swapped, and held out too."""
    contents = [(_contents(one), _contents(_turned(one))) for one in datasets.train]
    train = Counter(own for own, _ in contents)
    again = sum(train.values()) - len(train)
    lines = [f"{again:,} of {len(datasets.train):,} training examples repeat another one's tokens"]
    tied = datasets.train.weights == TIE_WEIGHT  # learned in both orders on purpose
    turned = [place for place, (_, other) in enumerate(contents) if other in train and not tied[place]]
    if turned:
        lines.append(
            f"{len(turned):,} of {len(datasets.train):,} training examples are contradicted by another one, "
            f"which has the sides swapped (first: {datasets.train.id(turned[0])})"
        )
    if datasets.evaluation is not None:
        both = sum(_contents(example) in train for example in datasets.evaluation)
        lines.append(
            f"{both:,} of {len(datasets.evaluation):,} held-out examples are trained on, "
            f"{datasets.report.shared_prompts:,} have a prompt that is"
        )
    return lines


def _turned(example: Example) -> Example:
    return replace(example, chosen=example.rejected, rejected=example.chosen)


def _contents(example: Example) -> int:
    """Python's 64-bit hash of the tokens: a few of a million would be taken for others once in 10⁷ sets."""
    return hash((tuple(example.prompt), tuple(example.chosen), tuple(example.rejected)))
