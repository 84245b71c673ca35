"""What a session refuses before it loads any weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rcpo.data
from rcpo.config.data import DataConfig
from rcpo.config.parsing import to_container
from rcpo.config.schema import RunConfig
from rcpo.data.dataset import Datasets, load_datasets
from rcpo.errors import ConfigError
from rcpo.runs.folder import FINISHED_FILE
from rcpo.training.session import refuse_other_split

TOKENIZER = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / "assets" / "tiny")


def write(path: Path, count: int) -> Path:
    rows = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "b"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(config: RunConfig) -> Datasets:
    return load_datasets(config.data, TOKENIZER, config.seed)


def test_an_evaluation_on_other_pairs_than_the_run_held_out_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", 40)
    config = RunConfig(data=DataConfig(name="pairs", path=str(path), eval_fraction=0.25, cache="off"))
    refuse_other_split(config, tmp_path, load(config))  # not a trained run: nothing to compare with
    state = {"config": to_container(config), "contents": load(config).split}
    (tmp_path / FINISHED_FILE).write_text(json.dumps(state))
    refuse_other_split(config, tmp_path, load(config))
    shorter = replace(config, data=replace(config.data, max_length=6))  # other tokens of the same pairs
    refuse_other_split(shorter, tmp_path, load(shorter))

    write(path, 41)
    reason = "the training prompts.* are not those of the run.*data.eval_path=FILE"
    with pytest.raises(ConfigError, match=reason):
        refuse_other_split(config, tmp_path, load(config))
    write(path, 40)
    for other in (replace(config, seed=2), replace(config, data=replace(config.data, eval_fraction=0.5))):
        with pytest.raises(ConfigError, match=reason):
            refuse_other_split(other, tmp_path, load(other))
    named = replace(config, data=replace(config.data, eval_path=str(write(tmp_path / "other.jsonl", 9))))
    refuse_other_split(named, tmp_path, load(named))
