"""Run folders are found and read, however far the run came."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from report_folders import evaluation, rows, settings, write_run

from rcpo.commands import report as command
from rcpo.config.paths import conf_dir
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import Outcome
from rcpo.report import panels
from rcpo.report.figures import new_figure
from rcpo.report.runs import Status, find_runs, read_run, read_runs
from rcpo.report.words import headline_of_run, warnings_of_run
from rcpo.runs.folder import is_sweeping, sweeping


def test_runs_are_found_at_any_depth_and_counted_naturally(tmp_path: Path) -> None:
    for name in ("sweep/10_b", "sweep/9_a", "sweep/lr=1/seed=1"):
        write_run(tmp_path / name, settings(), [])
    wandb = tmp_path / "sweep/9_a/wandb/run/files"
    wandb.mkdir(parents=True)
    (wandb / "config.yaml").write_text("{}")  # wandb's own, inside a run
    found = find_runs(tmp_path / "sweep")
    assert [str(path.relative_to(tmp_path / "sweep")) for path in found] == ["9_a", "10_b", "lr=1/seed=1"]
    assert find_runs(tmp_path / "sweep/9_a") == [tmp_path / "sweep/9_a"]


def test_names_are_as_long_as_they_need_to_be(tmp_path: Path) -> None:
    for name in ("one/seed=1", "two/seed=1"):
        write_run(tmp_path / name, settings(), [])
    runs = read_runs([tmp_path / "one", tmp_path / "two", tmp_path / "one/seed=1"])  # given twice, read once
    assert [run.name for run in runs] == ["one/seed=1", "two/seed=1"]


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run in .*config\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="is not a folder"):
        read_runs([tmp_path / "nowhere"])


def test_columns_hold_nan_where_a_value_is_null_or_absent(tmp_path: Path) -> None:
    metrics = [
        {"step": 0, "eval/loss": 0.5},  # an evaluation's own row is not a trained step
        {"step": 1, "loss": 0.7, "dynamics/in_band": True},
        {"step": 2, "loss": None, "nonfinite": 1, "eval/loss": 0.25},
    ]
    run = read_run(write_run(tmp_path / "run", settings(), metrics), "run")
    assert run.steps.tolist() == [1, 2]
    np.testing.assert_array_equal(run.column("loss"), [0.7, np.nan])
    np.testing.assert_array_equal(run.column("dynamics/in_band"), [1.0, np.nan])
    steps, values = run.held_out("loss")
    assert (steps.tolist(), values.tolist()) == ([0, 2], [0.5, 0.25])
    (run.folder / "evaluation").mkdir()
    later = [{"step": 1, "eval/loss": 0.375}, {"step": 2, "eval/loss": 0.125}, {"step": 0, "eval/kl": 0.1}]
    (run.folder / "evaluation/checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in later))
    steps, values = read_run(run.folder, "run").held_out("loss")
    assert (steps.tolist(), values.tolist()) == ([0, 1, 2], [0.5, 0.375, 0.125])
    assert run.has("loss") and not run.has("rc/alpha")


def test_figures_on_the_way_are_not_those_of_the_end(tmp_path: Path) -> None:
    """The evaluation after step 10 is in evaluation.json; training went on to step 20 of 40."""
    metrics = rows(20)
    metrics[9] |= {"eval/logratios/chosen": -0.25}
    early = evaluation(-0.25, -0.5) | {"eval/harness/arc/acc": 0.3}
    tree = settings(train__max_steps=40)
    run = read_run(write_run(tmp_path / "run", tree, metrics, early, finished=False), "run")
    assert (run.status, run.evaluation["eval/logratios/chosen"]) == (Status.ENDED, -0.25)
    assert "The held-out figures are those after step 10 of 40." in " ".join(warnings_of_run(run))
    (axes,) = new_figure(3).subplots(1, 1, squeeze=False)[0]
    panels.sides(axes, [run], 1)
    diamonds = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [[10.0], []]  # not at step 20
    # trained to its end, and killed in the evaluation there
    unevaluated = json.dumps({"step": 20, "evaluated": False})
    (run.folder / "finished.json").write_text(unevaluated)
    run = read_run(run.folder, "run")
    assert (run.status, run.evaluation) == (Status.FINISHED, {"eval/harness/arc/acc": 0.3})
    assert headline_of_run(run).startswith("Finished after 20 steps, not evaluated")
    # killed after it, when best/ was written
    metrics[19] |= {"eval/logratios/chosen": -0.25}
    other = write_run(tmp_path / "other", tree, metrics, early)
    (other / "finished.json").write_text(unevaluated)
    assert read_run(other, "other").evaluation["eval/logratios/chosen"] == -0.25


def test_planned_steps_come_from_the_limit_or_the_pace(tmp_path: Path) -> None:
    half = [{"step": step, "loss": 0.1, "epoch": step / 40} for step in range(1, 11)]
    paced = read_run(write_run(tmp_path / "a", settings(), half), "a")
    assert paced.planned_steps == 40  # ten steps took a quarter of one epoch
    limited = read_run(write_run(tmp_path / "b", settings(train__max_steps=25), half), "b")
    assert limited.planned_steps == 25
    assert read_run(write_run(tmp_path / "c", settings(), []), "c").planned_steps is None


def test_status_tells_finished_running_and_ended(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", settings(), rows(2))
    cut = write_run(tmp_path / "cut", settings(), rows(2), finished=False)
    assert read_run(done, "done").status is Status.FINISHED
    assert read_run(cut, "cut").status is Status.ENDED
    with (cut / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(cut, "cut").status is Status.RUNNING
    assert read_run(cut, "cut").status is Status.ENDED
    assert (cut / ".lock").read_text() == ""  # looking leaves the lock as it was


def test_a_run_that_was_just_configured_is_starting_until_its_log_says_otherwise(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings(), [], finished=False)
    assert read_run(folder, "run").status is Status.RUNNING
    (folder / "rcpo.log").write_text("Traceback\nImportError: no module\n")
    assert read_run(folder, "run").status is Status.ENDED
    (folder / "rcpo.log").unlink()
    os.utime(folder / "config.yaml", (0, 0))
    assert read_run(folder, "run").status is Status.ENDED


def test_a_snapshot_of_the_code_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(), rows(2))
    shutil.copytree(conf_dir(), tmp_path / "code" / "conf")
    (tmp_path / "code" / "rcpo").mkdir()
    (tmp_path / "code" / "rcpo" / "__init__.py").touch()
    shutil.copytree(conf_dir(), tmp_path / "elsewhere" / "conf")  # a checkout of somebody's
    assert find_runs(tmp_path) == [run]
    assert find_runs(tmp_path / "elsewhere" / "conf") == []


def test_a_run_that_waits_is_queued_however_long(tmp_path: Path) -> None:
    alone, task = tmp_path / "alone", tmp_path / "many" / "seed-1"
    for folder in (alone, task):
        write_run(folder, settings(), [], finished=False)
        os.utime(folder / "config.yaml", (0, 0))
        assert read_run(folder, "run").status is Status.ENDED
    (alone / "job-train.json").write_text("{}")
    (task.parent / "job-sweep.json").write_text(json.dumps({"runs": [str(task)]}))
    for folder in (alone, task):
        assert read_run(folder, "run").status is Status.QUEUED
        (folder / ".lock").touch()  # it began, and nobody holds it any more
        assert read_run(folder, "run").status is Status.ENDED


def test_a_run_of_a_sweep_under_way_is_queued(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "seed-1", settings(), [], finished=False)
    os.utime(folder / "config.yaml", (0, 0))
    with sweeping(tmp_path):
        assert read_run(folder, "run").status is Status.QUEUED
        with sweeping(tmp_path):  # two calls may fill one folder
            assert read_run(folder, "run").status is Status.QUEUED
    assert read_run(folder, "run").status is Status.ENDED


def test_a_sweep_under_way_is_seen_on_nfs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def of_nfs(file: IO[str], operation: int) -> None:
        """Locks of ranges of bytes stand behind it, which depend on how the file is open."""
        wanted = file.writable() if operation & fcntl.LOCK_EX else file.readable()
        if not wanted:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    assert not is_sweeping(tmp_path)
    with sweeping(tmp_path):
        assert is_sweeping(tmp_path)
    assert not is_sweeping(tmp_path)


def test_a_sweep_that_one_may_only_read_is_seen_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, mode: str = "r", encoding: str | None = None) -> IO[str]:
        if mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, encoding=encoding)

    with sweeping(tmp_path):
        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setattr(Path, "open", read_only)
        assert is_sweeping(tmp_path)


def test_watching_goes_on_while_a_run_waits(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", settings(), rows(2))
    queued = write_run(tmp_path / "queued", settings(), [], finished=False)
    (queued / "job-train.json").write_text("{}")
    runs = [read_run(folder, folder.name) for folder in (done, queued)]
    assert not command._is_over([tmp_path], runs, calm=True)
    assert command._is_over([tmp_path], runs[:1], calm=True)


def test_a_model_that_was_only_evaluated_is_no_failure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings(), [], {"eval/loss": 0.5}, finished=False)
    assert read_run(folder, "run").status is Status.EVALUATED


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("Traceback\n  File x\nrcpo.config.schema.RunError: step 2 is lost\n", "step 2 is lost"),
        ("Traceback\n  File x\nrcpo.nonfinite.NonFinite: step 3 is not a number\n", "step 3 is not a number"),
        ("[2026][rcpo][INFO] - refused: optim.lr=-1 is below 0\n", "optim.lr=-1 is below 0"),
        ("Traceback\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("all is well\n", None),
    ],
)
def test_the_log_says_why_a_run_ended(tmp_path: Path, log: str, expected: str | None) -> None:
    folder = write_run(tmp_path / "run", settings(), rows(2), finished=False)
    (folder / "rcpo.log").write_text(log)
    assert read_run(folder, "run").error == expected


def test_who_waited_for_a_run_knows_how_it_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings(), rows(2), finished=False)
    (folder / "rcpo.log").write_text("Traceback\nRuntimeError: of an earlier try\n")
    Outcome(1, "ended by SIGKILL").write(folder)
    assert read_run(folder, "run").error == "ended by SIGKILL"


def test_torn_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings(), rows(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')
    (folder / "config.yaml").write_text("a: [")
    (folder / "evaluation.json").write_text("{")
    (folder / "environment.json").unlink()
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1}) + "\n[1]\n{")
    run = read_run(folder, "run")
    assert (run.last_step, run.evaluation, run.environment, run.samples) == (2, {}, {}, [{"step": 1}])
    assert run.settings == {} and run.status is Status.FINISHED
    (folder / "finished.json").unlink()
    assert "config.yaml cannot be read" in str(read_run(folder, "run").error)
