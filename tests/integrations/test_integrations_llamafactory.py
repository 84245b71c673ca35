"""The plug-in for LLaMA-Factory, on trainers with its interface; its own run is described on the page."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import factory
import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, TrainingArguments


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Rows of 12 tokens, the last 3 to 8 of them a response."""
    ids = torch.randint(3, 100, (rows, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 4 + row % 6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(module: Any, name: str, folder: Path, **settings: Any) -> list[dict[str, float]]:
    """The log of two steps of a calibrated trainer, checked as that of an untested version."""
    cls = type("Checked", (getattr(module, name),), {"_thorough": True, **settings})
    path = folder / "model"
    model = AutoModelForCausalLM.from_pretrained(
        path if path.exists() else tiny_llama(path), dtype=torch.float32
    )
    given = batch(8)
    if "KTO" in name:
        given["kto_tags"] = torch.tensor([True, False, True, True, False, True, False, True])
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=1, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = cls(model=model, args=arguments, train_dataset=[0, 1], data_collator=lambda _: dict(given))
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CustomDPOTrainer", {}),
        ("CustomDPOTrainer", {"loss_type": "simpo", "beta": 2.0}),
        ("CustomDPOTrainer", {"ftx": 0.5}),
        ("CustomKTOTrainer", {"ftx": 0.5}),
    ],
)
def test_llama_factorys_trainers_are_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    modules = factory.install(monkeypatch)
    from rcpo.integrations.llamafactory import RewardCalibrationConfig, calibrate

    rc = RewardCalibrationConfig(ema=0.0, sketch=None, alpha_max=None)
    for _ in range(2):  # a second call replaces the first one's trainers
        calibrate(rc)
    module = modules.dpo if "DPO" in name else modules.kto
    first, second = train(module, name, tmp_path, **settings)
    assert first["rc/alpha"] == 1.0
    expected = math.sqrt(first["dynamics/band_center"] / first["dynamics/incentive_ratio"])
    assert second["rc/alpha"] == pytest.approx(expected, rel=1e-6) != 1.0


def test_the_supervised_term_is_a_part_of_the_winners_incentive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # γ · mean over pairs of −z/length: d_w grows by γ/length of each chosen response, here 8, 7, 6, 5 tokens
    modules = factory.install(monkeypatch)
    from rcpo.integrations.llamafactory import RewardCalibrationConfig, calibrate

    calibrate(RewardCalibrationConfig(sketch=None))
    plain, added = (train(modules.dpo, "CustomDPOTrainer", tmp_path, ftx=ftx)[0] for ftx in (0.0, 0.5))
    expected = 0.5 * sum(1 / length for length in (8, 7, 6, 5)) / 4
    difference = added["dynamics/incentive_chosen"] - plain["dynamics/incentive_chosen"]
    assert difference == pytest.approx(expected, rel=1e-5)
    assert added["dynamics/incentive_rejected"] == pytest.approx(
        plain["dynamics/incentive_rejected"], rel=1e-9
    )


def test_without_llama_factory_it_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rcpo.integrations.llamafactory", raising=False)
    with pytest.raises(
        ImportError, match="needs LLaMA-Factory's environment: No module named 'llamafactory'"
    ):
        import rcpo.integrations.llamafactory  # noqa: F401
