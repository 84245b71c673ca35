"""What a tracker calls a run, and the group that it puts a sweep's runs in."""

from __future__ import annotations

import re
from pathlib import Path

from rcpo.config.schema import RunConfig
from rcpo.runs.folder import JOB_FILE, SWEEP_LOCK


def name_of(run_dir: Path, config: RunConfig) -> str:
    """`wandb.name`, or the folder's name, which says what varies in a sweep; of a round, its number."""
    if config.wandb.name is not None:
        return config.wandb.name
    folder = run_dir.resolve()
    return folder.parent.name if _is_round(folder) else folder.name


def group_of(run_dir: Path, config: RunConfig) -> str | None:
    """`wandb.group`, or the folder of the sweep or of the rounds that the run belongs to; None by itself."""
    folder = run_dir.resolve()
    if config.wandb.group is not None:
        return config.wandb.group
    if _is_round(folder):
        return folder.parent.parent.name
    shared = (SWEEP_LOCK, JOB_FILE.format("sweep"))
    return folder.parent.name if any((folder.parent / name).exists() for name in shared) else None


def _is_round(folder: Path) -> bool:
    """Whether `rcpo iterate` trains there."""
    return folder.name == "train" and re.fullmatch(r"round-\d+", folder.parent.name) is not None
