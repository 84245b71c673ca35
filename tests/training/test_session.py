"""What a session refuses before it loads any weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rcpo.data
from rcpo import get_objective
from rcpo.config.data import DataConfig
from rcpo.config.parsing import to_container
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.dataset import Datasets, load_datasets
from rcpo.data.records import PAIRS, UNPAIRED
from rcpo.errors import ConfigError
from rcpo.runs.folder import FINISHED_FILE
from rcpo.training.objective import refuse_unmeasured
from rcpo.training.session import Session, refuse_other_split

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


@pytest.mark.parametrize(
    ("best", "objective", "kind", "compared", "reason"),
    [
        ("eval/loss", "kto", PAIRS, True, "objective=kto has no loss of a pair by itself"),
        ("eval/loss", "sft", PAIRS, True, "objective=sft has no loss of a pair by itself"),
        ("eval/logratios/chosen", "simpo", PAIRS, False, "set reference.track=true"),
        ("eval/winner_fell", "simpo", PAIRS, False, "set reference.track=true"),
        ("eval/rewards/accuracies", "apo_zero_unpaired", UNPAIRED, True, "single completions"),
        ("eval/loss", "dpo", PAIRS, True, None),
        ("eval/loss", "apo_zero_unpaired", UNPAIRED, True, None),
        ("eval/token_logratios/chosen", "simpo", PAIRS, True, None),
        ("eval/rewards/accuracies", "kto", PAIRS, True, None),
        ("eval/exact_match", "dpo", PAIRS, True, None),
        (None, "kto", UNPAIRED, False, None),
    ],
)
def test_a_best_metric_that_will_not_be_measured_is_refused(
    best: str | None, objective: str, kind: str, compared: bool, reason: str | None
) -> None:
    config = RunConfig()
    config.checkpoint.best = best
    expected = nullcontext() if reason is None else pytest.raises(ConfigError, match=f"{best} .*{reason}")
    with expected:
        refuse_unmeasured(config, get_objective(objective), kind, compared=compared)


def test_answers_that_are_not_asked_for_make_no_best_step() -> None:
    config = RunConfig()
    config.checkpoint.best, config.eval.generate_examples = "eval/exact_match", 0
    with pytest.raises(ConfigError, match=r"eval/exact_match is not measured .* eval\.generate_examples=0"):
        refuse_unmeasured(config, get_objective("dpo"), PAIRS, compared=True)


def test_a_session_asks_before_it_loads_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", 40)
    config = RunConfig(data=DataConfig(name="pairs", path=str(path), eval_fraction=0.25, cache="off"))
    config.objective = ObjectiveConfig(name="kto", hyperparameters={})
    config.checkpoint.best, config.eval.every = "eval/loss", 5
    with pytest.raises(ConfigError, match=r"checkpoint\.best=eval/loss is not measured"):
        Session(config, tmp_path, training=True)
