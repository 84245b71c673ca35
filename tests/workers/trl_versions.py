"""Short calibrated runs with the TRL that is installed. Usage: trl_versions.py FOLDER OUTPUT

FOLDER holds the model, `pairs.jsonl`, and `ordered.json`: the pairs in the order of `rcpo train`.
OUTPUT gets the log of each run: its name and, a step each, the values of NAMES.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers import build, history, sums
from transformers import AutoModelForCausalLM

from rcpo.integrations.trl import (
    CalibratedCPOTrainer,
    CalibratedDPOTrainer,
    CalibratedKTOTrainer,
    CalibratedORPOTrainer,
    RewardCalibrationConfig,
)

NAMES = (
    *("loss", "grad_norm", "rc/alpha", "dynamics/incentive_chosen", "dynamics/incentive_rejected"),
    *("dynamics/score_norm_chosen", "dynamics/score_cosine"),
)
STEPS = 20
LIKE_RCPO: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 2e-4, "optim": "adamw_torch_fused"}


def thorough(name: str, cls: type) -> dict[str, Any]:
    """The calibrated trainer with the checks of an untested version, and its configuration in TRL."""
    try:
        module = __import__(f"trl.experimental.{name.lower()}", fromlist=["x"])
        config = getattr(module, f"{name}Config")
    except (ImportError, AttributeError):
        config = getattr(trl, f"{name}Config")
    return {"cls": type(cls.__name__, (cls,), {"_thorough": True}), "config": config}


def unpaired(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each pair as a desirable and an undesirable answer, one after the other."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in rows
        for side, label in sides
    ]


def runs(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and trained trainers."""
    dpo, kto = thorough("DPO", CalibratedDPOTrainer), thorough("KTO", CalibratedKTOTrainer)
    cpo, orpo = thorough("CPO", CalibratedCPOTrainer), thorough("ORPO", CalibratedORPOTrainer)
    rows = sums(folder, 64)
    ordered = json.loads((folder / "ordered.json").read_text(encoding="utf-8"))
    on, exact = RewardCalibrationConfig(), RewardCalibrationConfig(sketch=None)

    if not hasattr(trl.DPOTrainer, "_compute_loss"):  # until 0.28 DPO alone tokenizes without <bos>
        ordered_pairs, pairs = ([{**r, "prompt": "<bos>" + r["prompt"]} for r in g] for g in (ordered, rows))
    else:
        ordered_pairs, pairs = ordered, rows

    def run(given: Any, rc: RewardCalibrationConfig | None, **settings: Any) -> Any:
        resume = settings.pop("resume", None)
        trainer = build(folder, given, rc, **{"max_steps": 3, **settings})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    yield "dpo", run(ordered_pairs, on, beta=0.1, **dpo, **LIKE_RCPO)
    for settings in (cpo, orpo):
        settings["max_length"] = 64
        if hasattr(settings["config"], "max_prompt_length"):
            settings["max_prompt_length"] = 32
    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}
    yield "simpo", run(ordered, on, **simpo, **cpo, **LIKE_RCPO)
    # TRL's mean is over answers, rcpo's over pairs
    weights = {"desirable_weight": 2.0, "undesirable_weight": 2.0}
    apo = {"loss_type": "apo_zero_unpaired", "beta": 0.1, "per_device_train_batch_size": 16, **weights}
    yield "apo", run(unpaired(ordered), on, **apo, **kto, **LIKE_RCPO)

    loop = RewardCalibrationConfig(rule="loop", target=0.5)
    yield "loop", run(pairs, loop, learning_rate=2e-3, **dpo)
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    on_disk = Dataset.from_json(str(folder / "pairs.json"), cache_dir=str(folder / "cache"))
    yield "loop, precomputed", run(on_disk, loop, learning_rate=2e-3, precompute_ref_log_probs=True, **dpo)
    yield "ipo", run(pairs, exact, loss_type=["ipo"], **dpo)
    yield "mix", run(pairs, exact, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **dpo)
    yield "kto", run(unpaired(rows), exact, **kto)
    yield "cpo", run(rows, exact, **cpo)
    yield "orpo", run(rows, exact, **orpo)
    yield "parts", run(pairs, exact, per_device_train_batch_size=2, gradient_accumulation_steps=4, **dpo)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    yield "lora", run(pairs, exact, model=adapted, **dpo)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **dpo}
    yield "whole", run(pairs, exact, **saving)
    yield "resumed", run(pairs, exact, resume=str(folder / "out" / "checkpoint-2"), **saving)


def main() -> None:
    folder, output = map(Path, sys.argv[1:])
    gc.freeze()  # each trainer collects garbage, and need not look through all that was imported
    found = {name: history(trainer, *NAMES) for name, trainer in runs(folder)}
    output.write_text(json.dumps({"version": trl.__version__, "runs": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
