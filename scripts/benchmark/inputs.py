"""What the benchmark feeds to both sides: a model with its tokenizer, pairs as text and as tokens."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rcpo.config.data import DataConfig
from rcpo.data.batches import GlobalBatches
from rcpo.data.dataset import load_datasets
from rcpo.data.detection import find_form
from rcpo.data.formats import read_row
from rcpo.data.forms import FormOptions
from rcpo.data.readers import read_file
from rcpo.data.records import BadRow

SEED = 1
END = "<end>"
ROWS = 100  # of a file, by which its form is known


@dataclass(frozen=True)
class Size:
    """A model and its batches. The defaults are what the bars of speed and memory are about.

    `model` is a folder in the hub's format, whose chat template makes the prompts; without it, a GPT-NeoX
    with random weights.
    """

    vocabulary: int = 50304
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    pairs: int = 4  # in a global batch
    length: int = 512  # tokens of prompt and response, at most
    prompt_share: float = 0.7  # of a made-up pair: HH-RLHF has 474 characters before 180 and 223
    exact: bool = False  # made-up pairs all of `length` tokens; else of lengths spread like HH-RLHF's
    model: str | None = None

    @staticmethod
    def of(model: Path, pairs: int, length: int) -> Size:
        """That of a model in a folder."""
        own = AutoConfig.from_pretrained(model)
        shape = own.vocab_size, own.hidden_size, own.num_hidden_layers, own.num_attention_heads
        return Size(*shape, pairs=pairs, length=length, model=str(model.resolve()))


def prepare(folder: Path, size: Size, steps: int, source: Path | None) -> Path:
    """Writes model/, pairs.jsonl, held_out.jsonl and tokens.jsonl (in the steps' order); returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    count = steps * size.pairs
    texts = made_up(count + 8, size) if source is None else read_texts(source)
    tokenizer: PreTrainedTokenizerBase
    if size.model is None:
        tokenizer = word_tokenizer(size) if source is None else trained_tokenizer(texts, size)
        save_model(folder / "model", size, tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(size.model)
        (folder / "model").symlink_to(size.model)
    write_lines(folder / "everything.jsonl", texts)
    # a first pass through rcpo's own reading leaves the usable pairs, cut as a run cuts them
    usable = load_datasets(data_config(folder / "everything.jsonl", size, on_bad="drop"), tokenizer, SEED)
    lines = [int(name.rsplit(":", 1)[1]) - 1 for name in usable.train.ids[: count + 4]]
    if len(lines) < count + 4:
        raise SystemExit(f"bench: {len(lines)} usable pairs; {steps} steps need {count + 4}")
    write_lines(folder / "pairs.jsonl", [texts[line] for line in lines[:count]])
    write_lines(folder / "held_out.jsonl", [texts[line] for line in lines[count:]])
    config = data_config(folder / "pairs.jsonl", size)
    train = load_datasets(config, tokenizer, SEED).train
    order = GlobalBatches(len(train), size.pairs, SEED)
    places = [place for step in range(steps) for place in order.indices(step)]
    rows = [train[place] for place in places]
    write_lines(
        folder / "tokens.jsonl",
        [{"prompt_ids": r.prompt, "chosen_ids": r.chosen, "rejected_ids": r.rejected} for r in rows],
    )
    (folder / "size.json").write_text(json.dumps(asdict(size)), encoding="utf-8")
    return folder


def data_config(path: Path, size: Size, on_bad: str = "refuse") -> DataConfig:
    """rcpo's `data.*` for a file of pairs."""
    held_out = path.with_name("held_out.jsonl")
    prompt = None if size.exact else size.length // 2  # rcpo's default shares, unless lengths are made up
    return DataConfig(
        name="pairs", path=str(path), eval_path=str(held_out) if held_out.exists() else str(path),
        max_length=size.length, max_prompt_length=prompt, on_bad=on_bad,
        template=None if size.model is None else "tokenizer",
    )  # fmt: skip


def read_texts(source: Path) -> list[dict[str, str]]:
    """A file's usable pairs, with the prompt made explicit."""
    values = [value for piece in read_file(source) for _, value in piece.parsed()]
    form = find_form(values[:ROWS], FormOptions(), source.name)
    texts = []
    for value in values:
        with contextlib.suppress(BadRow):  # not an object, or nothing to learn from
            for row in map(read_row, form.rows(value)):
                texts.append({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected})
    random.Random(SEED).shuffle(texts)
    return texts


def made_up(count: int, size: Size) -> list[dict[str, str]]:
    """Pairs of random words, one token each: exact lengths, or HH-RLHF's proportions and spread."""
    draw = random.Random(SEED)

    def words(number: float) -> str:
        return " ".join(f"w{draw.randrange(size.vocabulary - 8)}" for _ in range(max(2, int(number))))

    texts = []
    for _ in range(count):
        total = size.length - 1 if size.exact else size.length * min(0.95, draw.lognormvariate(-1.2, 0.6))
        prompt = total * size.prompt_share
        rest = total - prompt
        shorter = 1.0 if size.exact else 0.8  # HH-RLHF: 180 characters chosen, 223 rejected
        texts.append({"prompt": words(prompt), "chosen": words(rest * shorter), "rejected": words(rest)})
    return texts


def word_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A token for each made-up word."""
    names = [END, "<unknown>", *(f"w{number}" for number in range(size.vocabulary - 8))]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def trained_tokenizer(texts: list[dict[str, str]], size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE of GPT-NeoX's kind, trained on the pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # about a token for 4.3 characters of English, as a tokenizer that was trained on much more text gives
    trainer = trainers.BpeTrainer(
        vocab_size=min(size.vocabulary, 16384), special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text for row in texts for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def save_model(folder: Path, size: Size, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random weights and the tokenizer, in the hub's format."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, intermediate_size=4 * size.hidden,
        max_position_embeddings=max(2048, 2 * size.length),
        bos_token_id=0, eos_token_id=0, pad_token_id=0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
