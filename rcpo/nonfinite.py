"""Numbers gone wrong: a step whose loss, log-probs or gradient are not finite is recorded, and ends the run.

All ranks judge by reduced values, so they agree on the step. fp16's overflows belong to the loss scaler.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from rcpo import distributed
from rcpo.config import RunError, TrainConfig
from rcpo.tracking.jsonl import replace_text
from rcpo.types import PairLogps, TokenBatch

FOLDER = "nonfinite"


class NonFinite(RunError):
    """A step ended the run, on all ranks."""


class NonFiniteWatch:
    """Keeps a step's pairs until the step is judged; counts the steps whose numbers were not finite."""

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        self.folder = run_dir / FOLDER
        self.skips = config.on_nonfinite == "skip"
        self.limit = config.max_nonfinite
        self.steps = 0
        self.in_a_row = 0
        self._seen: list[tuple[list[str], PairLogps]] = []

    def keep(self, batch: TokenBatch, pairs: PairLogps) -> None:
        """A micro-batch's pairs; they hold on to B numbers each, not to the graph."""
        real = (batch.weights > 0).tolist()
        ids = [name for name, weight in zip(batch.example_ids, real, strict=True) if weight > 0]
        detached = {
            field.name: value.detach()
            for field in fields(pairs)
            if (value := getattr(pairs, field.name)) is not None
        }
        self._seen.append((ids, PairLogps(**detached)))

    def judge(self, bad: bool, row: dict[str, Any]) -> None:
        """Closes a step; `bad` and `row` are the same on all ranks. Collective where `bad`.

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
