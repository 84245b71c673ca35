"""One calibrated DPO run of TRL on several ranks. Usage: trl_ranks.py FOLDER ddp|fsdp2|zero3 OUTPUT"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from trainers import build, written_sums

from rcpo.integrations.trl import RewardCalibrationConfig

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main() -> None:
    folder, kind, output = sys.argv[1:]
    settings: dict[str, Any] = {"ddp_backend": "gloo"} if kind == "ddp" else {}
    if kind == "fsdp2":
        os.environ.update(FSDP2)
    if kind == "zero3":
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    trainer = build(
        Path(folder), written_sums(Path(folder)), RewardCalibrationConfig(sketch=None),
        per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    trainer.train()
    if trainer.accelerator.is_main_process:
        rows = [row for row in trainer.state.log_history if "loss" in row]
        Path(output).write_text(json.dumps(rows), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
