"""Tokenizers of the kinds in use, trained on a few sentences, with chat templates in each family's style.

The templates are written for the tests, apart from those that rcpo ships.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the sum of two and two? The sum is four, I think.",
    "hello   world, it is what it is\nand so on\n\nHuman: why?\n\nAssistant: because 12 and 345 are numbers.",
    "def add(a, b):\n    return a + b  # naïve café, Ünïcödé and emoji 🙂",
] * 20

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = ("llama3", "mistral", "zephyr", "qwen", "gemma", "unigram", "neox")


def _bytes(special: Sequence[str], *, digits: bool = False) -> Tokenizer:
    """Byte-level BPE: GPT-NeoX; with digits in threes Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=digits))
    split = pre_tokenizers.Split(
        Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        behavior="isolated",
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not digits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole]) if digits else whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieces(special: Sequence[str], *, prepend: bool) -> Tokenizer:
    """SentencePiece-like BPE with bytes for what it does not know; Llama 2, Mistral (`prepend`), Gemma."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=known, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _unigram() -> Tokenizer:
    """SentencePiece's Unigram with byte fallback, as in T5 and many multilingual models."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=420, special_tokens=known, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocabulary = [(piece, score) for piece, score in learned]
    whole = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    whole.pre_tokenizer = tokenizer.pre_tokenizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return whole


def _opened_by(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Puts a BOS before every text, as these tokenizers do by themselves."""
    number = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, number)]
    )
    return tokenizer


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A family's kind of tokenizer with its kind of template."""
    if family == "llama3":
        names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        made = _opened_by(_bytes(names, digits=True), names[0])
        return _finished(made, family, bos_token=names[0], eos_token="<|eot_id|>")
    if family == "qwen":
        made = _bytes(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), digits=True)
        return _finished(made, family, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if family == "neox":
        made = _bytes(("<|endoftext|>",))
        return _finished(made, None, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if family == "gemma":
        made = _opened_by(_pieces(("<start_of_turn>", "<end_of_turn>"), prepend=False), "<s>")
    else:
        made = _unigram() if family == "unigram" else _opened_by(_pieces((), prepend=True), "<s>")
    template = "zephyr" if family == "unigram" else family
    return _finished(made, template, bos_token="<s>", eos_token="</s>")


def _finished(made: Tokenizer, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer
