"""Searches: Optuna's trials over runs of no time, whose values are known functions of the configuration."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from imitation import Runs

from rcpo.commands.sweep import sweep
from rcpo.config.composition import PRIMARY, hydra_session
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import Outcome
from rcpo.sweeps.search import space

METRIC = "eval/rewards/accuracies"
SEARCH = ["sweep.search=optuna", "hydra.sweep.dir=out"]


def study() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out", "sweep.json").read_text())["search"]
    return found


def peak_at_a_thousandth(config: RunConfig) -> dict[str, float]:
    return {METRIC: 1.0 - abs(math.log10(config.optim.lr) + 3.0)}


def test_spaces_are_hydra_s() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    lines = {
        "optim.lr=tag(log,interval(1e-5,1e-3))": FloatDistribution(1e-5, 1e-3, log=True),
        "objective.beta=interval(0.1,2)": FloatDistribution(0.1, 2.0),
        "train.batch_size=tag(int,interval(8,64))": IntDistribution(8, 64),
        "rc.sketch_seed=range(2,9,3)": IntDistribution(2, 8, step=3),
        "objective=dpo,simpo": CategoricalDistribution(["dpo", "simpo"]),
        "optim.weight_decay=choice(0,0.1)": CategoricalDistribution(["0", "0.1"]),
        "optim.momentum=shuffle(0,0.5,0.9)": CategoricalDistribution(["0", "0.5", "0.9"]),
        "probe.size=shuffle(range(0,9,4))": IntDistribution(0, 8, step=4),
        "optim.schedule=choice(linear,linear)": CategoricalDistribution(["linear"]),
        "engine=glob(zero?)": CategoricalDistribution(["zero0", "zero1", "zero2", "zero3"]),
    }
    with hydra_session() as hydra:
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        assert [space(override) for override in parser.parse_overrides(list(lines))] == list(lines.values())


@pytest.mark.slow
def test_a_search_finds_the_peak_and_goes_on_when_called_again(runs: Runs) -> None:
    runs.value = peak_at_a_thousandth
    space = "optim.lr=tag(log,interval(1e-5,1e-1))"
    assert sweep([*SEARCH, space, "sweep.trials=8"]) == 0
    assert len(study()["trials"]) == len(set(runs.started)) == 8
    first = list(runs.started)
    assert sweep([*SEARCH, space, "sweep.trials=16"]) == 0
    assert len(study()["trials"]) == 16 and runs.started[:8] == first
    # drawn afresh, not the first eight again
    assert len(set(runs.started)) == 16
    best = study()["best"]
    assert best["value"] == max(trial["value"] for trial in study()["trials"])
    assert best["value"] == pytest.approx(1 - abs(math.log10(best["params"]["optim.lr"]) + 3))
    # the best of sixteen uniform draws over four decades is further off than this in one of ten searches
    assert best["value"] > 0.75


def test_smaller_is_better_where_it_is_said(runs: Runs) -> None:
    runs.value = lambda config: {"eval/loss": config.objective.hyperparameters["beta"]}
    keys = ["objective.beta=0.1,0.5", "sweep.metric=eval/loss", "sweep.direction=minimize", "sweep.trials=6"]
    assert sweep([*SEARCH, *keys]) == 0
    assert study()["best"]["params"] == {"objective.beta": "0.1"}
    # the same values are the same run, and are not trained again
    assert sorted(runs.started) == ["objective.beta-0.1", "objective.beta-0.5"]


def test_failed_trials_count_and_say_why(runs: Runs) -> None:
    def value(config: RunConfig) -> dict[str, float] | Outcome:
        beta = config.objective.hyperparameters["beta"]
        return {METRIC: beta} if beta < 0.5 else Outcome(1, "RunError: too hot")

    runs.value = value
    assert sweep([*SEARCH, "objective.beta=interval(0.1,1)", "sweep.trials=6"]) == 1
    states = {trial["state"]: trial["reason"] for trial in study()["trials"]}
    assert states == {"complete": None, "fail": "RunError: too hot"}
    assert len(study()["trials"]) == 6


def test_a_metric_that_is_not_there_is_named(runs: Runs) -> None:
    assert sweep([*SEARCH, "objective.beta=0.1,0.5", "sweep.metric=eval/f1", "sweep.trials=1"]) != 0
    (trial,) = study()["trials"]
    assert trial["reason"] == f"evaluation.json has no eval/f1: it has {METRIC}"


def test_a_stopped_trial_is_taken_up_again_with_its_values(runs: Runs) -> None:
    runs.value = lambda config: Outcome(75, "stopped by a signal")
    assert sweep([*SEARCH, "objective.beta=interval(0.1,1)", "sweep.trials=3"]) == 75
    assert len(runs.started) == 1 and study()["trials"] == []
    runs.value = lambda config: {METRIC: 0.5}
    assert sweep([*SEARCH, "objective.beta=interval(0.1,1)", "sweep.trials=3"]) == 0
    assert runs.started[1] == runs.started[0] and len(study()["trials"]) == 3


def test_trials_behind_the_median_are_stopped(runs: Runs) -> None:
    values = iter([1.0, 0.8, 0.1, 0.95])
    runs.value = lambda config: {METRIC: next(values)}
    keys = ["sweep.pruner=median", "sweep.pruner_startup=2", "eval.every=1", "sweep.trials=4"]
    assert sweep([*SEARCH, *keys, "objective.beta=interval(0.1,1)"]) == 0
    states = [trial["state"] for trial in study()["trials"]]
    # step 1: 0.033 is below the median of 0.333 and 0.267, 0.317 is not
    assert states == ["complete", "complete", "pruned", "complete"]
    assert list(study()["trials"][2]["intermediate"]) == ["1"]
    incomplete = json.loads(Path("out", "sweep.json").read_text())["incomplete"]
    assert [run["reason"] for run in incomplete] == ["pruned after step 1"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "nothing to search"),
        (["seed=1,2"], "a search cannot vary seed"),
        (["objective.beta=0.1,1", "sweep.pruner=median"], "eval.every"),
        (["objective.beta=0.1,1", "hydra/launcher=submitit_slurm"], "leave hydra/launcher out"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments: list[str], part: str, runs: Runs) -> None:
    with pytest.raises(ConfigError, match=part):
        sweep([*SEARCH, *arguments])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("optim.lr=tag(log,interval(0,1e-3))", "above 0"),
        ("train.batch_size=tag(log,int,interval(0,64))", "above 0"),
        ("optim.lr=interval(1e-3,1e-5)", r"write interval\(1e-05,0\.001\)"),
        ("train.batch_size=tag(int,interval(8,64.5))", "whole"),
        ("optim.lr=interval(0,inf)", "finite"),
        ("optim.lr=interval(0,nan)", "finite"),
        ("rc.sketch_seed=range(5,2)", "no value"),
        ("optim.lr=glob(*)", "no value"),
        ("objective=glob(nothing*)", "no value"),
        ("optim.lr=range(0.1,1,0)", ""),
    ],
)
def test_what_is_not_a_space_is_refused_with_the_override(given: str, part: str, runs: Runs) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^{re.escape(given)} is not a space to search: .*{part}"):
        sweep([*SEARCH, given])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"sweep.metric": "eval/loss"}, f"metric: {METRIC} -> eval/loss"),
        ({"sweep.direction": "minimize"}, "direction: maximize -> minimize"),
        ({"objective.beta": "interval(0.1,2)"}, "space.objective.beta"),
        ({"objective.beta": "0.1,0.5"}, "space.objective.beta"),
        ({"train.max_steps": "7"}, "train.max_steps: 200 -> 7"),
        ({"eval.max_examples": "7"}, "eval.max_examples: None -> 7"),
    ],
)
def test_a_continued_search_keeps_its_metric_direction_space_and_settings(
    changed: dict[str, str], line: str, runs: Runs
) -> None:
    runs.value = lambda config: {METRIC: 0.5, "eval/loss": 0.1}
    keys = {"objective.beta": "interval(0.1,1)", "sweep.trials": "2"}
    assert sweep([*SEARCH, *(f"{key}={value}" for key, value in keys.items())]) == 0
    before = Path("out", "optuna.journal").read_bytes()
    with pytest.raises(ConfigError, match=rf"(?s)holds another search.*{re.escape(line)}"):
        sweep([*SEARCH, *(f"{key}={value}" for key, value in (keys | changed).items())])
    assert len(runs.started) == 2 and Path("out", "optuna.journal").read_bytes() == before
    more = ["sweep.trials=3", "sweep.pruner_startup=1", "wandb.mode=disabled", "sweep.sampler_seed=4"]
    assert sweep([*SEARCH, "objective.beta=interval(0.1,1)", *more]) == 0
    assert len(runs.started) == 3


@pytest.mark.parametrize("content", ["not a journal\n", '{"op_code": 0}\n', "[]\n"])
def test_a_journal_that_cannot_be_read_is_named(content: str, runs: Runs) -> None:
    Path("out").mkdir()
    Path("out", "optuna.journal").write_text(content)
    with pytest.raises(ConfigError, match=r"optuna\.journal cannot be read as the journal"):
        sweep([*SEARCH, "objective.beta=interval(0.1,1)"])


def test_optuna_that_is_not_installed_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcpo\[sweep\]'"):
        sweep([*SEARCH, "objective.beta=0.1,1"])


def test_a_space_without_a_search_is_refused(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr=interval.* add sweep\.search=optuna"):
        sweep(["optim.lr=interval(1e-5,1e-3)", "hydra.sweep.dir=out"])
    assert not Path("out").exists()


def test_nothing_loads_optuna_for_a_grid() -> None:
    import subprocess

    program = "import sys, rcpo.commands; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert PRIMARY == "config"
