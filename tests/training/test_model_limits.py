"""Rows beyond a model's positions, tokens beyond its embedding, references with another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import held_out, sums_file, tiny_llama
from transformers import (
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from rcpo.config.schema import RunConfig
from rcpo.data.records import Example
from rcpo.data.store import PairDataset
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.training.limits import position_limit, refuse_other_tokens, refuse_rows_beyond
from rcpo.training.session import Session

PAIR = ("chosen", "rejected")
SIZE: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, **settings}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**SIZE, max_position_embeddings=64), 64),
        (GPT2Config(n_positions=48), 48),
        (Gemma3TextConfig(**SIZE, max_position_embeddings=99), 99),
        (MambaConfig(), None),
        (BloomConfig(), None),
        (LlamaConfig(**SIZE, max_position_embeddings=64, rope_scaling=rope("dynamic", factor=4.0)), 64),
        # as Qwen ships it: 64 positions that YaRN makes 256; and as DeepSeek does, with 256 at first
        (Qwen2Config(**SIZE, max_position_embeddings=64, rope_scaling=rope(
            "yarn", factor=4.0, original_max_position_embeddings=64)), 256),
        (LlamaConfig(**SIZE, max_position_embeddings=256, rope_scaling=rope(
            "yarn", factor=4.0, original_max_position_embeddings=64)), 256),
        (Phi3Config(**SIZE, max_position_embeddings=256, original_max_position_embeddings=72,
                    rope_scaling=rope("longrope", **FACTORS)), 72),
        (Phi3Config(**SIZE, max_position_embeddings=256), 256),
    ],
)  # fmt: skip
def test_the_longest_row_is_read_off_the_configuration(config: PreTrainedConfig, limit: int | None) -> None:
    found = position_limit(config)
    assert (None if found is None else found.tokens) == limit


def dataset(*lengths: tuple[int, int, int]) -> PairDataset:
    rows = enumerate(lengths, 1)
    return PairDataset.of([Example(f"pairs.jsonl:{n}", *([5] * part for part in row)) for n, row in rows])


def test_the_row_that_is_too_long_is_named_with_the_remedy() -> None:
    config = LlamaConfig(**SIZE, max_position_embeddings=16)
    refuse_rows_beyond("the policy", config, dataset((8, 8, 8), (15, 1, 1)), PAIR)
    # each response follows its prompt alone: 10 + 7, not 10 + 7 + 7
    with pytest.raises(ConfigError, match=r"jsonl:2 has 17 tokens, and the policy takes 16: .*max_length=16"):
        refuse_rows_beyond("the policy", config, dataset((8, 8, 8), (10, 2, 7)), PAIR)
    with pytest.raises(ConfigError, match="has 30 tokens, and 1 more are too long"):
        refuse_rows_beyond("the policy", config, dataset((10, 20, 1), (10, 2, 7)), PAIR)


def test_rows_beyond_the_threshold_of_longrope_are_refused() -> None:
    config = Phi3Config(**SIZE, max_position_embeddings=256, original_max_position_embeddings=72,
                        rope_scaling=rope("longrope", **FACTORS))  # fmt: skip
    refuse_rows_beyond("the policy", config, dataset((40, 32, 1)), PAIR)
    with pytest.raises(ConfigError, match=r"takes 72: .*longrope.* longest row .*data\.max_length=72"):
        refuse_rows_beyond("the policy", config, dataset((40, 33, 1)), PAIR)


def test_a_token_without_a_row_of_the_embedding_is_named() -> None:
    config = LlamaConfig(**SIZE)
    pairs = [Example("a:1", [1], [39], [2]), Example("a:2", [1], [2], [3, 40])]
    refuse_rows_beyond("the policy", config, PairDataset.of(pairs[:1]), PAIR)
    with pytest.raises(ConfigError, match=r"a:2 has token 40, and the embedding of the policy has 40 rows"):
        refuse_rows_beyond("the policy", config, PairDataset.of(pairs), PAIR)


def run(folder: Path) -> RunConfig:
    pairs = sums_file(folder / "pairs.jsonl", 24)
    config = RunConfig()
    config.model.name, config.model.path = "local", tiny_llama(folder / "model")
    config.data.name, config.data.path, config.data.eval_path = "pairs", pairs, held_out(pairs)
    config.train.batch_size, config.train.micro_batch_size, config.reference.cache = 8, 4, "off"
    return config


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("key", ["model", "reference"])
def test_a_session_looks_before_weights_load(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed.initialize()
    config = run(tmp_path)
    folder = Path(str(config.model.path))
    if key == "reference":
        folder = Path(tiny_llama(tmp_path / "reference"))
        config.reference.path = str(folder)
    change(folder / "config.json", max_position_embeddings=8)
    monkeypatch.setattr("rcpo.training.session.load_policy", None)
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:\d+ has \d+ tokens.* takes 8"):
        Session(config, tmp_path, training=True)


def permuted(folder: Path) -> None:
    """Swap two characters of the vocabulary."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("training", [True, False])
def test_a_reference_with_another_tokenizer_is_refused(
    tmp_path: Path, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed.initialize()
    config = run(tmp_path)
    config.reference.path = tiny_llama(tmp_path / "reference")
    Session(config, tmp_path, training=training)
    permuted(tmp_path / "reference")
    monkeypatch.setattr("rcpo.training.session.load_policy", None)
    with pytest.raises(ConfigError, match=r"reference\.path=.* another tokenizer.*'[ab]' is token \d+"):
        Session(config, tmp_path, training=training)


def test_special_tokens_and_merges_count_and_padding_and_more_tokens_do_not(tmp_path: Path) -> None:
    def tokenizer(name: str = "own") -> Any:
        return AutoTokenizer.from_pretrained(tiny_llama(tmp_path / name))

    refuse_other_tokens(tokenizer(), tokenizer("other"), "the reference")
    other = tokenizer()
    other.eos_token = "a"
    with pytest.raises(ConfigError, match=r"eos_token is .* here and 'a' there"):
        refuse_other_tokens(tokenizer(), other, "the reference")
    more = tokenizer()
    more.add_tokens(["<more>"])
    refuse_other_tokens(tokenizer(), more, "the reference")
    with pytest.raises(ConfigError, match=r"'<more>' is token \d+ here and none there"):
        refuse_other_tokens(more, tokenizer(), "the reference")
    padded = tokenizer()
    padded.add_special_tokens({"pad_token": "<padding>"})
    refuse_other_tokens(padded, tokenizer(), "the reference")
    lower = tokenizer("lower")
    path = tmp_path / "lower" / "tokenizer.json"
    change(path, normalizer={"type": "Lowercase"})
    lower = AutoTokenizer.from_pretrained(path.parent)
    with pytest.raises(ConfigError, match="The quick brown fox"):
        refuse_other_tokens(tokenizer(), lower, "the reference")
