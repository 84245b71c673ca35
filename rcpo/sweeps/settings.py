"""`sweep.*`: how many runs at a time, and what a search looks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from rcpo.config.fields import key
from rcpo.config.nodes import read_node


@dataclass(kw_only=True)
class SweepConfig:
    """How many runs at a time, and what a search looks for."""

    parallel: int | None = key(1, "runs at a time on this machine; null: one per GPU", at_least=1)
    search: str = key("grid", "every combination, or trials drawn by Optuna", choices=("grid", "optuna"))
    trials: int = key(20, "trials of a search", at_least=1)
    metric: str = key("eval/rewards/accuracies", "figure of evaluation.json to optimize")
    direction: str = key("maximize", "whether higher or lower is better", choices=("maximize", "minimize"))
    sampler_seed: int = key(0, "seed of a search's draws", at_least=0, at_most=2**32 - 1)
    pruner: str = key("none", "stop trials that fall behind", choices=("none", "median", "hyperband"))
    pruner_startup: int = key(5, "trials to finish before median stops any", at_least=0)
    settings: dict[str, Any] = key({}, "a study's values by the objective's name, for interpolations")


def sweep_config(cfg: DictConfig) -> SweepConfig:
    """The validated `sweep` node of a composed configuration; raises ConfigError with key, value, remedy."""
    return read_node(cfg, "sweep", SweepConfig())
