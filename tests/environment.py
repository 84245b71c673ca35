"""Variables of every test: set before torch or transformers are imported, inherited by what tests start."""

from __future__ import annotations

from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "WANDB_SILENT": "true",
}
if not Path("/dev/nvidiactl").exists():
    ENVIRONMENT["DS_ACCELERATOR"] = "cpu"
