"""Held-out figures by the length of the chosen response: does the winner fall in short answers, or long?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpo.evaluation.preference import PreferenceScores, preference_columns, rows_with

PREFIX = "eval/by_length/"
METRICS = (
    "rewards/accuracies",
    "rewards/margins",
    "logps/accuracies",
    "logratios/chosen",
    "logratios/rejected",
    "winner_fell",
)


def by_length(scores: PreferenceScores) -> dict[str, float]:
    """`eval/by_length/LOW-HIGH/NAME` and `…/examples`, for chosen responses of LOW to HIGH tokens (included).

    The edges are powers of two (1-1, 2-3, 4-7, 8-15, …), the same for all runs, so that runs can be compared;
    a bucket without a pair is left out.
    """
    names = [name for name in METRICS if scores.paired or not name.endswith("rejected")]
    everything = preference_columns(scores)
    columns = {name: everything[name] for name in names if name in everything}
    buckets = np.frexp(scores.chosen_lengths)[1] - 1  # exactly floor(log2 n)
    record: dict[str, float] = {}
    for bucket in np.unique(buckets[scores.has_chosen]).tolist():
        inside = scores.has_chosen & (buckets == bucket)
        record |= _figures(f"{PREFIX}{2**bucket}-{2 ** (bucket + 1) - 1}", scores, columns, inside)
    return record


def _figures(
    prefix: str, scores: PreferenceScores, columns: Mapping[str, NDArray[Any]], inside: NDArray[np.bool_]
) -> dict[str, float]:
    rows = {name: inside & rows_with(scores, name) for name in columns}
    means = {
        f"{prefix}/{name}": float(values[rows[name]].mean())
        for name, values in columns.items()
        if rows[name].any()
    }
    return {f"{prefix}/examples": int(inside.sum()), **means}
