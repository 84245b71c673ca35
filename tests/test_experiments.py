"""The published experiments: their settings, for every objective, and their start on a small stand-in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_config import OBJECTIVES, composed
from tiny import tiny_llama

from rcpo import trainer
from rcpo.building import build_objective
from rcpo.config import RunConfig
from rcpo.launch import check
from rcpo.objectives import get_objective

# typed in from the list of the published settings
PUBLISHED: dict[str, dict[str, Any]] = {
    "pythia-410m": {"path": "EleutherAI/pythia-410m", "beta": 1.0, "lr": 6e-7, "micro": 4},
    "pythia-1.4b": {"path": "EleutherAI/pythia-1.4b", "beta": 1.0, "lr": 6e-7, "micro": 4},
    "pythia-2.8b": {"path": "EleutherAI/pythia-2.8b", "beta": 1.0, "lr": 1e-4, "micro": 4},
    "mistral-7b": {"path": "mistralai/Mistral-7B-v0.1", "beta": 2.0, "lr": 3e-7, "micro": 1, "bits": "nf4"},
    "qwen2.5-7b": {"path": "Qwen/Qwen2.5-7B-Instruct", "beta": 2.0, "lr": 5e-7, "micro": 1, "bits": "nf4"},
    "llama-3-8b": {"path": "meta-llama/Meta-Llama-3-8B", "beta": 2.0, "lr": 3e-7, "micro": 1, "bits": "nf4"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    wanted = PUBLISHED[name]
    config = composed(f"experiment={name}", "rc=on")
    assert config.model.path == wanted["path"]
    assert config.objective.hyperparameters["beta"] == wanted["beta"]
    assert (config.optim.name, config.optim.lr) == ("adamw", wanted["lr"])
    assert (config.optim.schedule, config.optim.warmup_ratio) == ("constant", 0.0)
    assert (config.train.batch_size, config.train.micro_batch_size) == (32, wanted["micro"])
    assert (config.train.epochs, config.train.max_steps, config.train.dtype) == (1, None, "bf16")
    assert config.train.gradient_checkpointing is (name == "qwen2.5-7b")
    assert (config.rc.enabled, config.rc.update, config.rc.decay) == (True, "microbatch", 0.98)
    assert config.data.path == "HuggingFaceH4/ultrafeedback_binarized"
    assert (config.data.split, config.data.eval_split) == ("train_prefs", "test_prefs")
    assert (config.data.max_length, config.data.max_prompt_length, config.seed) == (1024, 512, 42)
    adapter = config.adapter
    assert adapter.quantization == wanted.get("bits")
    assert adapter.name == ("lora" if "bits" in wanted else "none")
    if "bits" in wanted:
        assert (adapter.r, adapter.alpha, adapter.target_modules) == (8, 16, ["all-linear"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_them(name: str) -> None:
    config = composed("experiment=pythia-410m", f"objective={name}")
    objective, own = build_objective(config), get_objective(name)
    assert objective.reduction == ("importance" if name == "tidpo" else "mean")
    expected = dict(own.hyperparameters)
    if "beta" in expected:
        expected["beta"] = 1.0
    assert objective.hyperparameters == expected


@pytest.mark.parametrize("name", ["dpo", "tidpo"])
def test_the_user_s_word_goes_first(name: str) -> None:
    overrides = [f"objective={name}", "objective.reduction=sum", "objective.beta=3", "optim.lr=1e-5"]
    config = composed("experiment=pythia-410m", *overrides)
    objective = build_objective(config)
    assert (objective.reduction, objective.hyperparameters["beta"], config.optim.lr) == ("sum", 3.0, 1e-5)


def test_what_is_not_marked_optional_is_refused() -> None:
    with pytest.raises(ValueError, match="objective bce has no hyper-parameter 'beta'"):
        get_objective("bce", beta=1.0)
    assert get_objective("bce", optional=["beta"], beta=1.0).hyperparameters == {}
    with pytest.raises(ValueError, match="'bta'"):
        get_objective("dpo", optional=["beta"], bta=1.0)


def ultrafeedback(folder: Path, rows: int) -> str:
    """A folder in the hub's layout with the columns of UltraFeedback, binarized."""
    (folder / "data").mkdir(parents=True)
    for split, count in (("train_prefs", rows), ("test_prefs", 6)):
        table = []
        for number in range(count):
            question = f"What is {10 + number} plus {99 - number}, {split}?"
            asked = {"role": "user", "content": question}
            answers = [{"role": "assistant", "content": text} for text in ("It is 109.", f"It is {number}.")]
            table.append(
                {
                    "prompt": question,
                    "prompt_id": f"{split}-{number}",
                    "chosen": [asked, answers[0]],
                    "rejected": [asked, answers[1]],
                    "messages": [asked, answers[0]],
                    "score_chosen": 8.0,
                    "score_rejected": 5.0,
                }
            )
        pq.write_table(pa.Table.from_pylist(table), folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def stand_in(name: str, tmp_path: Path, *overrides: str) -> RunConfig:
    model = tiny_llama(tmp_path / "model", hidden=64)
    data = ultrafeedback(tmp_path / "data", 80)
    return composed(
        f"experiment={name}",
        "rc=on",
        f"model.path={model}",
        f"data.path={data}",
        "data.template=plain",
        "train.max_steps=2",
        "eval.max_examples=4",
        "eval.kl_examples=0",
        "wandb.mode=disabled",
        *overrides,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_start_on_a_small_stand_in(name: str, tmp_path: Path) -> None:
    if "bits" in PUBLISHED[name] and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'rcpo[qlora]'")
    config = stand_in(name, tmp_path, "train.batch_size=8")
    check(config, world_size=1)
    folder = tmp_path / "run"
    folder.mkdir()
    assert trainer.train(config, folder) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["grad_norm"] > 0 and 0.1 <= row["rc/alpha"] <= 10
    saved = "adapter_model.safetensors" if "bits" in PUBLISHED[name] else "model.safetensors"
    assert (folder / "final" / saved).is_file()
