"""`sweep.*`: how many runs at a time, and what a search looks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from rcpo.config.nodes import check_node, read_node
from rcpo.config.validation import Range


@dataclass(kw_only=True)
class SweepConfig:
    """How many runs at a time (`parallel` None: one a GPU), and what a search looks for (`sweep.*`).

    `settings` are a study's values by the objective's name, for its interpolations.
    """

    parallel: int | None = 1
    search: str = "grid"
    trials: int = 20
    metric: str = "eval/rewards/accuracies"
    direction: str = "maximize"
    sampler_seed: int = 0
    pruner: str = "none"
    pruner_startup: int = 5
    settings: dict[str, Any] = field(default_factory=dict)


SWEEP_CHOICES = {
    "search": ("grid", "optuna"),
    "direction": ("maximize", "minimize"),
    "pruner": ("none", "median", "hyperband"),
}


SWEEP_RANGES: dict[str, Range] = {
    "parallel": (1, math.inf, True, False),
    "trials": (1, math.inf, True, False),
    "sampler_seed": (0, 2**32 - 1, True, True),
    "pruner_startup": (0, math.inf, True, False),
}


def sweep_config(cfg: DictConfig) -> SweepConfig:
    """The validated `sweep` node of a composed configuration; raises ConfigError with key, value, remedy."""
    config = read_node(cfg, "sweep", SweepConfig())
    check_node("sweep", config, SWEEP_CHOICES, SWEEP_RANGES)
    return config
