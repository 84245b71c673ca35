"""`rcpo evaluate` on a real run: every checkpoint, any number of processes, a model without a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked
import pyarrow.parquet as parquet
import pytest
import torch
from tiny import sums_file, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcpo.checkpoint.read import checkpoint_weights
from rcpo.config.schema import RunConfig
from rcpo.errors import ConfigError
from rcpo.evaluation.run import evaluate_run
from rcpo.runs.folder import checkpoint_folders

KEYS = ("prompt", "chosen")


def rcpo(*arguments: str) -> None:
    result = forked.rcpo(arguments, Path.cwd(), os.environ)
    assert result.returncode == 0, result.stdout + result.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    pairs = sums_file(folder / "pairs.jsonl", 24)
    model = tiny_llama(folder / "model")
    data = ["data=pairs", f"data.path={pairs}", f"data.eval_path={pairs}"]
    return ["model=local", f"model.path={model}", *data]


@pytest.fixture(scope="module")
def trained(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ZeRO-3 steps on two ranks, a checkpoint and an evaluation every second one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    rcpo(
        "train", *inputs, "objective=dpo", "objective.reduction=mean", "optim.lr=1e-2", "engine=zero3",
        "launch.processes=2", "train.max_steps=4", "train.batch_size=8", "train.micro_batch_size=4",
        "checkpoint.every=2", "eval.every=2", "eval.batch_size=5", "eval.max_new_tokens=6",
        "probe.size=5", "probe.every=2", "probe.generate_every=4", f"hydra.run.dir={folder}",
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_every_checkpoint_on_one_process_and_on_two(trained: Path) -> None:
    """What the checkpoints' weights give is what the run itself measured with them in memory."""
    (step, folder), _ = checkpoint_folders(trained)
    final = AutoModelForCausalLM.from_pretrained(trained / "final").state_dict()
    merged = checkpoint_weights(folder)
    assert step == 4 and {f"model.{name}" for name in final} == set(merged)
    assert all(torch.equal(merged[f"model.{name}"], value) for name, value in final.items())

    in_training = {row["step"]: row for row in lines(trained / "metrics.jsonl") if "eval/loss" in row}
    before = numbers(json.loads((trained / "evaluation.json").read_text()))
    records: list[list[dict[str, Any]]] = []
    for engine in (["engine=zero0", "launch.processes=1"], ["eval.batch_size=7"]):
        rcpo("evaluate", f"run={trained}", "eval.checkpoints=all", *engine)
        records.append(lines(trained / "evaluation" / "checkpoints.jsonl"))
        assert [record["step"] for record in records[-1]] == [2, 4]
        for record in records[-1]:
            shared = numbers(record).keys() & numbers(in_training[record["step"]]).keys()
            assert {"eval/winner_fell", "eval/dynamics/score_cosine"} < shared
            expected = {name: in_training[record["step"]][name] for name in shared}
            assert {name: record[name] for name in shared} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        after = numbers(json.loads((trained / "evaluation.json").read_text()))
        # Training holds no reference that could score the policy's answers: the KL is `rcpo evaluate`'s.
        assert {"eval/kl", "eval/kl_per_token"} < after.keys() - before.keys()
        assert {name: after[name] for name in before} == pytest.approx(before, rel=1e-4, abs=1e-5)
    for alone, both in zip(*records, strict=True):
        assert numbers(alone) == pytest.approx(numbers(both), rel=1e-4, abs=1e-5)
    assert abs(records[0][0]["eval/logratios/chosen"] - records[0][1]["eval/logratios/chosen"]) > 1e-2
    examples = [lines(trained / "evaluation" / name) for name in ("examples-step-4.jsonl", "examples.jsonl")]
    assert [row["logps/chosen"] for row in examples[0]] == pytest.approx(
        [row["logps/chosen"] for row in examples[1]], rel=1e-5
    )


@pytest.mark.slow
def test_probes_of_two_ranks_under_zero3(trained: Path) -> None:
    """The last rows against the final weights, on one process; five examples over two ranks and fillers."""
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    rows = [row for row in parquet.read_table(trained / "probes.parquet").to_pylist() if row["step"] == 4]
    samples = {line["example_id"]: line for line in lines(trained / "samples.jsonl") if line["step"] == 4}
    assert len({row["example_id"] for row in rows}) == 5 and len(samples) == 4
    for row in rows:
        if (line := samples.get(row["example_id"])) is None:
            continue
        prompt, chosen = (tokenizer(line[key], add_special_tokens=False)["input_ids"] for key in KEYS)
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *chosen, tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])
        assert row["chosen_mass"] == pytest.approx(float(logps[len(prompt) :].sum()), abs=1e-3)
        assert row["chosen_logps"] == pytest.approx(row["chosen_mass"] / row["chosen_length"], abs=1e-5)
        assert row["greedy_length"] <= 6 and row["ref_greedy_mass"] < 0


@pytest.mark.slow
def test_a_model_without_a_run(trained: Path, inputs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    arguments = [part for part in inputs if not part.startswith("model.path")]
    model = next(part.removeprefix("model.path=") for part in inputs if part.startswith("model.path"))
    rcpo(
        "evaluate", *arguments, f"model.path={trained / 'final'}", f"reference.path={model}",
        "objective.reduction=mean", "eval.max_new_tokens=6", f"hydra.run.dir={folder}",
    )  # fmt: skip
    found = json.loads(Path(folder, "evaluation.json").read_text())
    own = numbers(json.loads((trained / "evaluation.json").read_text()))
    # with the KL to the reference, which training leaves to `rcpo evaluate`
    assert {name: found[name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert found["eval/kl"] > 0


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="no final/ yet"):
        evaluate_run(RunConfig(), tmp_path)
    config = RunConfig()
    config.eval.checkpoints = "all"
    with pytest.raises(ConfigError, match=r"holds no checkpoint; train with checkpoint\.every"):
        evaluate_run(config, tmp_path)
