"""Signs that a run goes wrong while every number is finite: one warning for each, from the metrics rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rcpo.config import RunConfig


def tokens_per_winner(reduction: str, lengths: np.ndarray) -> float:
    """Return what divides a winner's log-ratio to give nats a token, from its reduction and the lengths.

    Only sums grow with the response. A length of 0 is that of a response that unpaired data does not have.
    """
    there = lengths[lengths > 0]
    return float(there.mean()) if reduction == "sum" and len(there) else 1.0


class DivergenceWatch:
    """Looks at the rows of a run, the same on all ranks; `tokens` is what `tokens_per_winner` gives."""

    def __init__(self, config: RunConfig, tokens: float) -> None:
        self._watch = config.watch
        self._calibrated = config.rc.enabled
        self._alpha_max = config.rc.alpha_max
        self._unit = tokens
        self._in_a_row = {"margin": 0, "alpha": 0}
        self._first_margin = 0.0
        self._said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"in_a_row": self._in_a_row, "first_margin": self._first_margin, "said": sorted(self._said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on: what was said is not said again, and what lasts has lasted as long."""
        self._in_a_row, self._first_margin = dict(state["in_a_row"]), state["first_margin"]
        self._said = set(state["said"])

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """What this row gives reason to say for the first time."""
        signs = {"winner": self._winner(row), "margin": self._margin(row), "alpha": self._alpha(row)}
        found = {name: text for name, text in signs.items() if text is not None and name not in self._said}
        self._said.update(found)
        return [f"step {row['step']}: {text}" for text in found.values()]

    def _winner(self, row: Mapping[str, Any]) -> str | None:
        """The winner's log-ratio is below the threshold."""
        fall = row.get("logratios/chosen")
        if fall is None or self._watch.winner is None or fall / self._unit > -self._watch.winner:
            return None
        return (
            f"the winner lost {-fall / self._unit:.2f} nats a token against the reference "
            f"(watch.winner={self._watch.winner:g}); {self._remedy(row)}"
        )

    def _remedy(self, row: Mapping[str, Any]) -> str:
        """Calibration can help where the band is left; winners also fall inside it (README, the study)."""
        slower = "a lower optim.lr slows it"
        if row.get("rc/in_band", row.get("dynamics/in_band")):
            return f"yet the step is in the band, whose geometry does not see this fall: {slower}"
        return slower if self._calibrated else f"rc=on may keep it, {slower}"

    def _margin(self, row: Mapping[str, Any]) -> str | None:
        """Every pair is right for long, and the margin still doubles: nothing is left to learn from them."""
        margin = row.get("rewards/margins")
        if margin is None or row.get("rewards/accuracies") != 1.0:
            self._in_a_row["margin"] = 0
            return None
        if self._in_a_row["margin"] == 0:
            self._first_margin = margin
        long = self._lasts("margin")
        if not long or margin < 2 * self._first_margin:
            return None
        return (
            f"every pair has been right for {self._in_a_row['margin']} steps while the margin grew from "
            f"{self._first_margin:.3g} to {margin:.3g}: the policy drifts on what it knows; stop earlier"
        )

    def _alpha(self, row: Mapping[str, Any]) -> str | None:
        """α has been at its clamp for long."""
        alpha = row.get("rc/alpha")
        limit = math.inf if self._alpha_max is None else math.log(self._alpha_max)
        if alpha is None or abs(math.log(alpha)) < limit * (1 - 1e-9):
            self._in_a_row["alpha"] = 0
            return None
        if not self._lasts("alpha"):
            return None
        return (
            f"α has been at its clamp ({alpha:.3g}) for {self._in_a_row['alpha']} steps: one side's score "
            "has nearly vanished, see dynamics/score_norm_chosen and _rejected; rc.alpha_max is the clamp"
        )

    def _lasts(self, sign: str) -> bool:
        self._in_a_row[sign] += 1
        return self._in_a_row[sign] >= self._watch.patience
