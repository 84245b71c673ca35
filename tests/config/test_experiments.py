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

from rcpo.config.schema import RunConfig
from rcpo.launch.checks import check
from rcpo.method.objectives import get_objective
from rcpo.training import trainer
from rcpo.training.objective import build_objective

# Values by hand from the authors' code, github.com/IceyWuu/DisentangledPreferenceOptimization at a35dd60.
# What aexperiment.sh passes on the command line goes before recipes/zephyr/*.yaml.
SH, README = "aexperiment.sh", "README.md"
CONFIG, MODEL = "scripts/dpo_config.py", "alignment_handbook/model_utils.py"
Published = dict[str, tuple[Any, str]]
EVERYWHERE: Published = {
    "optim.name": ("adamw", f"{SH}: FIXED_OPTIM=adamw_torch"),
    "optim.schedule": ("constant", f"{SH}: LR_SCHEDULER_TYPE"),
    "optim.warmup_ratio": (0.0, f"{SH}: WARMUP_RATIO"),
    "optim.weight_decay": (0.0, "transformers.TrainingArguments"),
    "optim.betas": ([0.9, 0.999], "transformers.TrainingArguments"),
    "optim.eps": (1e-8, "transformers.TrainingArguments"),
    "train.max_grad_norm": (1.0, "transformers.TrainingArguments"),
    "train.epochs": (1, f"{SH}: FIXED_NUM_EPOCHS"),
    "train.max_steps": (None, f"{SH}: FIXED_MAX_STEPS"),
    "train.batch_size": (32, f"{SH}: PER_DEVICE_BATCH_SIZE × GRAD_ACCUMULATION on one GPU"),
    "train.dtype": ("bf16", "recipes: bf16"),
    "seed": (42, f"{SH}: FIXED_SEED"),
    "data.path": ("HuggingFaceH4/ultrafeedback_binarized", "recipes: dataset_mixer"),
    "data.split": ("train_prefs", "recipes: dataset_splits"),
    "data.eval_split": ("test_prefs", "recipes: dataset_splits"),
    "data.max_length": (1024, "recipes: max_length"),
    "data.max_prompt_length": (512, "recipes: max_prompt_length"),
    "data.truncation": ("keep_end", f"{CONFIG}: truncation_mode"),
    "rc.enabled": (True, f"{SH}: --category calib"),
    "rc.update": ("microbatch", "scripts/dpo_trainer.py: _maybe_apply_db_calibration, each micro-batch"),
    "rc.ema": (0.98, f"{CONFIG}: db_ema_beta"),
}
PYTHIA: Published = {
    "beta": (1.0, "recipes/zephyr/pythia-*-base.yaml: beta"),
    "train.micro_batch_size": (4, f"{SH}: PER_DEVICE_BATCH_SIZE"),
    "train.gradient_checkpointing": (False, f"{SH}: GRADIENT_CHECKPOINTING"),
    "data.template": ("zephyr", f"{MODEL}: get_tokenizer, DEFAULT_CHAT_TEMPLATE"),
}
WHOLE: Published = {
    "adapter.name": ("none", "recipes: use_peft: false"),
    "adapter.quantization": (None, f"{SH}: LOAD_IN_4BIT=false"),
    "optim.lr": (6e-7, f"{SH}: DEFAULT_LR"),
}
SEVEN: Published = {
    "beta": (2.0, "recipes: beta"),
    "train.micro_batch_size": (1, f"{SH}: PER_DEVICE_BATCH_SIZE"),
    "adapter.name": ("lora", "recipes: use_peft"),
    "adapter.r": (8, f"{SH}: LORA_R"),
    "adapter.alpha": (16, "recipes: lora_alpha"),
    "adapter.target_modules": (["all-linear"], "recipes: lora_target_modules, all seven of a layer"),
    "adapter.quantization": ("nf4", f"{SH}: LOAD_IN_4BIT"),
}
PUBLISHED: dict[str, Published] = {
    "pythia-410m": {**PYTHIA, **WHOLE, "model.path": ("EleutherAI/pythia-410m", f"{SH}: MODEL_PATH")},
    "pythia-1.4b": {**PYTHIA, **WHOLE, "model.path": ("EleutherAI/pythia-1.4b", f"{SH}: MODEL_PATH")},
    "pythia-2.8b": {
        **PYTHIA,
        "model.path": ("EleutherAI/pythia-2.8b", f"{README}: Directory layout"),
        "optim.lr": (1e-4, f"{SH}: DEFAULT_LR"),
        "adapter.name": ("lora", "recipes/zephyr/pythia-2b-base.yaml: use_peft"),
        "adapter.r": (16, "recipes/zephyr/pythia-2b-base.yaml: lora_r; aexperiment.sh sets none"),
        "adapter.alpha": (32, "recipes/zephyr/pythia-2b-base.yaml: lora_alpha"),
        "adapter.target_modules": (
            ["all-linear"],
            "recipes/zephyr/pythia-2b-base.yaml: lora_target_modules, all four of a layer",
        ),
        "adapter.quantization": ("nf4", f"{SH}: LOAD_IN_4BIT=true"),
    },
    "mistral-7b": {
        **SEVEN,
        "model.path": ("mistralai/Mistral-7B-v0.1", "the base of alignment-handbook/zephyr-7b-sft-qlora"),
        "adapter.path": ("alignment-handbook/zephyr-7b-sft-qlora", "recipes: model_name_or_path"),
        "adapter.merge": (True, "scripts/dpo_trainer.py: __init__, merge_and_unload before new adapters"),
        "optim.lr": (3e-7, f"{SH}: DEFAULT_LR"),
        "train.gradient_checkpointing": (False, f"{SH}: GRADIENT_CHECKPOINTING"),
        "data.template": ("zephyr", "scripts/run.py: the tokenizer's own, for the path has no 'mistral'"),
    },
    "qwen2.5-7b": {
        **SEVEN,
        "model.path": ("Qwen/Qwen2.5-7B-Instruct", "recipes: model_name_or_path"),
        "optim.lr": (5e-7, f"{SH}: DEFAULT_LR"),
        "train.gradient_checkpointing": (True, f"{README}: Model families and defaults"),
        "data.template": (None, "scripts/run.py: the tokenizer's own"),
    },
}
# Hyper-parameters that no recipe sets, whatever the model, by objective.
OWN: dict[str, Published] = {
    "cpo": {"beta": (0.1, f"{CONFIG}: cpo_beta"), "lambda_nll": (1.0, f"{CONFIG}: cpo_lambda_nll")},
    "ipo": {"tau": (0.1, f"{CONFIG}: ipo_tau")},
    "slic": {"gamma": (1.0, f"{CONFIG}: slic_gamma"), "lambda_nll": (0.1, f"{CONFIG}: slic_lambda_coef")},
    "simpo": {"gamma": (1.0, "scripts/dpo_trainer.py: dpo_loss, SIMPO")},
}
NAMES = [*PUBLISHED, "llama-3-8b"]  # the last one's settings are not published
QUANTIZED = ("pythia-2.8b", "mistral-7b", "qwen2.5-7b", "llama-3-8b")


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    config = composed(f"experiment={name}", "rc=on")
    for key, (value, source) in {**EVERYWHERE, **PUBLISHED[name]}.items():
        found: Any = config
        for part in key.split("."):
            found = config.objective.hyperparameters["beta"] if part == "beta" else getattr(found, part)
        assert found == value, (key, source)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OWN)
@pytest.mark.parametrize("name", PUBLISHED)
def test_some_hyper_parameters_are_the_same_for_all_models(name: str, objective: str) -> None:
    config = composed(f"experiment={name}", f"objective={objective}")
    for key, (value, source) in OWN[objective].items():
        assert config.objective.hyperparameters[key] == value, source


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mix"])  # it has none of its own
def test_every_objective_takes_them(name: str) -> None:
    config = composed("experiment=pythia-410m", f"objective={name}")
    objective, own = build_objective(config), get_objective(name)
    assert objective.reduction == ("importance" if name == "tidpo" else "mean")
    expected = dict(own.hyperparameters)
    if "beta" in expected:
        expected["beta"] = OWN.get(name, {}).get("beta", PYTHIA["beta"])[0]
    assert objective.hyperparameters == expected


@pytest.mark.parametrize("name", ["dpo", "tidpo", "cpo"])
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
    model = tiny_llama(tmp_path / "model", hidden=64, positions=1024)
    data = ultrafeedback(tmp_path / "data", 80)
    return composed(
        f"experiment={name}",
        "rc=on",
        f"model.path={model}",
        f"data.path={data}",
        "data.template=plain",
        *(["adapter.path=null", "adapter.merge=false"] if name == "mistral-7b" else []),
        "train.max_steps=2",
        "eval.max_examples=4",
        "eval.kl_examples=0",
        "wandb.mode=disabled",
        *overrides,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_start_on_a_small_stand_in(name: str, tmp_path: Path) -> None:
    if name in QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
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
    saved = "adapter_model.safetensors" if name in QUANTIZED else "model.safetensors"
    assert (folder / "final" / saved).is_file()
