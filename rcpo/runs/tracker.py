"""The one place that a run reports to; every rank holds a Tracker and only the main one speaks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from rcpo.config.schema import RunConfig
from rcpo.runs.backends import Backends
from rcpo.runs.display import Display, open_display
from rcpo.runs.folder import METRICS_FILE
from rcpo.runs.jsonl import JsonLines, Scalar, clean_row, truncate_after

log = logging.getLogger(__name__)

NOTHING_HELD_OUT = (
    "nothing is held out, so training evaluates nothing: set data.eval_fraction above 0, or data.eval_path; "
    "rcpo iterate evaluates after each round"
)
EVALUATION_LINE = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logratios/chosen",
    "logratios/rejected",
    "winner_fell",
    "exact_match",
)


class Tracker:
    """Rows of a run to metrics.jsonl, the trackers of `tracking`, and the terminal. A context manager.

    `step` counts optimizer steps. `resume_step` is the last step that a resumed run keeps: later rows are cut
    from metrics.jsonl, for they will be taken again; None starts the file afresh. Every method does nothing
    where `is_main` is false, and no tracker is imported there. `console` replaces the process's own.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        total_steps: int,
        is_main: bool,
        *,
        resume_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._outputs: _Outputs | None = None
        if is_main:
            self._outputs = _Outputs(run_dir, config, total_steps, resume_step, console or Console())

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code_of(error))

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of scalars with a `step`, later than any row before it.

        It takes in the values of an `evaluation` of the same step that came before it.
        """
        if self._outputs is not None:
            self._outputs.log(clean_row(row))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Print held-out values (`eval/…`) and keep them for the row of this step.

        Without a value it prints that nothing is held out. Call it before the step's `log`. Where no `log` of
        that step follows they become a row of their own; where it came already they go to the trackers alone,
        so no step has two rows.
        """
        if self._outputs is not None and values:
            self._outputs.evaluation(step, clean_row(values))
        elif self._outputs is not None:
            self._outputs.display.message(NOTHING_HELD_OUT)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answers of a step as a table in the trackers, with the columns of the first row."""
        if self._outputs is not None:
            self._outputs.samples(step, rows)

    def message(self, text: str) -> None:
        """A line for the terminal."""
        if self._outputs is not None:
            self._outputs.display.message(text)

    def warning(self, text: str) -> None:
        """A line for the terminal, the log and the trackers."""
        if self._outputs is not None:
            self._outputs.warning(text)

    def flush(self) -> None:
        """Have everything logged so far on disk, an evaluation that waits for its row too."""
        if self._outputs is not None:
            self._outputs.flush()

    def close(self, exit_code: int = 0) -> None:
        """Flush and close everything; a second call does nothing."""
        outputs, self._outputs = self._outputs, None
        if outputs is not None:
            outputs.close(exit_code)


def exit_code_of(error: BaseException | None) -> int:
    """The exit code that a process leaving with this exception has."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code if isinstance(error.code, int) else 1
    return 1


class _Outputs:
    """What the main rank holds open."""

    def __init__(
        self, run_dir: Path, config: RunConfig, total_steps: int, resume_step: int | None, console: Console
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if resume_step is None:
            path.unlink(missing_ok=True)
        else:
            truncate_after(path, resume_step)
        self._trackers = Backends(run_dir, config, resume_step, self._say)
        self._metrics = JsonLines(path)
        self._last_step = -1 if resume_step is None else resume_step
        self._pending: tuple[int, dict[str, Scalar]] | None = None
        self.display: Display = open_display(console, total_steps, max(self._last_step, 0))

    def log(self, row: dict[str, Scalar]) -> None:
        step = row["step"]
        assert isinstance(step, int), "a metrics row has an integer step"
        if self._pending is not None and self._pending[0] == step:
            row = _merge(row, self._pending[1])
            self._pending = None
        self._flush_pending()
        self._write(step, row)
        self.display.row(step, row)

    def evaluation(self, step: int, values: dict[str, Scalar]) -> None:
        self.display.message(evaluation_line(step, values))
        if step <= self._last_step:
            self._trackers.log({"step": step, **values})
            return
        if self._pending is not None and self._pending[0] == step:
            values = _merge(self._pending[1], values)
            self._pending = None
        self._flush_pending()
        self._pending = (step, values)

    def warning(self, text: str) -> None:
        log.info("warning: %s", text)
        self.display.message(f"warning: {text}")
        self._trackers.alert(text)

    def _say(self, text: str) -> None:
        """A line for the terminal, without the trackers."""
        self.display.message(text)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._trackers.table(step, rows)

    def flush(self) -> None:
        self._flush_pending()
        self._metrics.sync()
        self._trackers.flush()

    def _flush_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write(pending[0], {"step": pending[0], **pending[1]})

    def _write(self, step: int, row: dict[str, Scalar]) -> None:
        assert step > self._last_step, f"step {step} was logged after step {self._last_step}"
        self._last_step = step
        self._metrics.write(row)
        self._trackers.log(row)

    def close(self, exit_code: int) -> None:
        try:
            self._flush_pending()
        finally:
            try:
                self._metrics.close()
            finally:
                self._trackers.close(exit_code)
                self.display.close()


def _merge(first: Mapping[str, Scalar], second: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Both rows in one; their counts of non-finite values add up."""
    merged = {**first, **second}
    lost = (first.get("nonfinite") or 0) + (second.get("nonfinite") or 0)
    return {**merged, "nonfinite": lost} if lost else merged


def evaluation_line(step: int, values: Mapping[str, Scalar]) -> str:
    """The main held-out means as one line; the rest is in the row, intervals and all."""
    shown = [
        f"{name} {value:.4g}" for name in EVALUATION_LINE if (value := values.get(f"eval/{name}")) is not None
    ]
    return f"evaluation at step {step}: " + "  ".join(shown)
