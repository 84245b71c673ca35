"""A quantity over a whole run in one line of text, however long the run becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"
KEPT = 256  # points; a terminal is not wider, and twice as many are halved


class History:
    """The course of one value: means over stretches of equal length, which double when there are too many."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._stretch = 1
        self._open: list[float] = []

    def add(self, value: float | None) -> None:
        """The next value; None and NaN leave a gap."""
        self._open.append(math.nan if value is None else float(value))
        if len(self._open) < self._stretch:
            return
        self._means.append(_mean(self._open))
        self._open = []
        if len(self._means) == 2 * KEPT:
            self._means = [_mean(self._means[i : i + 2]) for i in range(0, 2 * KEPT, 2)]
            self._stretch *= 2

    def points(self, width: int) -> list[float]:
        """At most `width` means over stretches of equal length, in order."""
        stretch = max(1, math.ceil(len(self._means) / width))
        return [_mean(self._means[i : i + stretch]) for i in range(0, len(self._means), stretch)]


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """A letter for each value, from the lowest bar at `low` to the highest at `high`; a space for NaN."""
    if high <= low:
        return "".join(" " if math.isnan(value) else LEVELS[len(LEVELS) // 2] for value in values)
    steps = len(LEVELS) - 1
    return "".join(
        " " if math.isnan(value) else LEVELS[round(steps * min(max((value - low) / (high - low), 0.0), 1.0))]
        for value in values
    )


def extent(*series: Sequence[float]) -> tuple[float, float] | None:
    """Lowest and highest of all known values; None where there is none."""
    known = [value for values in series for value in values if not math.isnan(value)]
    return (min(known), max(known)) if known else None


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
