"""When the loop needs control pairs, which pairs they are, and what a reading says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import sums_file, tiny_llama
from transformers import AutoTokenizer

from rcpo.config.data import DataConfig
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.dataset import load_datasets
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.training.control import has_fresh_signals, needs_control, set_aside
from rcpo.training.session import Session, refuse_other_split
from rcpo.training.trainer import write_finished


def configuration(signal: str = "auto", rule: str = "loop", **train: int | None) -> RunConfig:
    config = RunConfig()
    config.rc.enabled, config.rc.rule, config.rc.signal = True, rule, signal
    config.train.batch_size, config.train.micro_batch_size = 16, 16
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def test_training_pairs_are_fresh_where_they_are_compared_with_the_start() -> None:
    config = configuration()
    assert has_fresh_signals(config, compared=True)
    assert not has_fresh_signals(config, compared=False)
    config.reference.path = "another model"
    assert not has_fresh_signals(config, compared=True)
    assert not has_fresh_signals(configuration("control"), compared=True)
    moving = configuration()
    moving.reference.mode, moving.reference.sync_every = "model", 2  # it follows the winner down
    assert not has_fresh_signals(moving, compared=True)


@pytest.mark.parametrize(
    ("config", "fresh", "expected"),
    [
        (configuration(), True, False),  # one epoch: every pair is new when it comes
        (configuration(epochs=2), True, True),
        (configuration(max_steps=4), True, False),  # 64 pairs are four steps
        (configuration(max_steps=5), True, True),
        (configuration(), False, True),
        (configuration("control"), False, True),
        (configuration("fresh", epochs=2), True, False),
        (configuration(rule="center", epochs=2), False, False),
    ],
)
def test_control_pairs_are_needed_where_a_step_has_no_fresh_ones(
    config: RunConfig, fresh: bool, expected: bool
) -> None:
    assert needs_control(config, fresh, examples=64) is expected


def test_fresh_signals_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rc\.signal=fresh .* rc\.signal=auto"):
        needs_control(configuration("fresh"), False, examples=64)


def session(tmp_path: Path, objective: ObjectiveConfig, rows: int = 89, size: int = 16) -> Session:
    config = configuration(max_steps=6)
    config.train.batch_size, config.train.micro_batch_size = size, size
    config.wandb.mode, config.reference.cache = "disabled", "off"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.path = "pairs", sums_file(tmp_path / "pairs.jsonl", rows)
    config.data.eval_fraction = 0.1
    config.objective = objective
    config.rc.control.pairs = 8
    distributed.initialize()
    return Session(config, tmp_path, training=True)


SIMPO = ObjectiveConfig(name="simpo", reduction="mean", hyperparameters={"beta": 2.0, "gamma": 1.0})


def test_control_pairs_share_no_prompt_with_those_trained_on_or_held_out(tmp_path: Path) -> None:
    found = session(tmp_path, SIMPO).datasets
    assert found.control is not None and found.evaluation is not None
    assert len(found.control) == 8 and len(found.train) == 89 - 9 - 8
    for other in (found.train, found.evaluation):
        assert not np.isin(found.control.prompts, other.prompts).any()
    assert found.report.train == len(found.train)
    assert any("8 of the pairs are set aside" in line for line in found.report.lines())


def test_an_evaluation_of_a_run_with_control_pairs_finds_its_split(tmp_path: Path) -> None:
    trained = session(tmp_path, SIMPO)
    assert trained.datasets.control is not None
    (tmp_path / "trained").mkdir()
    state = {"config": {"data": vars(trained.config.data)}, "contents": trained.contents, "step": 1}
    write_finished(tmp_path / "trained", state, evaluated=False)
    tokenizer, seed = trained.tokenizer, trained.config.seed
    refuse_other_split(
        trained.config, tmp_path / "trained", load_datasets(trained.config.data, tokenizer, seed)
    )


def test_too_little_data_for_control_pairs_is_refused_with_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rc=loop .* a tenth of \d+ training pairs is fewer than 8"):
        session(tmp_path, SIMPO, rows=40)


def test_a_single_prompt_is_refused_by_the_key_that_asks_for_control_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(100)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(name="pairs", path=str(path), eval_fraction=0.0, cache="off")
    datasets = load_datasets(data, AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "model")), 1)
    with pytest.raises(ConfigError, match=r"rc=loop .* all 100 training pairs have one prompt"):
        set_aside(datasets, configuration())


def test_a_reading_is_how_far_the_pairs_whose_turn_it_is_have_moved(tmp_path: Path) -> None:
    """Against plain log-probs of both models, pair by pair; batches of 8 make a reading of 8."""
    own = session(tmp_path, SIMPO, size=8)
    control, pairs = own.control_pairs(), own.datasets.control
    assert control is not None and pairs is not None
    model = own.engine.policy.model

    def means(side: int) -> list[float]:
        found = []
        for example in pairs:
            response = example.chosen if side == 0 else example.rejected
            row = torch.tensor([[*example.prompt, *response]])
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=row).logits[0].double(), -1)
            start = len(example.prompt) - 1
            values = logps[start:-1].gather(1, row[0, start + 1 :, None])
            found.append(float(values.mean()))
        return found

    before = [means(0), means(1)]
    unchanged = control.reading(4)
    assert unchanged is not None and abs(unchanged.winner) < 1e-6 and abs(unchanged.loser) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = [means(0), means(1)]
    reading = control.reading(8)
    assert reading is not None and reading.steps == 4
    expected = [math.fsum(a) / 8 - math.fsum(b) / 8 for a, b in zip(after, before, strict=True)]
    assert [reading.winner, reading.loser] == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0]) > 0.01
    assert control.reading(0) is None and control.reading(6) is None
