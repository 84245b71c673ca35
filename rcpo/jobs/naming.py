"""Names of runs in a sweep's folder: from the values that vary, so that the same run has the same folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from omegaconf import OmegaConf

_LENGTH = 180  # file systems take 255 bytes, and scratch copies add to a name


def run_name(values: Mapping[str, str]) -> str:
    """A folder's name, `objective-dpo_rc-on_seed-1`; cut, with a hash, if long."""
    text = "_".join(re.sub(r"[^\w.+-]+", "-", f"{key}-{value}").strip("-") for key, value in values.items())
    if len(text) <= _LENGTH:
        return text or "run"
    return f"{text[:_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _name_of_job(*varied: str) -> str:
    from hydra.core.hydra_config import HydraConfig

    pairs = (str(override).partition("=") for override in HydraConfig.get().overrides.task)
    return run_name({key: value for key, _, value in pairs if key in varied})


# ${rcpo_run_name:KEY,…} in hydra.sweep.subdir: the name of the job that Hydra is composing
OmegaConf.register_new_resolver("rcpo_run_name", _name_of_job, replace=True)
