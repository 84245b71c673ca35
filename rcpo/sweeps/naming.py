"""Names of runs in a sweep's folder: from the values that vary, so that the same run has the same folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import OmegaConf

from rcpo.errors import ConfigError

_BYTES = 180  # file systems take 255, and scratch copies add to a name


def run_name(values: Mapping[str, str]) -> str:
    """A folder's name, `objective-dpo_rc-on_seed-1`.

    A hash of the values follows wherever the name alone does not tell them: where it is cut, characters are
    replaced, or a value looks like another key's beginning. Other values then have another name.
    """
    exact = "_".join(f"{key}-{value}" for key, value in values.items())
    plain = "_".join(re.sub(r"[^\w.+-]+", "-", f"{key}-{value}").strip("-") for key, value in values.items())
    short = plain.encode("utf-8", "replace")[:_BYTES].decode("utf-8", "ignore")
    mistakable = any(f"_{key}-" in value for key in values for value in values.values())
    if short == exact and not mistakable:
        return exact or "run"
    content = json.dumps(list(values.items()))
    return f"{short}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def refuse_shared_folders(folders: Iterable[tuple[Path, str]]) -> None:
    """Raise ConfigError where two runs of a sweep, each given with its overrides, have one folder."""
    first: dict[Path, str] = {}
    for folder, run in folders:
        if first.setdefault(folder, run) is not run:
            raise ConfigError(
                f"two runs of this sweep have the same folder {folder}: {first[folder]} and {run}; give each "
                "value once, or a hydra.sweep.subdir that tells them apart"
            )


def _name_of_job(*varied: str) -> str:
    from hydra.core.hydra_config import HydraConfig

    pairs = (str(override).partition("=") for override in HydraConfig.get().overrides.task)
    return run_name({key: value for key, _, value in pairs if key in varied})


# ${rcpo_run_name:KEY,…} in hydra.sweep.subdir: the name of the job that Hydra is composing
OmegaConf.register_new_resolver("rcpo_run_name", _name_of_job, replace=True)
