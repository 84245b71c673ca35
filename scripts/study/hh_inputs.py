"""`python scripts/study/hh_inputs.py FILE OUT`: what study=hh starts from, made of a file of HH-RLHF's pairs.

FILE is JSONL (.gz) with `chosen` and `rejected`, whole conversations. OUT gets pairs.jsonl, held_out.jsonl
(the last HELD_OUT usable pairs), swapped.jsonl (pairs.jsonl with the sides of each pair in random order, a
preference for nothing), chosen.jsonl with the chosen conversations of pairs.jsonl as text, and
model/, a Llama of 3.7 million parameters that is not trained yet, with a byte-level BPE of that text. The
same file gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rcpo.data.formats import read_row
from rcpo.data.readers import read_file
from rcpo.data.records import BadRow

HELD_OUT = 200
VOCABULARY, HIDDEN, LAYERS, LENGTH = 2048, 256, 4, 512
END = "<end>"


def usable(source: Path) -> list[dict[str, str]]:
    """The rows that rcpo can read as pairs."""
    found = []
    for _, row in (row for piece in read_file(source) for row in piece.parsed()):
        try:
            read_row(row)
        except BadRow:
            continue
        found.append({side: str(row[side]) for side in ("chosen", "rejected")})
    return found


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end token and no beginning."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def in_random_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with chosen and rejected swapped by a fair coin, the same for the same rows."""
    coin = random.Random(0)
    swapped = ({"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows)
    return [other if coin.random() < 0.5 else row for row, other in zip(rows, swapped, strict=True)]


def main(source: Path, out: Path) -> None:
    rows = usable(source)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "pairs.jsonl", train)
    write_lines(out / "held_out.jsonl", held_out)
    write_lines(out / "swapped.jsonl", in_random_order(train))
    write_lines(out / "chosen.jsonl", [{"text": row["chosen"]} for row in train])
    tokenizer = tokenizer_of([row["chosen"] for row in train])
    tokenizer.save_pretrained(out / "model")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(out / "model")
    print(f"{len(train)} pairs, {len(held_out)} held out, in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
