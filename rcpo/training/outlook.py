"""The facts that matter at the start of a run: pairs, tokens, steps, and soon its duration and memory."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

LOOKED_AT = 5  # steps after which the rest is estimated; the first is left out, for it warms up
GIGABYTE = 1e9


def opening(lengths: np.ndarray, batch_size: int, steps: int, steps_per_epoch: int) -> str:
    """One line on what is about to be trained; `lengths` (pairs, parts) are tokens."""
    pairs, tokens = len(lengths), int(lengths.sum())
    epochs = f"{steps / steps_per_epoch:.3g}"
    return (
        f"training: {pairs:,} pairs with {tokens:,} tokens; {steps:,} steps of {batch_size:,} pairs "
        f"({epochs} epoch{'' if epochs == '1' else 's'})"
    )


class Outlook:
    """Estimates a run's duration from its first steps, once."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def after(self, row: Mapping[str, Any], remaining: int) -> str | None:
        """Take a step's row; after enough of them, one line on the steps that remain, else None."""
        if len(self._seconds) >= LOOKED_AT:
            return None
        self._seconds.append(row["step_seconds"])
        if len(self._seconds) < LOOKED_AT or not remaining:
            return None
        each = median(self._seconds[1:])
        steps = "step" if remaining == 1 else "steps"
        return (
            f"{remaining:,} {steps} left: about {duration(each * remaining)} at {each:.3g} s per step, "
            f"without evaluations; {memory(row['peak_memory_bytes'])}"
        )


def memory(peak: int) -> str:
    """The highest use so far against what is free."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    used, left, whole = (f"{count / GIGABYTE:.1f}" for count in (peak, free, total))
    return f"memory: {used} GB at most so far, {left} of {whole} GB free"


def duration(seconds: float) -> str:
    """Seconds as people speak of them: 40 s, 12 min, 3 h 20 min, 2 days 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min"
    days, left = divmod(hours, 24)
    return f"{days} days {left} h"
