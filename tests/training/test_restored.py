"""What an objective and a calibration take over from a run's state, and what begins anew."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import sums_file, tiny_llama
from workers import resume

from rcpo import get_objective
from rcpo.config.parsing import load_run_config, save_run_config
from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.runs.folder import FINISHED_FILE
from rcpo.runs.inputs import Standing
from rcpo.runs.tracker import Tracker
from rcpo.system import distributed
from rcpo.training import trainer
from rcpo.training.dynamics import PREVIOUS
from rcpo.training.objective import restore_objective
from rcpo.training.session import Session
from rcpo.training.trainer import Trainer

SHIFT = {"shift_start": 0.5, "shift_end": 1.0}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    distributed.initialize()
    config = RunConfig()
    config.wandb.mode, config.reference.cache, config.probe.size = "disabled", "off", 0
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    config.data.name, config.data.path = "pairs", sums_file(tmp_path / "pairs.jsonl", 24)
    config.data.cache, config.data.eval_fraction = "off", 0.0
    config.train.batch_size, config.train.micro_batch_size, config.train.max_steps = 8, 8, 4
    config.rc.enabled, config.rc.sketch, config.eval.every = True, 32, 1
    config.objective = ObjectiveConfig(name="dpo_shift", hyperparameters={"beta": 1.0, **SHIFT})
    (tmp_path / "run").mkdir()
    found = Session(config, tmp_path / "run", training=True)
    found.prepare_reference()
    return found


def test_an_evaluation_has_the_progress_of_the_weights_that_it_is_of(session: Session) -> None:
    seen: list[float] = []
    run = Trainer(session)

    def evaluate(_: Session) -> dict[str, Any]:
        seen.append(run.objective.progress)
        return {"eval/loss": 1.0}

    tracker = Tracker(session.run_dir, session.config, 4, True, console=Console(file=io.StringIO()))
    with tracker:
        run.run(tracker, evaluate)
    assert seen == [0.25, 0.5, 0.75, 1.0]  # after each of four steps
    again = get_objective("dpo_shift", **SHIFT)
    restore_objective(again, json.loads((session.run_dir / FINISHED_FILE).read_text()))
    assert again.progress == 1.0


def test_an_objective_takes_over_progress_and_means_of_its_own_kind() -> None:
    half = {"progress": 0.5, "objective": None}
    shift = get_objective("dpo_shift", **SHIFT)
    restore_objective(shift, half)
    assert shift.progress == 0.5
    restore_objective(shift, None)
    assert shift.progress == 1.0

    means = {"total": 6.0, "count": 4.0}
    bco = get_objective("bco")
    assert bco.state is not None
    restore_objective(bco, {**half, "objective": means})
    assert bco.state.state_dict() == means
    mixture = get_objective("mix", parts=[{"name": "bco"}, {"name": "simper"}])
    assert mixture.state is not None
    restore_objective(mixture, {**half, "objective": means})  # of bco alone: another objective's
    assert mixture.state.state_dict() == {"0": {"total": 0.0, "count": 0.0}}
    restore_objective(mixture, {**half, "objective": {"0": means}})
    assert mixture.state.state_dict() == {"0": means}


def test_of_two_runs_started_in_one_folder_the_one_that_trains_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write config.yaml before they ask for the folder's lock, which takes seconds to come to."""
    save_run_config(RunConfig(seed=2), tmp_path / "config.yaml")  # of the one that is then refused
    monkeypatch.setattr(trainer, "finished_standing", lambda *_: Standing([], []))
    assert trainer.train(RunConfig(seed=1, resume="auto"), tmp_path) == 0
    assert load_run_config(tmp_path).seed == 1


def test_a_finished_run_stays_finished_where_another_one_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume_changed=allow` with, say, a model that is not there: the run that is done is still done."""

    def refuse(*_: Any) -> None:
        raise ConfigError("model.path=gone: no such folder")

    (tmp_path / FINISHED_FILE).write_text("{}")
    monkeypatch.setattr(trainer, "finished_standing", lambda *_: Standing(["model.path: a -> gone"], []))
    monkeypatch.setattr(trainer, "find_checkpoint", lambda *_: None)
    monkeypatch.setattr(trainer, "_load", refuse)
    with pytest.raises(ConfigError, match="gone"):
        trainer.train(RunConfig(resume="auto", resume_changed="allow"), tmp_path)
    assert (tmp_path / FINISHED_FILE).read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "alpha_stays", "samples_stay"),
    [
        ({}, True, True),
        ({"rule": "loop"}, False, True),
        ({"rule": "fixed", "alpha": 2.0}, False, True),
        ({"scope": "pair"}, False, True),
        ({"sketch": 16}, True, False),
        ({"sketch_seed": 1}, True, False),
    ],
)
def test_another_rule_or_geometry_begins_anew(
    session: Session, changes: dict[str, Any], alpha_stays: bool, samples_stay: bool
) -> None:
    first = Trainer(session)
    for _ in range(2):
        first.train_step()
    state, previous = json.loads(json.dumps(first.state_dict())), first.dynamics.tensors()[PREVIOUS]
    for key, value in changes.items():
        setattr(session.config.rc, key, value)
    then = Trainer(session)
    then.dynamics.load_state_dict(state["dynamics"], previous, state["config"]["rc"])
    calibrator, earlier = then.dynamics.calibrator, first.dynamics.calibrator
    assert earlier is not None and earlier.alpha != 1.0
    if calibrator is not None:
        assert calibrator.alpha == (earlier.alpha if alpha_stays else changes.get("alpha", 1.0))
    kept = then.dynamics.tensors()
    assert (PREVIOUS in kept and torch.equal(kept[PREVIOUS], previous)) is samples_stay
    then.step = first.step
    then.train_step()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"rc": "loop"}),
        ({"rc": "loop"}, {"rc": "microbatch"}),
        ({"objective": "bco"}, {"objective": "mix"}),
        ({"reference": "model"}, {"reference": "model", "sync": 2}),
        ({"optimizer": "sgd", "rc": "off"}, {"optimizer": "adamw"}),
    ],
)
def test_a_run_goes_on_with_other_settings(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """What `resume_changed=allow` lets through continues: another rule, objective, reference, optimizer."""
    distributed.initialize()
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    sums_file(tmp_path / resume.MANY, 89)
    (tmp_path / "run").mkdir()
    resume.part(resume.configuration(model, pairs, **first), tmp_path / "run", 2)
    run = resume.part(resume.configuration(model, pairs, **then), tmp_path / "run", 4, save=False)
    rows = resume.rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["loss"] < 0.5 * rows[0]["loss"]
    assert run.objective.progress == pytest.approx(4 / resume.STEPS)
