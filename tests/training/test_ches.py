"""`data.ches_max`: which training pairs are left out, by whose weights, and what a run remembers of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import sums_file, tiny_llama

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.training.ches import _ches, ches_scores, within_ches
from rcpo.training.session import Session, refuse_other_split
from rcpo.training.trainer import write_finished


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = RunConfig()
    config.wandb.mode = "disabled"
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.eval_fraction = "pairs", 0.25
    config.data.path = sums_file(tmp_path / "pairs.jsonl", 40)
    config.objective = ObjectiveConfig(name="simpo", reduction="mean", hyperparameters={})
    config.reference.cache = str(tmp_path / "cache")
    config.train.batch_size = config.train.micro_batch_size = 4
    config.dynamics.every = 0
    distributed.initialize()
    return config


def by_transformers(session: Session) -> np.ndarray:
    """CHES of the training pairs, a response at a time."""
    model, found = session.engine.policy.model.model, []
    for example in session.datasets.train:
        means = []
        for response in (example.chosen, example.rejected):
            with torch.no_grad():
                states = model(torch.tensor([example.prompt + response])).last_hidden_state[0].double()
            means.append(states[len(example.prompt) - 1 : -1].mean(0))
        found.append(float(means[0] @ means[1] - means[0] @ means[0]))
    return np.array(found)


def test_pairs_above_the_limit_are_left_out_and_counted(config: RunConfig, tmp_path: Path) -> None:
    whole = Session(config, tmp_path / "whole", training=True)
    expected = by_transformers(whole)
    limit = float(np.sort(expected)[19:21].mean())
    config.data.ches_max = limit
    session = Session(config, tmp_path / "run", training=True)
    kept = [example.id for example, score in zip(whole.datasets.train, expected) if score < limit]
    assert list(session.datasets.train.ids) == kept and len(kept) == 20
    assert session.batches.steps_per_epoch == 5
    report = session.datasets.report
    first = next(example.id for example, score in zip(whole.datasets.train, expected) if score > limit)
    assert f"left out: 10 pairs with a CHES above data.ches_max={limit:g} (first: {first})" in report.lines()
    assert report.train == 20 and "20 to train on, 10 held out" in report.lines()[0]
    # the same pairs are held out, and the same weights are trained
    assert list(session.datasets.evaluation or []) == list(whole.datasets.evaluation or [])
    for one, other in zip(session.engine.policy.parameters(), whole.engine.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_of_the_run_finds_its_split(config: RunConfig, tmp_path: Path) -> None:
    config.data.ches_max = -1e-9
    session = Session(config, tmp_path / "run", training=True)
    whole = Session(config, tmp_path / "other", training=False)
    assert 0 < len(session.datasets.train) < len(whole.datasets.train) == 30
    state = {"config": {"data": vars(config.data)}, "contents": session.contents, "step": 1}
    (tmp_path / "run").mkdir()
    write_finished(tmp_path / "run", state, evaluated=False)
    refuse_other_split(config, tmp_path / "run", whole.datasets)


def scores(config: RunConfig, session: Session) -> tuple[np.ndarray, list[str]]:
    said: list[str] = []
    found = ches_scores(session.datasets.train, config, session.start, session.tokenizer, said.append)
    return found, said


class Taken(dict[int, np.ndarray]):
    """What a rank hands in, by place."""

    def write(self, place: int, values: np.ndarray) -> None:
        self[place] = values


def test_two_ranks_score_as_one_does(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(config, tmp_path / "run", training=True)
    alone, _ = scores(config, session)
    taken = Taken()
    for rank in range(2):  # one after the other, each with its own part; 30 pairs are four blocks of 8
        group = SimpleNamespace(
            world_size=lambda: 2, rank=lambda own=rank: own, gather_objects=lambda own: [own]
        )
        monkeypatch.setattr("rcpo.training.ches.distributed", group)
        before = set(taken)
        _ches(session.datasets.train, config, session.start, 0, taken)  # type: ignore[arg-type]
        assert len(set(taken) - before) == 2
    assert np.array_equal(np.concatenate([taken[place] for place in sorted(taken)]).astype("f4"), alone)


def test_scores_are_kept_for_the_same_weights(config: RunConfig, tmp_path: Path) -> None:
    session = Session(config, tmp_path / "run", training=True)
    alone, said = scores(config, session)
    assert "CHES of the training pairs: computed" in said[0] and "(30 pairs)" in said[0]
    again, said = scores(config, session)
    assert "CHES of the training pairs: read from cache" in said[0] and np.array_equal(alone, again)
    config.model.init = "random"
    other, _ = scores(config, Session(config, tmp_path / "other", training=True))
    assert not np.array_equal(other, alone)


def test_what_cannot_be_compared_is_refused(config: RunConfig, tmp_path: Path) -> None:
    config.data.ches_max = -1e6
    with pytest.raises(ConfigError, match=r"no pair is left: the CHES of all 30 training pairs is above"):
        Session(config, tmp_path / "run", training=True)
    session = Session(config, tmp_path / "run", training=False)
    session.datasets.train.kind = "unpaired"
    with pytest.raises(ConfigError, match=r"data\.ches_max=-1e\+06 compares the responses of pairs"):
        within_ches(session.datasets, config, session.start, session.tokenizer, print)
