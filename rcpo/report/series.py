"""Columns of a run as lines that can be read: means over stretches of steps, and over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rcpo.report.runs import Column, Run
from rcpo.runs.display import nice_stride

POINTS = 50  # a line of more is noise at the width of a page


@dataclass(frozen=True)
class Curve:
    """Points of a curve: mean steps and mean values of its stretches, each (P,), NaN where unknown."""

    steps: Column
    values: Column


def stretch(runs: Sequence[Run]) -> int:
    """How many steps a point stands for (1, 2, 5, 10, …): the longest run has at most `POINTS`."""
    return nice_stride(max((run.last_step for run in runs), default=1), POINTS)


def binned(steps: Column, values: Column, width: int, *, geometric: bool = False) -> Curve:
    """Means of `values` (N,) over stretches of `width` steps; NaN is left out.

    `geometric` averages logarithms, for ratios; what is not positive is left out there.
    """
    if not len(steps):
        return Curve(steps, values)
    if geometric:
        positive = np.where(values > 0, values, np.nan)
        logs = binned(steps, np.log(positive), width)
        return Curve(logs.steps, np.exp(logs.values))
    index = ((steps - 1) // width).astype(np.int64)
    index -= index.min()
    known = ~np.isnan(values)
    counts = np.bincount(index[known], minlength=index.max() + 1)
    sums = np.bincount(index[known], values[known], minlength=index.max() + 1)
    rows = np.bincount(index)
    present = rows > 0
    with np.errstate(invalid="ignore"):
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    centres = np.bincount(index, steps)[present] / rows[present]
    return Curve(centres, means[present])


def of_runs(
    runs: Sequence[Run], column: Callable[[Run], Column], width: int, *, geometric: bool = False
) -> list[Curve]:
    """A line of each run that has one."""
    lines = [binned(run.steps, column(run), width, geometric=geometric) for run in runs]
    return [line for line in lines if not np.isnan(line.values).all()]


def mean_line(lines: Sequence[Curve], width: int = 1, *, geometric: bool = False) -> Curve:
    """The mean over runs in each stretch of `width` steps, of the runs that came so far."""
    if len(lines) == 1:
        return lines[0]
    every = np.concatenate([line.steps for line in lines]) if lines else np.zeros(0)
    places = np.unique((every - 1) // width)
    table = np.full((2, len(lines), len(places)), np.nan)
    for row, line in enumerate(lines):
        own = np.searchsorted(places, (line.steps - 1) // width)
        table[0, row, own], table[1, row, own] = line.steps, line.values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch that no run knows stays NaN
        steps, values = np.nanmean(table[0], axis=0), table[1]
        means = np.exp(np.nanmean(np.log(values), axis=0)) if geometric else np.nanmean(values, axis=0)
    return Curve(steps, means)
