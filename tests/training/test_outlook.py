"""What a run reports at its start: its size at once, its duration and memory after a few steps."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rcpo.training.outlook import LOOKED_AT, Outlook, duration, opening


def test_a_run_begins_with_its_pairs_tokens_and_steps() -> None:
    lengths = np.array([[10, 3, 4], [20, 5, 6]] * 1000)  # 24,000 tokens in each thousand twice: 48,000
    line = opening(lengths, batch_size=32, steps=125, steps_per_epoch=62)
    assert line == "training: 2,000 pairs with 48,000 tokens; 125 steps of 32 pairs (2.02 epochs)"
    assert opening(lengths, 32, 62, 62).endswith("62 steps of 32 pairs (1 epoch)")


def test_the_duration_is_estimated_once_from_the_first_steps_but_the_very_first() -> None:
    outlook = Outlook()
    seconds = [60.0, 2.0, 1.0, 2.0, 9.0]  # the median of all but the first is 2
    lines = [
        outlook.after({"step_seconds": each, "peak_memory_bytes": 1_500_000_000}, 299 - step)
        for step, each in enumerate(seconds)
    ]
    assert lines[:-1] == [None] * (LOOKED_AT - 1)
    assert lines[-1] is not None and lines[-1].startswith(
        "295 steps left: about 10 min at 2 s per step, without evaluations; memory: 1.5 GB at most so far, "
    )
    assert re.search(r"[\d.]+ of [\d.]+ GB free$", lines[-1])
    assert outlook.after({"step_seconds": 1.0, "peak_memory_bytes": 1}, 100) is None


def test_a_run_that_is_over_by_then_reports_nothing() -> None:
    outlook = Outlook()
    row = {"step_seconds": 1.0, "peak_memory_bytes": 1}
    assert [outlook.after(row, LOOKED_AT - 1 - step) for step in range(LOOKED_AT)] == [None] * LOOKED_AT


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (40.4, "40 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (720, "12 min"),
        (12e3, "3 h 20 min"),
        (190800, "2 days 5 h"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
