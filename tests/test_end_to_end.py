"""`rcpo train` as a user runs it: real processes, packaged model and data, the files of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# the names that users rely on, by where they come from
TRAINING = {
    "step",
    "epoch",
    "examples_seen",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "padded_share",
    "step_seconds",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
}
DYNAMICS = {
    f"dynamics/{name}"
    for name in (
        "incentive_chosen",
        "incentive_rejected",
        "score_norm_chosen",
        "score_norm_rejected",
        "score_cosine",
        "incentive_ratio",
        "band_center",
        "band_lower",
        "band_upper",
        "in_band",
        *(f"samples/{name}" for name in ("winner", "loser", "cross", "self_influence", "cosine", "in_band")),
        *(f"samples/{name}_error" for name in ("winner", "loser", "cross")),
        *(f"samples/band_{name}" for name in ("center", "lower", "upper")),
    )
}
CALIBRATION = {f"rc/{name}" for name in ("alpha", "calibrated_ratio", "in_band", "skipped", "clamped")}
SHORT = ["train.max_steps=3", "train.batch_size=8", "train.micro_batch_size=4", "eval.max_examples=16"]


def rcpo(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rcpo.cli", *arguments]
    return forked.run(command, timeout=timeout)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_default_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = rcpo(
        "train", "objective=simpo", "rc=on", *SHORT, "eval.generate_examples=8", f"hydra.run.dir={folder}"
    )
    assert result.returncode == 0, result.stderr
    for name in ("config.yaml", "environment.json", "evaluation.json", "rcpo.log", "final/config.json"):
        assert (folder / name).is_file(), name
    card = (folder / "final" / "README.md").read_text()
    assert f"rcpo train objective=simpo rc=on {SHORT[0]}" in card
    assert (folder / "final" / "training.png").is_file()
    table = rows(folder)
    assert [row["step"] for row in table] == [1, 2, 3]
    for row in table:
        names = {name for name in row if not name.startswith("eval/")}
        assert names == TRAINING | DYNAMICS | CALIBRATION
    assert table[0]["rc/alpha"] == 1.0
    assert table[1]["rc/alpha"] != 1.0
    assert table[0]["logratios/chosen"] == pytest.approx(0.0, abs=1e-5)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name in ("rewards/accuracies", "logratios/chosen", "logratios/rejected", "exact_match"):
        low, mean, high = (evaluation[f"eval/{name}{end}"] for end in ("/low", "", "/high"))
        assert low <= mean <= high
    assert table[-1]["eval/exact_match"] == evaluation["eval/exact_match"]
    assert "winner" in result.stdout.lower()
    # final/ needs nothing of rcpo's: transformers loads it and it answers
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    prompt = tokenizer("12+34=", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt]])
    answer = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert "46" in tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_processes_share_one_folder(tmp_path: Path, engine: str) -> None:
    folder = tmp_path / "run"
    arguments = ["objective=dpo", "rc=on", f"engine={engine}", "launch.processes=2", *SHORT]
    arguments += ["eval.generate_examples=4", f"hydra.run.dir={folder}"]
    result = rcpo("train", *arguments)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [folder]
    weights = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    assert weights["lm_head.weight"].shape == (100, 128)


@pytest.mark.slow
def test_evaluate_repeats_the_runs_own_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["objective=dpo", *SHORT, "eval.generate_examples=0", f"hydra.run.dir={folder}"]
    assert rcpo("train", *arguments).returncode == 0
    before = json.loads((folder / "evaluation.json").read_text())
    (folder / "final" / "README.md").unlink()
    result = rcpo("evaluate", f"run={folder}")
    assert "tiny-dpo" in (folder / "final" / "README.md").read_text()
    assert result.returncode == 0, result.stderr
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["eval/logratios/chosen"] == pytest.approx(before["eval/logratios/chosen"], abs=1e-5)
    assert after["eval/logps/rejected"] == pytest.approx(before["eval/logps/rejected"], abs=1e-4)
    assert after["eval/rewards/accuracies"] == before["eval/rewards/accuracies"]
