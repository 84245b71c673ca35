"""The plan of an iteration: what each step reads and waits for; and iterations on the packaged model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny import tiny_llama

from rcpo.commands.chain import needs, submit_chain
from rcpo.config.data import DataConfig
from rcpo.config.onpolicy import IterateConfig, OnPolicyConfig
from rcpo.config.parsing import load_run_config
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.models.loading import model_folder
from rcpo.onpolicy.rounds import Iteration, round_data
from rcpo.onpolicy.settings import Settings
from rcpo.report.rounds import rounds, table, write


def iteration(folder: Path, **settings: Any) -> Iteration:
    config = settings.pop("config", None) or RunConfig()
    count = settings.pop("rounds", 3)
    return Iteration(config, OnPolicyConfig(), IterateConfig(**settings), count, folder)


def test_a_round_reads_its_pairs_as_they_are_whatever_the_data_were() -> None:
    """The data's form, labels, and margins are those of the file that the prompts come from."""
    data = DataConfig(
        name="pairs", path="votes.jsonl", format="comparisons", format_module="mine", labels={"1": "first"},
        columns={"prompt": "q"}, min_margin=2.0, max_margin=9.0, max_length=99, template="chatml",
    )  # fmt: skip
    own = round_data(data, Path("pairs.jsonl"))
    kept = {"name": "pairs", "max_length": 99, "template": "chatml"}
    given = {"path": "pairs.jsonl", "eval_fraction": 0.0, "on_bad": "drop"}
    assert vars(own) == vars(DataConfig(**kept, **given))


def test_each_round_starts_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    plan = iteration(tmp_path)
    plan.check()
    plan.write(processes=2)
    names = [step.label for step in plan.steps()]
    assert names[:4] == ["round-0-evaluate", "round-1-sample", "round-1-train", "round-1-evaluate"]
    assert len(names) == 10 and not any(step.done for step in plan.steps())
    for number in (1, 2, 3):
        (plan.sample(number) / "pairs.jsonl").touch()
        shutil.copytree(model_folder(RunConfig().model), plan.train(number) / "final")
        settings, config = Settings.read(plan.sample(number)), plan.training(number)
        assert settings.nodes.sample.round == number
        assert config.data.path == str(plan.sample(number) / "pairs.jsonl") and config.data.eval_fraction == 0
        assert config.resume == "auto" and config.reference.path is None
        evaluated = plan.evaluate(number - 1) / "evaluation" / "config.yaml"
        assert load_run_config(evaluated).train.batch_size == 2  # whatever is trained, two ranks can evaluate
        assert load_run_config(evaluated).data == RunConfig().data
        assert load_run_config(evaluated).model == config.model
        first = None if number == 1 else str(model_folder(RunConfig().model))
        assert load_run_config(evaluated).reference.path == first
        if number > 1:
            final = plan.train(number - 1) / "final"
            assert settings.run == plan.train(number - 1) and config.model.path == str(final)
        else:
            assert settings.run is None and config.model.path is None
        assert load_run_config(plan.train(number)) == config


def test_the_reference_is_the_round_s_start_or_the_first_model(tmp_path: Path) -> None:
    config = RunConfig()
    config.model.name, config.model.path = "local", tiny_llama(tmp_path / "model")
    first = iteration(tmp_path / "out", reference="first", config=config)
    assert first.training(1).reference.path is None  # it starts from that model
    assert first.training(2).reference.path == first.training(3).reference.path == str(tmp_path / "model")
    packaged = iteration(tmp_path / "out", reference="first")
    assert packaged.training(2).reference.path == str(model_folder(RunConfig().model))


def test_an_adapter_goes_on_being_trained_on_its_base(tmp_path: Path) -> None:
    config = RunConfig()
    config.adapter.name = "lora"
    plan = iteration(tmp_path, reference="first", config=config)
    second = plan.training(2)
    assert second.model.path is None and second.adapter.path == str(plan.train(1) / "final")
    assert second.reference.path == str(model_folder(config.model))


def test_each_step_waits_for_the_one_it_needs(tmp_path: Path) -> None:
    steps = list(iteration(tmp_path, rounds=2).steps())
    waits = {step.label: needed and needed.label for step, needed in zip(steps, needs(steps), strict=True)}
    assert waits == {
        "round-0-evaluate": None,
        "round-1-sample": None,
        "round-1-train": "round-1-sample",
        "round-1-evaluate": "round-1-train",
        "round-2-sample": "round-1-train",
        "round-2-train": "round-2-sample",
        "round-2-evaluate": "round-2-train",
    }
    left = needs(steps[3:])  # training is done: neither its evaluation nor the next round waits
    assert [None if needed is None else needed.label for needed in left] == [
        None,
        None,
        "round-2-sample",
        "round-2-train",
    ]


@pytest.mark.parametrize(
    ("node", "key", "value", "message"),
    [
        ("reference", "path", "some/model", "iterate.reference=round or iterate.reference=first"),
        ("model", "init", "random", "model.init=random: rcpo iterate compares every round with the first"),
        ("adapter", "merge", True, "adapter.save_merged=true"),
        ("checkpoint", "best", "eval/loss", "checkpoint.best=eval/loss needs held-out pairs while training"),
        ("eval", "every", 5, "eval.every=5 needs held-out pairs while training"),
        ("data", "eval_fraction", 0.0, "set data.eval_path, or data.eval_fraction above 0"),
    ],
)
def test_what_rounds_rule_out(tmp_path: Path, node: str, key: str, value: Any, message: str) -> None:
    config = RunConfig()
    setattr(getattr(config, node), key, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        iteration(tmp_path, config=config).check()


def test_another_iteration_is_refused_and_more_rounds_are_not(tmp_path: Path) -> None:
    iteration(tmp_path, rounds=1).write(1)
    config = RunConfig()
    config.log.every = 10
    iteration(tmp_path, rounds=2, config=config).check()
    with pytest.raises(ConfigError, match=r"iterate\.reference: round -> first"):
        iteration(tmp_path, reference="first").check()
    config.optim.lr = 1e-5
    with pytest.raises(ConfigError, match=r"config\.optim\.lr: 0\.0001 -> 1e-05"):
        iteration(tmp_path, config=config).check()


def test_the_model_before_the_rounds_has_no_accuracy_against_itself(tmp_path: Path) -> None:
    for number, margin in ((0, 0.0), (1, 0.3)):
        place = tmp_path / f"round-{number}" / "evaluate"
        place.mkdir(parents=True)
        values = {f"eval/rewards/margins{end}": margin for end in ("", "/low", "/high")}
        accuracy = {"eval/rewards/accuracies": number * 0.9}
        (place / "evaluation.json").write_text(json.dumps(values | accuracy))
    assert table(rounds(tmp_path))[1] == [["0", "–"], ["1", "90 %"]]


def test_the_table_shows_what_each_round_left(tmp_path: Path) -> None:
    start = tmp_path / "round-0" / "evaluate"
    sample, train, evaluate = (tmp_path / "round-1" / name for name in ("sample", "train", "evaluate"))
    for folder in (start, sample, train, evaluate):
        folder.mkdir(parents=True)
    (start / "evaluation.json").write_text('{"eval/exact_match": 0.99, "eval/token_logratios/chosen": 0.0}')
    (evaluate / "evaluation.json").write_text(
        '{"eval/exact_match": 0.995, "eval/token_logratios/chosen": -0.02}'
    )
    (sample / "pairs.json").write_text('{"pairs": 1234, "score_mean": 0.926}')
    lower = [{"step": n, "loss": 1.0, "dynamics/samples/band_lower": 0.9 + n / 10} for n in (1, 2)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lower))
    header, rows = table(write(tmp_path))
    assert header == [
        "round", "pairs", "mean score", "winner's log-ratio", "exact match", "across samples: band lower"
    ]  # fmt: skip
    assert rows == [
        ["0", "–", "–", "+0.000", "99.0 %", "–"],
        ["1", "1,234", "0.926", "−0.020", "99.5 %", "1.050"],
    ]
    assert [one.number for one in rounds(tmp_path)] == [0, 1]
    assert "| 1 | 1,234 | 0.926 | −0.020 | 99.5 % | 1.050 |" in (tmp_path / "iterate.md").read_text()


SMALL = [
    *("rounds=2", "sample.prompts=48", "sample.n=4", "sample.batch_size=64", "train.batch_size=4"),
    *("train.micro_batch_size=4", "train.max_steps=3", "data.train_examples=128", "data.eval_fraction=0.01"),
    *("eval.generate_examples=16", "eval.kl_examples=4", "probe.size=0", "wandb.mode=disabled"),
    "checkpoint.every=1",
]
# what a round leaves behind, but for times, speeds, host and paths
SAME = [
    *("round-0/evaluate/evaluation.json", "round-1/sample/pairs.jsonl", "round-1/evaluate/evaluation.json"),
    *("round-2/sample/pairs.jsonl", "round-2/evaluate/evaluation.json"),
    *("round-1/train/final/model.safetensors", "round-2/train/final/model.safetensors"),
]


def same(folder: Path, other: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    result = forked.rcpo(["iterate", *SMALL, f"hydra.run.dir={folder}"], folder, os.environ)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rounds; round 0 is the model before them" in result.stdout
    return folder


@pytest.mark.slow
def test_two_rounds_and_one_report(whole: Path) -> None:
    found = rounds(whole)
    assert [one.number for one in found] == [0, 1, 2]
    assert all("eval/exact_match" in one.values for one in found)
    assert all(one.values["pairs"] > 0 for one in found[1:])
    first, second = (
        {
            json.loads(line)["prompt"]
            for line in (whole / f"round-{n}/sample/pairs.jsonl").read_text().split("\n")[:-1]
        }
        for n in (1, 2)
    )
    assert not first & second  # 96 of the 128 prompts
    again = forked.rcpo(["iterate", *SMALL, f"hydra.run.dir={whole}"], whole, os.environ)
    assert again.returncode == 0 and again.stdout.count("complete before") == 7
    report = forked.rcpo(["report", str(whole)], whole, os.environ)
    assert report.returncode == 0, report.stderr
    page = (whole / "report.html").read_text()
    assert "round-1/train" in page and "round-2/train" in page and "Rounds" in page


def killed(folder: Path, until: str, count: int = 1) -> None:
    """`kill -9` of an iteration once a file has so many lines."""
    command = [sys.executable, "-m", "rcpo.cli", "iterate", *SMALL, f"hydra.run.dir={folder}"]
    process = forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, end = folder / until, time.monotonic() + 240
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < end, until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_in_each_phase_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """While it evaluates, samples, trains; each time the same call goes on."""
    for until, count in (
        ("round-0/evaluate/evaluation/config.yaml", 1),
        ("round-1/sample/answers/rank-0.jsonl", 1),
        ("round-1/train/metrics.jsonl", 2),
        ("round-1/train/finished.json", 1),
        ("round-2/sample/prompts.jsonl", 1),
    ):
        killed(tmp_path, until, count)
    result = forked.rcpo(["iterate", *SMALL, f"hydra.run.dir={tmp_path}"], tmp_path, os.environ)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "round 1, train: complete before" in result.stdout
    same(tmp_path, whole)


@pytest.mark.slow
def test_a_stop_signal_reaches_the_step_that_is_at_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rcpo.cli", "iterate", *SMALL, f"hydra.run.dir={tmp_path}"]
    process = forked.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    path, end = tmp_path / "round-1/train/metrics.jsonl", time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "round 1, train" in said and "stopped" in said


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_a_chain_is_shown_and_touches_nothing(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rounds=2", "hydra.run.dir=it", "slurm.nodes=2", "train.micro_batch_size=8"]
    assert submit_chain(words, dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.count("#!/bin/bash") == 7 and list(outputs.iterdir()) == []
    assert "--dependency=afterok:JOB-OF-round-1-train" in said and "-m rcpo.onpolicy" in said
    assert said.count("--dependency") == 5 and "--job-name=round-2-train-it" in said
    with pytest.raises(ConfigError, match=r"slurm\.tasks=rank alone"):
        submit_chain([*words, "slurm.tasks=node"], dry_run=True)


def test_several_runs_and_outer_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rcpo.commands.iterate import iterate

    for go in (iterate, partial(submit_chain, dry_run=True)):
        with pytest.raises(ConfigError, match="without -m"):
            go(["-m", "seed=1"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="rcpo submit iterate"):
        iterate([])
