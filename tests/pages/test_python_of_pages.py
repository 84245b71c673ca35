"""The Python that pages show runs as it stands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import factory
import pytest
import torch
from pages import blocks
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, TrainingArguments

PAGE = "rcpo/integrations/README.md"


def rows(seed: int) -> dict[str, torch.Tensor]:
    """A micro-batch of two pairs: chosen rows, then rejected ones, responses of 3 and 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 90, (4, 9), generator=generator)
    weights = torch.zeros(4, 8)
    for row, length in enumerate((3, 5, 5, 3)):
        weights[row, -length:] = 1 / length
    winners = torch.tensor([True, True, False, False])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": weights, "winners": winners}


@pytest.fixture
def loop(tmp_path: Path) -> dict[str, Any]:
    """The names that the page's loop defines, and a model."""
    names: dict[str, Any] = {}
    exec(blocks("python", PAGE, "In your own loop")[0], names)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"), dtype=torch.float32)
    names["scored"] = names["Scored"](model)
    return names


def test_the_loop_of_ones_own(loop: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(loop["scored"].parameters(), lr=0.1)
    steps = [loop["training_step"](loop["scored"], optimizer, [rows(0), rows(1)]) for _ in range(3)]
    assert steps[0]["rc/alpha"] == 1.0 and steps[1]["rc/alpha"] != 1.0
    assert steps[-1]["dynamics/score_norm_chosen"] > 0
    again = loop["RewardCalibrator"]()
    again.load_state_dict(loop["calibrator"].state_dict())
    assert again.alpha == loop["calibrator"].alpha


def test_the_same_lines_inside_trainer(loop: dict[str, Any], tmp_path: Path) -> None:
    exec(blocks("python", PAGE, "In your own loop")[1], loop)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = loop["CalibratedTrainer"](
        model=loop["scored"], args=arguments, train_dataset=[0, 1, 0, 1],
        data_collator=lambda seeds: rows(seeds[0]),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "rc/alpha" in row]
    assert len(logged) == 2 and logged[0]["rc/alpha"] == 1.0 and logged[1]["rc/alpha"] != 1.0


def test_the_trl_example(tmp_path: Path) -> None:
    from datasets import Dataset
    from tiny import TOKENIZER
    from transformers import AutoTokenizer
    from trl import DPOConfig

    row = {"prompt": "10+99=", "chosen": "it is 109", "rejected": "110"}
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to=[],
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    names: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"), dtype=torch.float32),
        "args": arguments,
        "dataset": Dataset.from_list([row] * 8),
        "tokenizer": AutoTokenizer.from_pretrained(TOKENIZER),
    }
    exec(blocks("python", "README.md", "Your own loop, and TRL")[0], names)
    assert names["trainer"].state.log_history[0]["rc/alpha"] == 1.0


def test_the_llama_factory_example_calibrates_its_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = factory.install(monkeypatch)
    exec(blocks("python", PAGE, "Inside LLaMA-Factory")[0], {})
    assert modules.runs == [None]  # it reads the command line
    assert modules.dpo.CustomDPOTrainer is not factory.CustomDPOTrainer
    trainer = modules.kto.CustomKTOTrainer
    assert modules.workflow.CustomKTOTrainer is trainer is not factory.CustomKTOTrainer


def test_the_incentives_of_the_method_page() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python", "rcpo/method/README.md")[0], names)
    expected = 0.1 / (1 + math.exp(0.1))  # β σ(−βm) with β = 0.1 and m = 1
    assert names["chosen"].item() == pytest.approx(expected) == pytest.approx(0.0475, abs=5e-5)
    assert names["rejected"].item() == pytest.approx(expected)


def test_a_trainer_of_ones_own_is_calibrated() -> None:
    from trl import DPOTrainer

    names: dict[str, Any] = {}
    exec(blocks("python", PAGE, "Inside TRL")[0], names)
    trainer, mixin = names["MyTrainer"], names["RewardCalibrationMixin"]
    assert trainer.__mro__.index(mixin) < trainer.__mro__.index(DPOTrainer)
