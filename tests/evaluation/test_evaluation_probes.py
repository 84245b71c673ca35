"""Probe examples followed through a short run, with the numbers worked out again by transformers."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from tiny import TOKENIZER, sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcpo.config.schema import ObjectiveConfig, RunConfig
from rcpo.data.identity import example_id
from rcpo.data.records import Example
from rcpo.evaluation.generation import Generated
from rcpo.evaluation.probe_file import COLUMNS, ProbeFile
from rcpo.evaluation.probes import Probe, probe_positions
from rcpo.system import distributed
from rcpo.training import trainer
from rcpo.training.session import Session

BETA, STEPS = 0.5, 4


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.initialize()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("inputs")
    config = RunConfig()
    config.objective = ObjectiveConfig(name="dpo", reduction="mean", hyperparameters={"beta": BETA})
    config.model.name, config.model.path = "local", tiny_llama(folder / "model")
    config.data.name = "pairs"
    config.data.path, config.data.eval_path = (
        sums_file(folder / name, count) for name, count in (("train.jsonl", 16), ("held-out.jsonl", 7))
    )
    config.wandb.mode, config.reference.cache, config.resume = "disabled", "off", "auto"
    config.train.batch_size = config.train.micro_batch_size = 4
    config.train.max_steps, config.checkpoint.every, config.optim.lr = STEPS, 2, 1e-2
    config.probe.size, config.probe.every, config.probe.generate_every, config.probe.samples = 3, 1, 2, 2
    config.eval.batch_size, config.eval.max_new_tokens = 2, 6
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert trainer.train(copy.deepcopy(config), folder, None, Probe) == 0
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(parquet.read_table(folder / "probes.parquet").to_pylist())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def mass(model: Any, prompt: list[int], tokens: list[int]) -> float:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None]).sum())


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < 6 and tokens[-1:] != [2]:
        tokens.append(int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
    return tokens


def test_each_example_is_followed_from_before_the_first_step(run: Path) -> None:
    found = rows(run)
    table = parquet.read_table(run / "probes.parquet")
    assert {field.name: str(field.type).replace("double", "float64") for field in table.schema} == COLUMNS
    steps = defaultdict(list)
    for row in found:
        steps[row["step"]].append(row["example_id"])
    assert list(steps) == [0, 1, 2, 3, 4]
    assert len(set(steps[0])) == 3 and all(ids == steps[0] for ids in steps.values())
    assert {row["split"] for row in found} == {"held out"}
    for row in found:
        generated = row["step"] % 2 == 0
        assert (row["greedy_mass"] is not None) == generated == (row["sample_length"] is not None)
        if row["step"] == 0:
            assert row["chosen_logratios"] == pytest.approx(0, abs=1e-6)
            assert row["greedy_mass"] == row["ref_greedy_mass"]
            assert row["incentive_chosen"] == pytest.approx(BETA / 2, abs=1e-6)  # β σ(0)


def test_the_last_rows_are_what_the_final_weights_say(run: Path, config: RunConfig) -> None:
    assert config.model.path is not None and config.data.eval_path is not None
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (config.model.path, run / "final")
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    session = Session(copy.deepcopy(config), run, training=False)
    assert session.datasets.evaluation is not None
    examples = {example_id(example): example for example in session.datasets.evaluation}
    last = [row for row in rows(run) if row["step"] == STEPS]
    assert len(last) == 3
    for row in last:
        example = examples[row["example_id"]]
        z = {side: mass(after, example.prompt, getattr(example, side)) for side in ("chosen", "rejected")}
        r = {side: mass(before, example.prompt, getattr(example, side)) for side in ("chosen", "rejected")}
        lengths = {side: len(getattr(example, side)) for side in ("chosen", "rejected")}
        u = {side: (z[side] - r[side]) / lengths[side] for side in z}
        pull = BETA / (1 + math.exp(BETA * (u["chosen"] - u["rejected"])))
        now, then = greedy(after, example.prompt), greedy(before, example.prompt)
        expected = {
            "chosen_mass": z["chosen"],
            "rejected_mass": z["rejected"],
            "chosen_logps": z["chosen"] / lengths["chosen"],
            "rejected_logratios": u["rejected"],
            "incentive_chosen": pull,
            "incentive_rejected": pull,
            "chosen_length": lengths["chosen"],
            "greedy_mass": mass(after, example.prompt, now),
            "ref_greedy_mass": mass(after, example.prompt, then),
            "greedy_length": len(now),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-4)
        shown = [line for line in lines(run / "samples.jsonl") if line["example_id"] == row["example_id"]]
        for line in shown:
            assert line["prompt"] == tokenizer.decode(example.prompt, skip_special_tokens=True)
            if line["step"] == STEPS and line["kind"] == "greedy":
                assert line["text"] == tokenizer.decode(now, skip_special_tokens=True)
                assert line["stopped"] == (now[-1] == 2) and line["tokens"] == len(now)
    assert any(abs(row["chosen_logratios"]) > 1e-2 for row in last), "nothing was trained"


def test_samples_are_of_the_same_prompts_each_time(run: Path) -> None:
    found = lines(run / "samples.jsonl")
    assert [(line["step"], line["kind"]) for line in found] == [
        (step, kind) for step in (0, 2, 4) for _ in range(2) for kind in ("greedy", "sample")
    ]
    assert len({line["example_id"] for line in found}) == 2


def test_a_resumed_run_ends_with_the_same_rows(run: Path, config: RunConfig, tmp_path: Path) -> None:
    """Stopped after step 2, with rows of a step 3 that it takes again."""
    folder = tmp_path / "resumed"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    shutil.rmtree(folder / "final")
    (folder / "finished.json").unlink()
    assert trainer.train(copy.deepcopy(config), folder, None, Probe) == 0
    assert rows(folder) == rows(run)
    assert lines(folder / "samples.jsonl") == lines(run / "samples.jsonl")
    assert lines(folder / "metrics.jsonl")[-1]["loss"] == lines(run / "metrics.jsonl")[-1]["loss"]


def test_probes_change_no_weight(run: Path, config: RunConfig, tmp_path: Path) -> None:
    assert trainer.train(copy.deepcopy(config), tmp_path, None, None) == 0
    weights = [
        AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (run, tmp_path)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (tmp_path / "probes.parquet").exists()


def test_which_examples_are_followed(config: RunConfig, tmp_path: Path) -> None:
    session = Session(copy.deepcopy(config), tmp_path, training=False)
    held_out = session.datasets.evaluation
    assert held_out is not None
    ids = [example_id(example) for example in held_out]
    positions = probe_positions(session, held_out, 3)
    assert [ids[position] for position in positions] == sorted(ids)[:3]
    assert len(probe_positions(session, held_out, 100)) == 7
    session.config.eval.max_examples = 2
    assert sorted(probe_positions(session, held_out, 3)) == [0, 1]
    # nothing held out: those that the first steps train on, which have reference log-probs
    train = session.datasets.train
    assert (
        probe_positions(session, train, 6) == [*session.batches.indices(0), *session.batches.indices(1)][:6]
    )
    session.total_steps = 1
    assert probe_positions(session, train, 6) == session.batches.indices(0)


def test_the_rows_are_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "probes.parquet"
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, path.exists())))
    ProbeFile(path, None).add([{"step": 0, "example_id": "a"}])
    assert synced == [(path.stat().st_ino, False)]
    assert parquet.read_table(path)["example_id"].to_pylist() == ["a"]


def test_what_is_not_finite_or_not_there_is_null(tmp_path: Path) -> None:
    path = tmp_path / "probes.parquet"
    file = ProbeFile(path, None)
    file.add([{"step": 0, "example_id": "a", "chosen_mass": math.nan, "greedy_mass": -math.inf}])
    file.add([{"step": 3, "example_id": "a", "chosen_mass": -2.0}])
    first, second = rows(tmp_path)
    assert first["chosen_mass"] is None and first["greedy_mass"] is None and first["split"] is None
    assert second["chosen_mass"] == -2.0
    ProbeFile(path, 2).add([{"step": 2, "example_id": "b"}])
    assert [row["step"] for row in rows(tmp_path)] == [0, 2]
    ProbeFile(path, None).add([{"step": 0, "example_id": "ä"}])
    assert [row["example_id"] for row in rows(tmp_path)] == ["ä"]


def test_an_answer_without_a_chosen_response_is_neither_right_nor_wrong() -> None:
    """Unpaired data: the second prompt has an unwanted completion alone."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    prompt, right, wrong = tokenizer(["1+2=", "3", "4"], add_special_tokens=False)["input_ids"]
    config = RunConfig()
    config.eval.scorer = "text"
    probe = object.__new__(Probe)
    session: Any = SimpleNamespace(tokenizer=tokenizer, config=config, datasets=SimpleNamespace(checker=None))
    probe._session, probe._ids = session, ["a", "b"]
    probe._examples = [Example("", prompt, right, []), Example("", prompt, [], wrong)]
    answers = [Generated(right, 2), Generated(right, 2)]
    rows = probe._sample_rows(0, [("greedy", answers)], range(2))
    assert [row["correct"] for row in rows] == [True, None]
