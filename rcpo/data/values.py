"""The numbers that a row may give beside its texts: scores, their margin, and the row's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rcpo.data.records import VALUES, BadRow

ROUNDING = 1e-6  # relative: scores and a margin that a program wrote with seven digits still agree


def read_values(fields: Mapping[str, Any]) -> dict[str, float]:
    """Those of `VALUES` that a row gives, with the margin worked out from two scores; raises BadRow.

    >>> read_values({"score_chosen": 8, "score_rejected": "6.5"})
    {'score_chosen': 8.0, 'score_rejected': 6.5, 'margin': 1.5}
    """
    values = {name: _number(fields[name], name) for name in VALUES if not _absent(fields.get(name))}
    if values.get("weight", 1.0) <= 0:
        raise BadRow("field 'weight' is not positive")
    if "score_chosen" not in values or "score_rejected" not in values:
        return values
    margin = values["score_chosen"] - values["score_rejected"]
    given = values.setdefault("margin", margin)
    if not math.isclose(given, margin, rel_tol=ROUNDING, abs_tol=ROUNDING):
        raise BadRow("field 'margin' is not the difference of the two scores")
    return values


def _absent(value: Any) -> bool:
    """Arrow files and CSV have the columns of all rows in every row."""
    return value is None or (isinstance(value, str) and not value.strip())


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"field {name!r} is not a finite number")
    return number
