"""`rcpo submit status`: jobs, their runs, how far they are, and the last metrics."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE, read_outcome
from rcpo.runs.folder import EVALUATION, JOB_FILE, METRICS_FILE, read_object
from rcpo.runs.inputs import completed
from rcpo.slurm.queue import Queued, Submitted, queue, read_submitted

_TAIL_BYTES = 1 << 16
PAIRS_FILE = "pairs.json"  # the last that a job of `rcpo submit iterate` writes when it samples
METRICS = {"loss": "loss", "winner": "logratios/chosen", "loser": "logratios/rejected", "alpha": "rc/alpha"}


@dataclass(frozen=True)
class JobLine:
    """A run of a job."""

    job: str
    state: str
    elapsed: str
    where: str
    run: Path
    row: dict[str, Any]
    age: float | None


def report_status(arguments: Sequence[str]) -> int:
    """Print the jobs submitted from these folders (outputs/), and from those one and two levels below them.

    Returns the exit code; raises ConfigError where there is none, RunError where SLURM does not answer.
    """
    folders = [Path(argument) for argument in arguments or ("outputs",)]
    found = [submitted for folder in folders for submitted in _submitted(folder)]
    if not found:
        raise ConfigError(f"nothing was submitted from {', '.join(map(str, folders))}; give a run's folder")
    known = queue()
    table = Table(title="jobs", title_justify="left")
    for column in ("job", "state", "elapsed", "nodes or reason", "run", "step", *METRICS, "written"):
        table.add_column(column, overflow="fold")
    for name, submitted in found:
        for line in lines(submitted, known, name):
            table.add_row(*map(escape, cells(line)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return DONE


def _submitted(folder: Path) -> Iterator[tuple[str, Submitted]]:
    names = [JOB_FILE.format(name) for name in ("train", "sweep", "sample", "evaluate")]
    for pattern in [f"{above}{name}" for above in ("", "*/", "*/*/") for name in names]:
        for path in sorted(folder.glob(pattern)):
            name = path.stem.removeprefix("job-")
            submitted = read_submitted(path.parent, name)
            assert submitted is not None
            yield name, submitted


def lines(submitted: Submitted, known: dict[str, Queued], name: str = "train") -> list[JobLine]:
    """A line for each run of a job (train, sweep, evaluate); `known` is what SLURM has of it."""
    found = []
    for index, folder in enumerate(map(Path, submitted.runs)):
        job = f"{submitted.job}_{index}" if submitted.array else submitted.job
        row, age = last_row(folder / METRICS_FILE)
        queued = known.get(job)
        if queued is None:  # SLURM forgets a job minutes after its end
            queued = Queued(evaluated(folder) if name == "evaluate" else left_behind(folder), "", "")
        found.append(JobLine(job, queued.state, queued.elapsed, queued.where, folder, row, age))
    return found


def left_behind(run_dir: Path) -> str:
    """What a run's folder says of its end."""
    outcome = read_outcome(run_dir)
    try:
        done = completed(run_dir)
    except ConfigError as error:  # a damaged record, which hides no other job
        return str(error)
    if done or read_object(run_dir / PAIRS_FILE).get("pairs"):
        return "DONE"
    if outcome is None or outcome.code == DONE:
        return "GONE"
    return f"exit code {outcome.code}: {outcome.reason}"


def evaluated(run_dir: Path) -> str:
    """What a run's folder says of its evaluation job's end."""
    outcome = read_outcome(run_dir / EVALUATION)
    if outcome is None:
        return "GONE"
    return "DONE" if outcome.code == DONE else f"exit code {outcome.code}: {outcome.reason}"


def last_row(path: Path) -> tuple[dict[str, Any], float | None]:
    """The last whole row of a metrics.jsonl, and the seconds since it was written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.readlines()
        age = time.time() - path.stat().st_mtime
    except OSError:
        return {}, None
    for line in reversed(tail):
        if line.endswith(b"\n"):
            with suppress(ValueError):  # torn, or damaged
                row = json.loads(line)
                if isinstance(row, dict):
                    return row, age
    return {}, age


def cells(line: JobLine) -> list[str]:
    """A line as text; what is not known stays empty."""
    values = [line.row.get(name) for name in METRICS.values()]
    shown = [f"{value:.4g}" if isinstance(value, int | float) else "" for value in values]
    age = "" if line.age is None else f"{line.age:.0f} s ago"
    run = os.path.relpath(line.run)
    return [line.job, line.state, line.elapsed, line.where, run, str(line.row.get("step", "")), *shown, age]
