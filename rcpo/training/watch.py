"""Numbers gone wrong: a step whose loss, log-probs or gradient are not finite is recorded, and ends the run.

All ranks judge by reduced values, so they agree on the step. fp16's overflows belong to the loss scaler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rcpo.config.schema import RunConfig, TrainConfig
from rcpo.errors import RunError
from rcpo.method.types import PairLogps, TokenBatch
from rcpo.runs.folder import NONFINITE
from rcpo.system import distributed
from rcpo.system.files import replace_text


class NonFinite(RunError):
    """A step ended the run, on all ranks."""


class NonFiniteWatch:
    """Keeps a step's pairs until the step is judged; counts the steps whose numbers were not finite."""

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        self.folder = run_dir / NONFINITE
        self.skips = config.on_nonfinite == "skip"
        self.limit = config.max_nonfinite
        self.steps = 0
        self.in_a_row = 0
        self._seen: list[tuple[list[str], PairLogps]] = []

    def keep(self, batch: TokenBatch, pairs: PairLogps) -> None:
        """A micro-batch's pairs; they hold on to B numbers each, not to the graph."""
        real = batch.on_host.weights.tolist()
        ids = [name for name, weight in zip(batch.example_ids, real, strict=True) if weight > 0]
        detached = {
            field.name: value.detach()
            for field in fields(pairs)
            if (value := getattr(pairs, field.name)) is not None
        }
        self._seen.append((ids, PairLogps(**detached)))

    def judge(self, bad: bool, row: dict[str, Any]) -> None:
        """Close a step; `bad` and `row` are the same on all ranks. Collective where `bad`.

        Raises NonFinite, after writing the record, where the run is to stop.
        """
        seen, self._seen = self._seen, []
        if not bad:
            self.in_a_row = 0
            return
        self.steps += 1
        self.in_a_row += 1
        path = self.folder / f"step-{row['step']}.json"
        shares = distributed.gather_objects([_record(ids, pairs) for ids, pairs in seen])
        if distributed.is_main():
            self.folder.mkdir(exist_ok=True)
            record = {"metrics": _plain(row), "ranks": shares}
            replace_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        what = f"the loss or gradient of step {row['step']} is not finite; its examples are in {path}"
        if not self.skips:
            raise NonFinite(f"{what}; no weight was changed by it (train.on_nonfinite=skip leaves it out)")
        if self.in_a_row > self.limit:
            raise NonFinite(f"{what}; more than train.max_nonfinite={self.limit} such steps in a row")

    def metrics(self) -> dict[str, int]:
        """The count for a metrics row, where steps may be skipped."""
        return {"nonfinite_steps": self.steps} if self.skips else {}

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.in_a_row = state["steps"], state["in_a_row"]


def _record(ids: list[str], pairs: PairLogps) -> dict[str, Any]:
    values = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
    return {"ids": ids} | {
        name: [_number(number) for number in value.tolist()]
        for name, value in values.items()
        if value is not None
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in row.items()}


def _number(value: Any) -> Any:
    """The value, or "nan", "inf" and "-inf", which JSON has no numbers for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


CERTAIN = -0.1  # nats per token: a probability of 0.9, which has little room above and much below
FLOOR = -15.0  # nats per token: a probability of 3e-7, from which a loser hardly falls any more


def tokens_per_winner(reduction: str, lengths: np.ndarray) -> float:
    """Return what divides a winner's log-ratio to give nats per token, from its reduction and the lengths.

    Only sums grow with the response. A length of 0 is that of a response that unpaired data does not have.
    """
    there = lengths[lengths > 0]
    return float(there.mean()) if reduction == "sum" and len(there) else 1.0


class DivergenceWatch:
    """Looks at the rows of a run, the same on all ranks; `tokens` is what `tokens_per_winner` gives.

    `paired` says whether the objective has a rejected side, without which nothing can be calibrated.
    """

    def __init__(self, config: RunConfig, tokens: float, *, paired: bool = True) -> None:
        self._watch = config.watch
        self._loops = config.rc.loops
        self._paired = paired
        self._target = config.rc.target
        self._alpha_max = config.rc.alpha_max
        self._unit = tokens
        self._in_a_row = {"margin": 0, "alpha": 0}
        self._first_margin = 0.0
        self._said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        in_a_row = dict(self._in_a_row)  # a copy: a checkpoint is written while training goes on
        return {"in_a_row": in_a_row, "first_margin": self._first_margin, "said": sorted(self._said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what was counted, and which warnings were issued: none of them is issued again."""
        self._in_a_row, self._first_margin = dict(state["in_a_row"]), state["first_margin"]
        self._said = set(state["said"])

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """What this row gives reason to say for the first time; numbers that are not finite say nothing."""
        row = {name: value for name, value in row.items() if value is None or math.isfinite(value)}
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
            f"the winner lost {-fall / self._unit:.2f} nats per token against the reference "
            f"(watch.winner={self._watch.winner:g}); {self._remedy(row)}"
        )

    def _remedy(self, row: Mapping[str, Any]) -> str:
        """Name the closed loop, or what keeps a loop that is already closed from holding the winner."""
        slower = "a lower optim.lr slows it"
        if self._loops:
            return f"{self._why_the_loop_fails(row)}; {slower}"
        if not self._paired:
            return slower
        inside = row.get("rc/in_band", row.get("dynamics/in_band"))
        although = "this batch's band, in which the step is, does not govern other text: " if inside else ""
        return f"{although}rc=loop holds the winner near rc.target={self._target:g}, and {slower}"

    def _why_the_loop_fails(self, row: Mapping[str, Any]) -> str:
        """The reasons that the row shows, of those for which a loop lets the winner fall."""
        reasons = []
        if (wanted := row.get("rc/saturated")) or self._clamped(row):
            often = f" in {wanted} reading{'s' * (wanted > 1)}" if wanted else ""
            reasons.append(f"it asked for more than rc.alpha_max={self._alpha_max}{often}")
        winner, loser = row.get("logps/chosen"), row.get("logps/rejected")
        start = None if winner is None else (winner - row["logratios/chosen"]) / self._unit
        if start is not None and start > CERTAIN:
            reasons.append(
                f"the winner was almost certain under the reference ({start:.2f} nats per token) "
                "and can only fall"
            )
        if loser is not None and loser / self._unit < FLOOR:
            reasons.append(f"the loser is at its floor ({loser / self._unit:.1f} nats per token)")
        return (
            f"rc=loop does not hold it: {' and '.join(reasons)}" if reasons else "rc=loop has not caught up"
        )

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
        if not self._clamped(row):
            self._in_a_row["alpha"] = 0
            return None
        if not self._lasts("alpha"):
            return None
        why = (
            "the loop asks for more, see rc/winner and rc/saturated"
            if self._loops
            else "one side's score has nearly vanished, see dynamics/score_norm_chosen and _rejected"
        )
        return (
            f"α has been at its clamp ({row['rc/alpha']:.3g}) for {self._in_a_row['alpha']} steps: {why}; "
            "rc.alpha_max is the clamp"
        )

    def _clamped(self, row: Mapping[str, Any]) -> bool:
        alpha = row.get("rc/alpha")
        limit = math.inf if self._alpha_max is None else math.log(self._alpha_max)
        return alpha is not None and abs(math.log(alpha)) >= limit * (1 - 1e-9)

    def _lasts(self, sign: str) -> bool:
        self._in_a_row[sign] += 1
        return self._in_a_row[sign] >= self._watch.patience
