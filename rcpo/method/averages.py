"""Exponential moving averages without the bias of their start."""

from __future__ import annotations


class Average:
    """Σ w_i x_i / Σ w_i with weights that fall by `memory` for each step since.

    >>> average = Average(memory=0.5)
    >>> average.add(4.0), average.add(1.0)  # weights ¼ and ½
    (4.0, 2.0)
    """

    def __init__(self, memory: float) -> None:
        if not 0 <= memory < 1:
            raise ValueError(f"a memory in [0, 1) is expected, not {memory}")
        self.memory = memory
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float, steps: float = 1.0) -> float:
        """Add a value, `steps` after the last one; return the new average."""
        keep = self.memory**steps
        self._sum = keep * self._sum + (1 - keep) * value
        self._weight = keep * self._weight + (1 - keep)
        return self._sum / self._weight

    @property
    def value(self) -> float | None:
        """The average; None before the first value."""
        return self._sum / self._weight if self._weight else None

    def state_dict(self) -> list[float]:
        """Ready for JSON."""
        return [self._sum, self._weight]

    def load_state_dict(self, state: list[float]) -> None:
        """Continue where `state_dict` was taken."""
        self._sum, self._weight = state
