"""Trackers read back by their own tools, over a resume; one that fails costs a warning and nothing else."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rcpo.config.composition import compose
from rcpo.config.parsing import parse
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.runs import backends
from rcpo.runs.backends import active, check_installed
from rcpo.runs.naming import group_of, name_of
from rcpo.runs.tracker import Tracker


def config(*names: str) -> RunConfig:
    return RunConfig(seed=7, tracking=list(names))


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_twice(run_dir: Path, settings: RunConfig) -> None:
    """Steps 1 to 3, killed; then again from step 2, to the end at step 4."""
    tracker = Tracker(run_dir, settings, 4, True, console=plain())
    tracker.log({"step": 1, "loss": 0.5, "rewards/chosen": -0.25, "rc/in_band": True, "rc/alpha": None})
    tracker.log({"step": 2, "loss": math.nan})
    tracker.samples(2, [{"prompt": "1+1=", "text": "2|3"}])
    tracker.log({"step": 3, "loss": 0.375})
    tracker.close(1)
    with Tracker(run_dir, settings, 4, True, resume_step=2, console=plain()) as tracker:
        tracker.log({"step": 3, "loss": 0.375})
        tracker.evaluation(4, {"eval/rewards/accuracies": 0.75})
        tracker.log({"step": 4, "loss": 0.25})
        tracker.warning("the winner falls")


EXPECTED = {
    "loss": [(1, 0.5), (3, 0.375), (4, 0.25)],  # step 2 was not finite: a gap, as null in metrics.jsonl
    "rewards/chosen": [(1, -0.25)],
    "rc/in_band": [(1, 1.0)],
    "nonfinite": [(2, 1.0)],
    "eval/rewards/accuracies": [(4, 0.75)],
}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_twice(tmp_path, config("tensorboard"))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    assert {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags} == EXPECTED
    assert {"config/text_summary", "samples/text_summary", "warnings/text_summary"} <= set(
        found.Tags()["tensors"]
    )
    with Tracker(tmp_path, config("tensorboard"), 1, True, console=plain()) as tracker:
        tracker.log({"step": 1, "loss": 9.0})  # a fresh run in the folder
    again = EventAccumulator(str(tmp_path / "tensorboard"))
    again.Reload()
    assert [(e.step, e.value) for e in again.Scalars("loss")] == [(1, 9.0)]


def test_mlflow_has_one_run_with_each_step_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # mlflow's artifacts go to mlruns/ where it runs
    from mlflow import MlflowClient

    settings = config("mlflow")
    settings.mlflow.uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_twice(tmp_path / "run", settings)
    client = MlflowClient(settings.mlflow.uri)
    experiment = client.get_experiment_by_name("rcpo")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["seed"] == "7" and run.data.params["train.batch_size"] == "32"
    assert run.data.tags["rcpo.warning"] == "the winner falls"
    history = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    assert history == EXPECTED


def test_trackio_has_one_run_with_each_step_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = pytest.importorskip("trackio", minversion="0.20")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    run_twice(tmp_path / "run", config("trackio"))
    [name] = SQLiteStorage.get_runs("rcpo")
    assert name.startswith("run ")
    found: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("rcpo", name):
        for key in set(row) - {"step", "timestamp"}:
            found.setdefault(key, []).append((row["step"], float(row[key])))
    assert found == EXPECTED


class Failing:
    """A tracker whose server is gone from the second row on."""

    seen = -1

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, row: Any) -> None:
        self.calls.append(f"log {row['step']}")
        if row["step"] == 2:
            raise ConnectionError("the server is gone\nfor good")

    def alert(self, text: str) -> None:
        self.calls.append(text)

    def flush(self) -> None:
        pass

    def table(self, step: int, rows: Any) -> None:
        pass

    def close(self, exit_code: int) -> None:
        raise OSError("disk full")


def test_a_tracker_that_fails_is_left_out_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, console = Failing(), plain()
    monkeypatch.setattr(backends, "_open", lambda *arguments: failing)
    with Tracker(tmp_path, config("mlflow"), 3, True, console=console) as tracker:
        for step in (1, 2, 3):
            tracker.log({"step": step, "loss": 0.5})
        tracker.warning("more")
    assert failing.calls == ["log 1", "log 2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    text = text_of(console)
    assert text.count("tracking=mlflow failed") == 1
    assert "(ConnectionError: the server is gone); training continues without it" in text


def test_a_step_that_a_tracker_has_does_not_reach_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = Failing()
    behind.seen = 2
    monkeypatch.setattr(backends, "_open", lambda *arguments: behind)
    with Tracker(tmp_path, config("mlflow"), 3, True, console=plain()) as tracker:
        for step in (1, 2, 3):
            tracker.log({"step": step})
    assert behind.calls == ["log 3"]


def test_a_tracker_that_fails_at_the_end_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = plain()
    monkeypatch.setattr(backends, "_open", lambda *arguments: Failing())
    with Tracker(tmp_path, config("trackio"), 3, True, console=console) as tracker:
        tracker.log({"step": 1, "loss": 0.5})
    assert "tracking=trackio failed (OSError: disk full)" in text_of(console)


def test_a_tracker_that_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise ValueError("no such host")

    monkeypatch.setattr(backends, "_open", refuse)
    with pytest.raises(ConfigError, match=r"tracking=mlflow could not start \(ValueError: no such host\)"):
        Tracker(tmp_path, config("mlflow"), 3, True, console=plain())


def test_one_name_or_a_list_of_trackers() -> None:
    def tracked(value: str) -> list[str]:
        return parse(compose([f"tracking={value}"])).tracking

    assert tracked("tensorboard") == ["tensorboard"] and tracked("[wandb,mlflow]") == ["wandb", "mlflow"]
    assert active(parse(compose(["tracking=none"]))) == []
    assert active(parse(compose([]))) == ["wandb"]
    assert active(parse(compose(["wandb.mode=disabled", "tracking=[wandb,mlflow,mlflow]"]))) == ["mlflow"]
    with pytest.raises(ConfigError, match=r"tracking\[0\]=tensorbord is not one of .* mean tensorboard\?"):
        tracked("tensorbord")


def test_a_password_is_not_written_into_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"mlflow\.uri holds a password.*MLFLOW_TRACKING_URI") as caught:
        parse(compose(["mlflow.uri='https://me:secret@host/x'"]))
    assert "secret" not in str(caught.value)
    assert parse(compose(["mlflow.uri='https://host:5000'"])).mlflow.uri == "https://host:5000"


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking=mlflow needs mlflow, .* pip install 'rcpo\[mlflow\]'"):
        check_installed(config("mlflow"))
    check_installed(config("none"))


def test_runs_of_a_sweep_share_a_group_and_rounds_have_their_number(tmp_path: Path) -> None:
    sweep = tmp_path / "mine"
    run_dir = sweep / "objective=dpo,seed=1"
    run_dir.mkdir(parents=True)
    assert (name_of(run_dir, config()), group_of(run_dir, config())) == ("objective=dpo,seed=1", None)
    (sweep / ".sweep").touch()
    assert group_of(run_dir, config()) == "mine"
    own = config()
    own.wandb.name, own.wandb.group = "first", "others"
    assert (name_of(run_dir, own), group_of(run_dir, own)) == ("first", "others")
    round_dir = tmp_path / "rounds" / "round-2" / "train"
    assert (name_of(round_dir, config()), group_of(round_dir, config())) == ("round-2", "rounds")
