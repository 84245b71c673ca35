"""Configured data to tokenised splits."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rcpo.data
from rcpo.config import ConfigError, DataConfig
from rcpo.data.dataset import load_datasets

TOKENIZER = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / "assets" / "tiny")


def write(path: Path, count: int, **changes: str) -> str:
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no", **changes} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sums_are_ready_to_train_and_to_generate() -> None:
    data = load_datasets(DataConfig(name="sums"), TOKENIZER, seed=1)
    assert data.evaluation is not None and data.checker is not None
    assert (data.report.train, data.report.evaluation) == (len(data.train), len(data.evaluation))
    assert len(data.train) == 6400
    assert len(data.evaluation) == len(data.prompts) > 700
    texts = [TOKENIZER.decode(example.prompt[1:]) for example in data.evaluation]
    assert texts == data.prompts
    answer = TOKENIZER.decode(data.evaluation[5].chosen[:-1])
    assert data.checker(data.prompts[5], answer)
    trained = {tuple(example.prompt) for example in data.train}
    assert not any(tuple(example.prompt) in trained for example in data.evaluation)
    assert data.report.shared_prompts == 0
    other = load_datasets(DataConfig(name="sums"), TOKENIZER, seed=2)
    assert other.evaluation is not None
    assert other.evaluation.fingerprint == data.evaluation.fingerprint
    assert other.train.fingerprint != data.train.fingerprint


def test_a_fraction_that_leaves_no_sum_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no sum"):
        load_datasets(DataConfig(name="sums", eval_fraction=1.0), TOKENIZER, seed=1)


def test_loading_twice_gives_the_same_fingerprint(tmp_path: Path) -> None:
    config = DataConfig(name="pairs", path=write(tmp_path / "x.jsonl", 30), eval_fraction=0.2)
    first, second, other = (load_datasets(config, TOKENIZER, seed) for seed in (1, 1, 2))
    assert first.train.fingerprint == second.train.fingerprint != other.train.fingerprint
    assert first.evaluation is not None
    assert (len(first.train), len(first.evaluation)) == (24, 6)
    assert first.prompts == [] and first.checker is None


def test_held_out_pairs_may_come_from_a_file(tmp_path: Path) -> None:
    config = DataConfig(
        name="pairs",
        path=write(tmp_path / "train.jsonl", 10),
        eval_path=write(tmp_path / "eval.jsonl", 12),
    )
    data = load_datasets(config, TOKENIZER, seed=1)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.report.read) == (10, 12, 22)
    assert data.report.shared_prompts == 10
    assert "10 held-out pairs" in data.report.lines()[-1]


def test_nothing_is_held_out_on_request(tmp_path: Path) -> None:
    config = DataConfig(name="pairs", path=write(tmp_path / "x.jsonl", 5), eval_fraction=0.0)
    data = load_datasets(config, TOKENIZER, seed=1)
    assert data.evaluation is None and len(data.train) == 5


def test_a_split_that_loses_every_pair_is_refused(tmp_path: Path) -> None:
    config = DataConfig(name="pairs", path=write(tmp_path / "x.jsonl", 5), max_length=2, on_bad="drop")
    with pytest.raises(ConfigError, match="every pair of a split was dropped"):
        load_datasets(config, TOKENIZER, seed=1)


def test_pairs_needs_a_path() -> None:
    with pytest.raises(ConfigError, match="data=pairs needs"):
        load_datasets(DataConfig(name="pairs"), TOKENIZER, seed=1)
