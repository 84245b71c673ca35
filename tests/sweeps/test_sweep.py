"""`rcpo sweep`: which runs start, what is said of those that fail, and what the table holds."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from imitation import Runs
from tiny import sums_file

from rcpo import commands as jobs
from rcpo.commands.evaluate import evaluate
from rcpo.commands.sweep import sweep
from rcpo.commands.train import train
from rcpo.config.composition import compose
from rcpo.config.parsing import load_run_config, parse
from rcpo.config.paths import conf_dir
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import Outcome, read_outcome
from rcpo.method.objectives import get_objective
from rcpo.runs.inputs import PAIRS, TASKS, write_evaluation_settings
from rcpo.sweeps import multirun
from rcpo.sweeps.naming import run_name

HERE = "hydra.sweep.dir=out"
HASH = hashlib.sha256(b'[["model.path", "/a b/c"]]').hexdigest()[:8]


def by_seed_and_calibration(config: RunConfig) -> dict[str, float]:
    """0.5 for the first seed, 0.1 more for each next; calibration adds 0.1, 0.2, 0.3."""
    accuracy = 0.4 + 0.1 * config.seed + (0.1 * config.seed if config.rc.enabled else 0.0)
    return {"eval/rewards/accuracies": accuracy, "eval/rewards/accuracies/low": 0.0}


def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path("out", "sweep.json").read_text())
    return loaded


def test_means_and_paired_differences_of_a_sweep(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.value = by_seed_and_calibration
    assert sweep(["rc=off,on", "seed=1,2,3", HERE]) == 0
    assert runs.started == [f"rc-{rc}_seed-{seed}" for rc in ("off", "on") for seed in (1, 2, 3)]
    found = record()
    key = "eval/rewards/accuracies"
    off, on = found["conditions"]
    assert (off["label"], off["seeds"]) == ("dpo rc=off", [1, 2, 3])
    # off: 0.5, 0.6, 0.7; on: 0.6, 0.8, 1.0; differences 0.1, 0.2, 0.3, t(2) = 4.302653
    assert off["means"][key] == pytest.approx({"mean": 0.6, "deviation": 0.1, "count": 3})
    assert on["means"][key] == pytest.approx({"mean": 0.8, "deviation": 0.2, "count": 3})
    half = 4.302653 * 0.1 / math.sqrt(3)
    (contrast,) = found["contrasts"]
    expected = {"mean": 0.2, "low": 0.2 - half, "high": 0.2 + half, "count": 3}
    assert contrast["differences"][key] == pytest.approx(expected, rel=1e-6)
    assert found["winners"] == {key: "dpo rc=on"}
    assert [run["values"][key] for run in found["runs"]] == pytest.approx([0.5, 0.6, 0.7, 0.6, 0.8, 1.0])
    assert not any(name.endswith("/low") for run in found["runs"] for name in run["values"])
    said = capsys.readouterr().out
    assert "80 % ± 20" in said and "+20.0 points" in said
    text = Path("out", "sweep.md").read_text()
    assert "| dpo rc=on | 3 | **80 % ± 20** |" in text
    assert "| dpo | 3 | +20.0 points [−4.8, +44.8] |" in text


def test_a_clear_difference_is_marked(runs: Runs) -> None:
    runs.value = lambda config: {"eval/winner_fell": 0.5 - 0.3 * config.rc.enabled + 0.001 * config.seed}
    sweep(["rc=off,on", "seed=1,2", HERE])
    text = Path("out", "sweep.md").read_text()
    assert "| dpo | 2 | **−30.0 points [−30.0, −30.0]** |" in text
    # fewer pairs whose winner fell is better
    assert record()["winners"] == {"eval/winner_fell": "dpo rc=on"}


def test_the_runs_that_did_not_diverge_make_no_best_condition(runs: Runs) -> None:
    """Of three rates the highest has the best seed, and one that ended without a finite accuracy."""

    def accuracy(config: RunConfig) -> dict[str, float]:
        if config.optim.lr == 0.25:
            return {"eval/rewards/accuracies": 0.9} if config.seed == 1 else {}
        return {"eval/rewards/accuracies": 0.5 + config.optim.lr}

    runs.value = accuracy
    sweep(["optim.lr=0.0625,0.125,0.25", "seed=1,2", HERE])
    assert record()["winners"] == {"eval/rewards/accuracies": "dpo optim.lr=0.125"}
    text = Path("out", "sweep.md").read_text()
    assert "| dpo optim.lr=0.125 | 2 | **62 % ± 0** |" in text
    assert "| dpo optim.lr=0.25 | 2 | 90 % (1 of 2) |" in text


def test_a_sweep_over_several_objectives_ends_with_their_medians(runs: Runs) -> None:
    value = {"dpo": 0.5, "simpo": 0.7, "cpo": 0.6}
    runs.value = lambda config: {
        "eval/exact_match": value[config.objective.name] + 0.1 * config.rc.enabled * (-1) ** config.seed
    }
    sweep(["objective=dpo,simpo,cpo", "rc=off,on", "seed=1,3", HERE])
    text = Path("out", "sweep.md").read_text()
    assert "| exact match | 60 % | 50 % | −10.0 points | 0 (0) | 3 (3) |" in text
    assert record()["overall"]["eval/exact_match"]["difference"] == pytest.approx(-0.1)


def test_calling_again_runs_only_what_is_missing(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    failing = Outcome(1, "RunError: the disk is full")
    runs.value = lambda config: failing if config.seed == 2 else by_seed_and_calibration(config)
    assert sweep(["rc=off,on", "seed=1,2", HERE]) == 1
    assert len(runs.started) == 4
    assert record()["incomplete"] == [
        {"name": f"rc-{rc}_seed-2", "code": 1, "reason": failing.reason} for rc in ("off", "on")
    ]
    assert "| rc-on_seed-2 | 1 | RunError: the disk is full |" in Path("out", "sweep.md").read_text()
    assert "rc-off_seed-2: exit code 1: RunError: the disk is full" in capsys.readouterr().err
    runs.started.clear()
    runs.value = by_seed_and_calibration
    assert sweep(["rc=off,on", "seed=1,2,3", HERE]) == 0
    assert runs.started == ["rc-off_seed-2", "rc-off_seed-3", "rc-on_seed-2", "rc-on_seed-3"]
    assert record()["incomplete"] == [] and len(record()["runs"]) == 6


def test_other_settings_in_the_same_folder_are_refused_by_name(runs: Runs) -> None:
    sweep(["seed=1,2", HERE])
    assert sweep(["seed=1,2", "optim.lr=1e-3", HERE]) == 2
    assert runs.started == ["seed-1", "seed-2"]
    outcome = read_outcome(Path("out/seed-1"))
    assert outcome is not None and "optim.lr: 0.0001 -> 0.001" in str(outcome.reason)


def test_a_refused_run_is_in_the_table_and_the_rest_goes_on(runs: Runs) -> None:
    assert sweep(["objective.beta=0,0.5", HERE]) == 1
    assert runs.started == ["objective.beta-0.5"]
    (refused,) = record()["incomplete"]
    assert refused["code"] == 2 and "objective.beta=0 is out of range" in refused["reason"]


def test_a_named_sweep_s_own_keys_give_way_to_the_command_line(runs: Runs) -> None:
    assert sweep(["study=ema", "objective=ipo", "rc.ema=0.5,0.9", "seed=7", HERE]) == 0
    # named by the study's keys, so that every call into its folder names a run alike
    assert runs.started == [f"objective-ipo_rc.ema-{ema}_seed-7" for ema in (0.5, 0.9)]
    labels = [condition["label"] for condition in record()["conditions"]]
    assert labels == ["ipo rc.ema=0.5", "ipo rc.ema=0.9"]


def test_a_key_that_some_runs_lack_is_refused(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"^objective\.beta: not every run of this sweep has that key"):
        sweep(["objective=dpo,bce", "objective.beta=0.1", HERE])
    assert runs.started == []


def hyperparameters(objective: str) -> set[str]:
    return set(parse(compose([f"objective={objective}"])).objective.hyperparameters)


def chosen_settings(study: str, objective: str) -> set[str]:
    """What a study's table says of an objective; its run has those values."""
    from rcpo.config.composition import PRIMARY, compose_with, hydra_session, user_part

    with hydra_session() as hydra:
        elsewhere = ["data.path=owner/pairs", "data.eval_path=owner/pairs"] if study == "hh" else []
        cfg = compose_with(hydra, PRIMARY, [f"study={study}", f"objective={objective}", *elsewhere])
    config = parse(user_part(cfg), files=False)
    table = cfg.sweep.settings[f"{config.objective.name}_{config.objective.reduction}"]
    assert {"lr": config.optim.lr, **config.objective.hyperparameters}.items() >= dict(table).items()
    return set(table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "count"),
    [
        ("ema", 2 * 4 * 3),
        ("objectives", 31 * 2 * 3),
        ("seeds", 20),
        ("sums_grid", 17 * 2 * 2),
        ("sums", 26 * 2 * 3),
        ("hh_grid", 6 * 2 * 2),
        ("hh", 10 * 2 * 3),
        ("calibration", 2 * 2 * 3),
        ("hh_rules", 2 * 4 * 3),
    ],
)
def test_named_sweeps_have_all_their_runs(study: str, count: int, runs: Runs) -> None:
    from rcpo.commands.sweep import parsed
    from rcpo.config.composition import PRIMARY, hydra_session
    from rcpo.sweeps.multirun import compose_many
    from rcpo.sweeps.settings import sweep_config

    with hydra_session() as hydra:
        cfg = compose_many(hydra, PRIMARY, [f"study={study}"])
        sweeps = [o for o in parsed(hydra, PRIMARY, cfg, []).values() if o.is_sweep_override()]
    assert sweep_config(cfg).search == "grid"
    values = {o.get_key_element(): list(o.sweep_string_iterator()) for o in sweeps}
    assert math.prod(map(len, values.values())) == count
    known = {file.stem for file in (conf_dir() / "objective").glob("*.yaml")} - {"sft"}
    assert set(values.get("objective", known)) <= known
    if study == "objectives":  # the embedded pairs have neither scores nor gold answers
        specs = {name: get_objective(name).spec for name in known - {"dpo_mean", "mix"}}
        other = {name for name, spec in specs.items() if spec.needs_margins or spec.needs_gold}
        assert set(values["objective"]) | {"dpo_mean"} | other == known
    for objective in values["objective"] if study in ("sums", "hh") else ():
        assert chosen_settings(study, objective) == {"lr", *({"beta", "tau"} & hyperparameters(objective))}


def test_two_at_a_time(runs: Runs) -> None:
    assert sweep(["seed=1,2,3", "sweep.parallel=2", HERE]) == 0
    assert sorted(runs.started) == ["seed-1", "seed-2", "seed-3"]


def test_a_finished_sweep_is_compared_again_without_a_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    train(["-m", "seed=1,2", HERE])
    runs.started.clear()
    assert sweep(["compare=out"]) == 0
    assert runs.started == [] and "2 complete runs" in capsys.readouterr().out
    for arguments, part in (
        (["compare=nowhere"], "holds no runs"),
        (["compare=out", "seed=1"], "takes no other argument"),
    ):
        with pytest.raises(ConfigError, match=part):
            sweep(arguments)


def test_keys_of_a_sweep_are_refused_where_nothing_reads_them(runs: Runs) -> None:
    for arguments in (["sweep.parallel=2"], ["study=ema"], ["study=ema", "-m", "seed=1,2"]):
        with pytest.raises(ConfigError, match="is read by rcpo sweep"):
            train(arguments)
    with pytest.raises(ConfigError, match="is read by rcpo sweep"):
        evaluate(["sweep.trials=2"])
    with pytest.raises(ConfigError, match="did you mean ema"):
        sweep(["study=emas"])
    with pytest.raises(ConfigError, match=r"did you mean sweep\.parallel\?"):
        sweep(["sweep.paralel=2"])


def test_names_of_runs() -> None:
    assert run_name({"objective": "dpo", "rc.ema": "0.9"}) == "objective-dpo_rc.ema-0.9"
    assert run_name({}) == "run"
    # sha256 of [["model.path", "/a b/c"]]
    assert run_name({"model.path": "/a b/c"}) == "model.path--a-b-c-" + HASH


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data.path": "x/a.jsonl"}, {"data.path": "x-a.jsonl"}),
        ({"data.path": "a"}, {"data.path": "a-"}),
        ({"x": "1_y-2", "y": "3"}, {"x": "1", "y": "2_y-3"}),
        ({"data.path": "ä" * 300 + "a"}, {"data.path": "ä" * 300 + "b"}),
        ({"data.path": "'a'"}, {"data.path": "a"}),
    ],
)
def test_other_values_have_another_name_that_any_file_system_takes(
    one: dict[str, str], other: dict[str, str]
) -> None:
    names = [run_name(one), run_name(other)]
    assert names[0] != names[1] and names[0] == run_name(one)
    assert all(len(name.encode()) < 200 and "/" not in name for name in names)


def test_paths_that_differ_by_punctuation_have_folders_of_their_own(runs: Runs) -> None:
    for name in ("x/a.jsonl", "x-a.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        sums_file(Path(name), 20)
    assert sweep(["data=pairs", "data.path=x/a.jsonl,x-a.jsonl", "train.batch_size=16", HERE]) == 0
    assert len(set(runs.started)) == 2 and len(list(Path("out").glob("data.path-*"))) == 2


@pytest.mark.parametrize("command", [sweep, lambda arguments: train(["-m", *arguments])])
@pytest.mark.parametrize(
    "keys", [["seed=1,1"], ["seed=1,2", "hydra.sweep.subdir=same"], ["rc=on,true", "hydra.sweep.subdir=r"]]
)
def test_two_runs_with_one_folder_are_refused_before_anything_runs(
    runs: Runs, command: Callable[[list[str]], int], keys: list[str]
) -> None:
    if command is not sweep and "hydra" not in keys[-1]:
        pytest.skip("train -m numbers its runs' folders")
    with pytest.raises(ConfigError, match="two runs of this sweep have the same folder"):
        command([*keys, HERE])
    assert runs.started == [] and not Path("out").exists()


def test_data_that_changed_are_no_complete_run(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["data=pairs", "data.path=pairs.jsonl", "train.batch_size=16", "seed=1,2", HERE]
    sums_file(Path("pairs.jsonl"), 20)
    assert sweep(keys) == 0 and len(runs.started) == 2
    assert sweep(keys) == 0 and len(runs.started) == 2
    sums_file(Path("pairs.jsonl"), 21)
    assert sweep(keys) == 2
    outcome = read_outcome(Path("out/seed-1"))
    assert outcome is not None and "the training data (by content)" in str(outcome.reason)
    assert "complete before" not in capsys.readouterr().out.rpartition("seed-2: complete before")[2]


def test_another_evaluation_is_made_again_and_not_taken_for_complete(runs: Runs) -> None:
    assert sweep(["seed=1,2", HERE]) == 0
    assert sweep(["seed=1,2", "eval.max_examples=8", HERE]) == 0
    assert runs.started == ["seed-1", "seed-2"] * 2


def test_runs_that_were_benchmarked_since_are_complete(runs: Runs) -> None:
    """`rcpo evaluate run=DIR eval.tasks=[gsm8k]` records its settings; the sweep's own evaluation stands."""
    assert sweep(["seed=1,2", HERE]) == 0
    for folder in map(Path, ("out/seed-1", "out/seed-2")):
        config = load_run_config(folder)
        config.eval.tasks, config.eval.limit = ["gsm8k"], 5
        (folder / "evaluation").mkdir(exist_ok=True)
        write_evaluation_settings(folder, config, PAIRS)
        write_evaluation_settings(folder, config, TASKS)
    assert sweep(["seed=1,2", HERE]) == 0
    assert runs.started == ["seed-1", "seed-2"]


def test_a_folder_that_cannot_be_written_to_is_compared_all_the_same(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(["seed=1,2", HERE]) == 0
    capsys.readouterr()

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "out/sweep.json")

    monkeypatch.setattr("rcpo.sweeps.summary.write_atomically", read_only)
    with pytest.raises(OSError, match="Read-only"):
        sweep(["compare=out"])
    assert "preference accuracy" in " ".join(capsys.readouterr().out.split())


def test_a_run_whose_configuration_cannot_be_written_ends_no_other(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = multirun.save_run_config

    def full(config: RunConfig, path: Path) -> None:
        if config.seed == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(config, path)

    monkeypatch.setattr(multirun, "save_run_config", full)
    assert sweep(["seed=1,2,3", HERE]) == 1
    assert runs.started == ["seed-1", "seed-3"]
    assert "seed-2: exit code 1: " in (said := capsys.readouterr().err) and "No space left" in said


def test_a_damaged_run_does_not_cost_the_others_their_table(runs: Runs) -> None:
    assert sweep(["seed=1,2,3", HERE]) == 0
    Path("out/seed-1/finished.json").write_text("{")
    Path("out/seed-2/config.yaml").write_text("a: [")
    assert sweep(["compare=out"]) == 0
    found = record()
    assert [run["name"] for run in found["runs"]] == ["seed-3"]
    reasons = {each["name"]: each["reason"] for each in found["incomplete"]}
    assert (
        "finished.json is damaged" in reasons["seed-1"] and "config.yaml cannot be read" in reasons["seed-2"]
    )


def test_a_sweep_s_folder_that_is_a_file_is_refused(runs: Runs) -> None:
    Path("out").write_text("a file")
    for command in (sweep, lambda arguments: train(["-m", *arguments])):
        with pytest.raises(ConfigError, match=r"out.*cannot be a folder.*hydra\.sweep\.dir"):
            command(["seed=1,2", HERE])
    with pytest.raises(ConfigError, match="not a folder"):
        sweep(["compare=out"])


def test_a_summary_needs_no_torch() -> None:
    program = "import sys, rcpo.sweeps.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.slow
def test_a_real_sweep_with_a_failing_run_called_twice(tmp_path: Path) -> None:
    keys = ["objective=sft", "model.init=random", "train.max_steps=2", "train.batch_size=4"]
    keys += ["train.micro_batch_size=4", "reference.track=false", "eval.max_examples=4"]
    keys += ["eval.generate_examples=0", "wandb.mode=disabled", "sweep.parallel=2", "hydra.sweep.dir=out"]
    command = [sys.executable, "-m", "rcpo.cli", "sweep", "optim.lr=1e-4,1e38", *keys]
    environment = {**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[2])}
    first = forked.run(command, cwd=tmp_path, env=environment)
    assert first.returncode == 1, first.stderr
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["optim.lr-0.0001"]
    (failed,) = found["incomplete"]
    assert failed["name"] == "optim.lr-1e+38" and failed["code"] == 1 and "finite" in failed["reason"]
    assert (tmp_path / "out" / "optim.lr-1e+38" / "console.log").is_file()
    complete = tmp_path / "out" / "optim.lr-0.0001" / "finished.json"
    before = complete.stat().st_mtime_ns
    second = forked.run(command, cwd=tmp_path, env=environment)
    assert second.returncode == 1 and complete.stat().st_mtime_ns == before
    assert "optim.lr-0.0001: complete before" in second.stdout


def test_settings_of_another_launcher_do_not_stop_the_planning(runs: Runs) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="submitit is not installed: pip install 'rcpo[slurm]'"
    )
    from rcpo.config.composition import PRIMARY, hydra_session
    from rcpo.sweeps.multirun import _first_pass, _flatten, compose_many

    given = ["seed=1,2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=15", HERE]
    with hydra_session() as hydra:
        cfg = compose_many(hydra, PRIMARY, given)
        planned = list(_flatten(_first_pass(hydra, PRIMARY, [*given, "hydra.mode=MULTIRUN"], cfg)))
    assert [each.overrides for each in planned] == ["seed=1", "seed=2"]
