"""TRL's trainers on the tests' tiny model and sums, in an order that the test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import sums_file, tiny_llama
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from rcpo.integrations.trl import CalibratedDPOTrainer, RewardCalibrationConfig

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def sums_model(folder: Path) -> str:
    """The tiny Llama, made once in a folder."""
    path = folder / "model"
    return str(path) if path.exists() else tiny_llama(path)


def sums(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows of prompt, chosen and rejected."""
    sums_file(folder / "pairs.jsonl", count)
    return written_sums(folder)


def written_sums(folder: Path) -> list[dict[str, Any]]:
    """The rows that `sums` wrote before: ranks that wrote them anew would read each other's half."""
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def in_order(cls: type) -> type:
    """The trainer, taking the examples in the order that they are given in."""

    def sampler(self: Any, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return type(f"InOrder{cls.__name__}", (cls,), {"_get_train_sampler": sampler})


def build(
    folder: Path,
    rows: list[dict[str, Any]] | Dataset,
    rc: RewardCalibrationConfig | bool | None,
    *,
    cls: type = CalibratedDPOTrainer,
    config: type = DPOConfig,
    model: Any = None,
    ref_model: Any = None,
    peft_config: Any = None,
    eval_rows: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Any:
    """A trainer over `rows`: batches of 8, a constant rate, a log entry a step. `rc=False`: not given."""
    path = sums_model(folder)
    given = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **settings,
    }
    tokenizer = AutoTokenizer.from_pretrained(path)
    if isinstance(rows[0].get("prompt"), list):
        tokenizer.chat_template = TEMPLATE
    optional = {
        "ref_model": ref_model,
        "peft_config": peft_config,
        "eval_dataset": None if eval_rows is None else Dataset.from_list(eval_rows),
        "rc": None if rc is False else rc,
    }
    return in_order(cls)(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if model is None else model,
        args=config(**given),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        processing_class=tokenizer,
        **{name: value for name, value in optional.items() if value is not None},
    )


def history(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """Logged values of each step; all that a step logs is there."""
    return [tuple(row[name] for name in names) for row in trainer.state.log_history if "loss" in row]
