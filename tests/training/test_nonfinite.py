"""Numbers gone wrong on one rank of two: found on both at the same step, recorded, and no weight changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from tiny import sums_file, tiny_llama
from workers import nonfinite

from rcpo.config.schema import ObjectiveConfig, TrainConfig
from rcpo.errors import RunError
from rcpo.method.objectives import RunningMean
from rcpo.system import distributed
from rcpo.training.watch import NonFiniteWatch


@pytest.mark.slow
def test_both_ranks_agree_under_every_stage(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    on_ranks(2, nonfinite.try_all, model, pairs, output, range(4))
    results = json.loads(output.read_text())
    assert len(results) == 8
    for name, result in results.items():
        skip, stop = result["skip"], result["stop"]
        assert skip["counts"] == [0, 1, 1], name
        assert skip["unchanged"] and skip["moved"], name
        assert skip["losses"][1] in ("inf", "nan") if "loss" in name else float(skip["losses"][1]) > 0
        # steps 4, 5 and 6 are bad, and two in a row were allowed
        assert skip["gave_up_at"] == 6 and "train.max_nonfinite=2" in skip["message"], name
        assert len(set(stop)) == 1 and "step 2" in stop[0], name
        record = json.loads((tmp_path / name / "nonfinite" / "step-2.json").read_text())
        assert str(tmp_path / name / "nonfinite" / "step-2.json") in stop[0]
        ids = [part["ids"] for rank in record["ranks"] for part in rank]
        assert [len(part) for part in ids] == [2, 2, 2, 2] and len(
            {name for part in ids for name in part}
        ) == 8, name
        assert all(len(part["chosen"]) == len(part["ref_rejected"]) == 2 for part in record["ranks"][0])
        assert record["metrics"]["step"] == 2 and "dynamics/incentive_chosen" in record["metrics"]


def test_in_a_row_is_counted_anew_after_a_good_step(tmp_path: Path) -> None:
    watch = NonFiniteWatch(tmp_path, TrainConfig(on_nonfinite="skip", max_nonfinite=1))
    for step, bad in enumerate([True, False, True, False], start=1):
        watch.judge(bad, {"step": step, "loss": float("nan")})
    assert watch.metrics() == {"nonfinite_steps": 2}
    resumed = NonFiniteWatch(tmp_path, TrainConfig(on_nonfinite="skip", max_nonfinite=1))
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    resumed.judge(True, {"step": 5})
    with pytest.raises(RunError, match="max_nonfinite=1"):
        resumed.judge(True, {"step": 6})
    assert json.loads((tmp_path / "nonfinite" / "step-1.json").read_text())["metrics"]["loss"] == "nan"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_leaves_bco_s_running_mean_alone(tmp_path: Path, kind: str) -> None:
    """The mean is over the pairs of good steps: 8 of the first, none of the second, 8 of the third."""
    distributed.initialize()
    model, pairs = tiny_llama(tmp_path / "model"), sums_file(tmp_path / "pairs.jsonl", 24)
    config = nonfinite.configuration(model, pairs, 0, "skip")
    config.objective = ObjectiveConfig(name="bco", hyperparameters={"beta": 0.1})
    trainer, objective = nonfinite.start(config, tmp_path)
    trainer.train_step()
    assert isinstance(objective.state, RunningMean)
    kept = objective.state.state_dict()
    assert kept["count"] == 16  # both rewards of each pair
    objective.armed = kind
    assert trainer.train_step()["nonfinite_steps"] == 1
    assert objective.state.state_dict() == kept
    objective.armed = ""
    trainer.train_step()
    assert objective.state.count == 32 and objective.state.total != kept["total"]


def test_a_running_mean_forgets_a_bad_step() -> None:
    mean = RunningMean()
    mean.observe(torch.tensor([1.0, 3.0]))
    mean.step()
    mean.observe(torch.tensor([float("nan")]))
    mean.step(keep=False)
    mean.observe(torch.tensor([5.0]))
    mean.step()
    assert mean.value == 3.0
