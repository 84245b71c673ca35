"""A reference that follows the policy (TR-DPO): its weights by hand, its checkpoint, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sums_file, tiny_llama
from workers import resume

from rcpo.config.schema import AdapterConfig, ObjectiveConfig, RunConfig
from rcpo.config.validation import validate
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer


def configuration(folder: Path, **settings: Any) -> RunConfig:
    if not (folder / "model").exists():
        tiny_llama(folder / "model")
        sums_file(folder / "pairs.jsonl", 24)
    model, pairs = str(folder / "model"), str(folder / "pairs.jsonl")
    return resume.configuration(model, pairs, micro=16, reference="model", **settings)


def test_the_reference_moves_every_few_steps_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = configuration(tmp_path, sync=2)
    config.reference.mixup = 0.25
    distributed.initialize()
    assert resume.compare(config, tmp_path / "runs", [3]) == ""

    session = Session(config, tmp_path / "run", training=True)
    session.prepare_reference()
    trainer, held = Trainer(session), session.held_reference
    assert held is not None
    start = {name: value.clone() for name, value in held.policy.named_parameters()}
    trainer.train_step()
    assert all(torch.equal(value, start[name]) for name, value in held.policy.named_parameters())
    trainer.train_step()
    policy = dict(session.engine.policy.named_parameters())
    for name, value in held.policy.named_parameters():
        expected = 0.75 * start[name].double() + 0.25 * policy[name].detach().double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert not value.requires_grad
    assert any(not torch.equal(value, start[name]) for name, value in held.policy.named_parameters())
    # a mixup of 1 makes it the policy: all log-ratios are 0 again
    held.follow(session.engine, 1.0)
    pairs = session.forward(session.collate(session.datasets.train, [0, 1])).pairs
    assert pairs.chosen_logratios.abs().max() < 1e-5 and pairs.rejected_logratios.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "precompute"}, r"reference\.sync_every=2 changes .* set reference\.mode=model"),
        ({"adapter": "lora"}, r"reference\.sync_every=2 mixes whole weights, and adapter\.name=lora"),
        ({"mixup": 0.0}, r"reference\.mixup=0 is out of range"),
        ({"mixup": 1.5}, r"reference\.mixup=1\.5 is out of range"),
        ({"every": 0, "mixup": 0.5}, r"reference\.mixup=0\.5 is read with reference\.sync_every alone"),
    ],
)
def test_settings_that_rule_it_out(change: dict[str, Any], message: str) -> None:
    config = RunConfig()
    config.reference.mode, config.reference.sync_every = change.get("mode", "model"), change.get("every", 2)
    config.reference.mixup = change.get("mixup", 0.6)
    config.adapter = AdapterConfig(name=change.get("adapter", "none"))
    with pytest.raises(ConfigError, match=message):
        validate(config, files=False)


def test_an_objective_without_a_reference_has_none_to_sync(tmp_path: Path) -> None:
    config = configuration(tmp_path, sync=2)
    config.objective = ObjectiveConfig(name="simpo", reduction="mean", hyperparameters={})
    with pytest.raises(ConfigError, match=r"sync_every=2: objective=simpo needs no reference"):
        Session(config, tmp_path / "run", training=True)


def test_a_reference_of_another_shape_cannot_follow(tmp_path: Path) -> None:
    config = configuration(tmp_path, sync=2)
    config.reference.path = tiny_llama(tmp_path / "wider", hidden=64)
    distributed.initialize()
    session = Session(config, tmp_path / "run", training=True)
    with pytest.raises(ConfigError, match=r"reference\.path=.*wider has others"):
        session.prepare_reference()
