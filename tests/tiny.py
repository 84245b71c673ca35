"""Small models and data that tests make for themselves."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = str(resources.files("rcpo") / "assets" / "tiny")


def tiny_llama(folder: Path, *, tied: bool = False, hidden: int = 32, positions: int = 64) -> str:
    """A random two-layer Llama over the packaged characters, in the hub's format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,  # large, so that log-probs differ from uniform
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def sums_file(path: Path, count: int, *, weighted: bool = False, gold: bool = False) -> str:
    """A JSONL file of `count` ≤ 89 pairs with distinct prompts and responses of several lengths.

    Where `weighted`, their weights go from 0.1 to 1.3 in turn; with `gold`, each has a third answer.
    """
    rows = [
        {
            "prompt": f"{10 + n}+{99 - n}=",
            "chosen": "it is 109" if n % 3 else "= 109",
            "rejected": str(110 + n),
        }
        | ({"weight": 0.1 + 0.3 * (n % 5)} if weighted else {})
        | ({"gold": f"the sum is {109 if n % 2 else '= 109'}"} if gold else {})
        for n in range(count)
    ]
    for file in (path, Path(held_out(path))):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def held_out(path: Path | str) -> str:
    """The second file of `sums_file`."""
    return str(Path(path).with_name(f"held-out-{Path(path).name}"))
