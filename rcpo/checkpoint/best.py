"""The step with the best held-out metric so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rcpo.config.schema import BEST_METRICS, CheckpointConfig
from rcpo.errors import ConfigError


class BestStep:
    """The step whose evaluation had the best value of `checkpoint.best` so far."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._metric = config.best
        self._sign = -1 if config.best_mode == "min" else 1
        self.step: int | None = None
        self._value = 0.0

    def __str__(self) -> str:
        return f"{self._metric} {self._value:.4g}"

    @property
    def steps(self) -> list[int]:
        """The one step, or none."""
        return [] if self.step is None else [self.step]

    def improved(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether an evaluation is the best so far; raises ConfigError where it has no such metric."""
        if self._metric is None:
            return False
        if self._metric not in values:
            names = ", ".join(name for name in BEST_METRICS if name in values)
            raise ConfigError(
                f"checkpoint.best={self._metric} is not measured in this run; there are: {names}"
            )
        value = float(values[self._metric])
        if not math.isfinite(value) or (self.step is not None and self._sign * (value - self._value) <= 0):
            return False
        self.step, self._value = step, value
        return True

    def state_dict(self) -> dict[str, Any] | None:
        """Ready for JSON."""
        if self.step is None:
            return None
        return {"metric": self._metric, "sign": self._sign, "step": self.step, "value": self._value}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on, unless another metric or direction is asked for now."""
        if state is not None and (state["metric"], state["sign"]) == (self._metric, self._sign):
            self.step, self._value = state["step"], state["value"]
