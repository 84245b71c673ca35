"""Finds runs in folders and reads what each left behind, however far it came."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpo.errors import ConfigError
from rcpo.report.foreign import origin_of, read_foreign
from rcpo.runs.comparison import RunSummary, rule_of, run_values, settings_of_result
from rcpo.runs.folder import (
    CHECKPOINT_RECORDS,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATED,
    EVALUATED_CONFIG,
    EVALUATION_FILE,
    FINISHED_FILE,
    JOB_FILE,
    JUDGE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OUTCOME_FILE,
    SAMPLES_FILE,
    is_locked,
    is_sweeping,
    read_evaluation,
    read_lines,
    read_object,
    read_rows,
    read_settings,
)
from rcpo.runs.inputs import EVALUATION_SETTINGS, PAIRS
from rcpo.system.text import text_lines

Column = NDArray[np.float64]

LATER = ("eval/harness/", "eval/judge/")  # what `rcpo evaluate` alone measures
PLANNED = "train.max_steps"  # the key of how many steps a run is to take
STARTING = 60.0  # seconds in which a run that has just been configured takes its lock
LOG_TAIL = 200_000  # bytes of rcpo.log that are searched for the end of a failed run
# a traceback's last line: a class by its module, or a built-in one
_EXCEPTION = re.compile(r"^(?:(?:\w+\.)+([A-Z]\w*)|(\w*(?:Error|Exception|Interrupt|Exit)))(?::\s*(.*))?$")


class Status(Enum):
    """How far a run came."""

    FINISHED = "finished"
    RUNNING = "running"
    QUEUED = "queued"  # configured and waiting for its turn, in a sweep or on a cluster
    ENDED = "ended early"
    EVALUATED = "evaluated"  # a model that was not trained here


@dataclass(frozen=True)
class Run:
    """One run's folder as read at one moment; a file that is missing or torn is empty here."""

    name: str
    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    evaluation: dict[str, float]
    judge: dict[str, Any]
    environment: dict[str, Any]
    samples: list[dict[str, Any]]
    status: Status
    error: str | None
    origin: str = ""  # the tool that trained it, where it was not rcpo

    @cached_property
    def steps(self) -> Column:
        """The steps that were trained and logged, shape (N,)."""
        return self.column("step")

    def column(self, key: str) -> Column:
        """A metric of each trained step, shape (N,), NaN where it is null or absent."""
        if key not in self._columns:
            values = [_number(row.get(key)) for row in self._trained]
            self._columns[key] = np.array(values, dtype=np.float64)
        return self._columns[key]

    @cached_property
    def _columns(self) -> dict[str, Column]:
        return {}

    @cached_property
    def _trained(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    def has(self, key: str) -> bool:
        """Whether any trained step has a number there."""
        return any(row.get(key) is not None for row in self._trained)

    def held_out(self, key: str) -> tuple[Column, Column]:
        """Steps and values of `eval/key`, taken during training or of checkpoints, each of shape (M,)."""
        records = [row for row in [*self.rows, *self.checkpoints] if row.get(f"eval/{key}") is not None]
        found = sorted({row["step"]: row[f"eval/{key}"] for row in records}.items())
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    @property
    def evaluation_is_final(self) -> bool:
        """Whether `evaluation` is of the trained weights, not of an evaluation on the way to them."""
        return self.status is not Status.RUNNING and self.status is not Status.ENDED and not self.origin

    @property
    def last_evaluated(self) -> int | None:
        """The last step after which the rows have held-out values; None where they have none."""
        return _last_evaluated(self.rows)

    @property
    def last_step(self) -> int:
        """The last logged step; 0 before the first."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run is to take, from its limit or its pace; None before the first."""
        limit = self.settings.get(PLANNED)
        if limit is not None:
            return int(limit)
        epoch = self.column("epoch")
        if not len(epoch) or not epoch[-1] > 0:
            return None
        return max(self.last_step, round(self.steps[-1] / epoch[-1] * self.settings.get("train.epochs", 1)))

    @property
    def calibrated(self) -> bool:
        return bool(self.settings.get("rc.enabled"))

    @property
    def loops(self) -> bool:
        """Whether α followed the movement of fresh pairs, which the rows then tell."""
        return rule_of(self.settings) == "loop" and self.has("rc/winner")

    @property
    def summary(self) -> RunSummary:
        """The run as comparisons see it."""
        return RunSummary(
            self.name,
            settings_of_result(self.folder, self.settings),
            run_values(self.folder, self.evaluation, self.rows),
        )


def find_runs(folder: Path) -> list[Path]:
    """The run folders in `folder`, itself one or holding them at any depth, in natural order."""
    if _is_run(folder):
        return [folder]
    found = []
    for place, children, _ in os.walk(folder, onerror=_refuse_unreadable):
        children[:] = [child for child in children if not _is_snapshot(Path(place, child))]
        inside = [child for child in children if _is_run(Path(place, child))]
        found += [Path(place, child) for child in inside]
        children[:] = [child for child in children if child not in inside and not child.startswith(".")]
    return sorted(found, key=lambda path: natural(str(path)))


def _refuse_unreadable(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a submitted job's copy of the code."""
    return (folder / "rcpo" / "__init__.py").is_file()


def natural(text: str) -> list[Any]:
    """A sorting key by which run 10 comes after run 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _is_run(folder: Path) -> bool:
    if origin_of(folder) is not None:
        return True
    config = _config(folder)
    return config.is_file() and not (folder / "config.json").exists() and not _composes(config)


def _composes(config: Path) -> bool:
    """Whether a config.yaml is a primary configuration, which a run's never is: it lists defaults."""
    try:
        with config.open(encoding="utf-8", errors="replace") as file:
            return any(line.startswith("defaults:") for line in file)
    except OSError:
        return False


def _config(folder: Path) -> Path:
    """A run's configuration; that of its evaluation for a model that was not trained here."""
    own = folder / CONFIG_FILE
    return own if own.exists() else folder / EVALUATED_CONFIG


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in all folders, each once, with names that tell them apart; raises ConfigError without any."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give the folders of runs or sweeps")
    paths = list(dict.fromkeys(path.resolve() for folder in folders for path in find_runs(folder)))
    if not paths:
        shown = ", ".join(map(str, folders))
        raise ConfigError(
            f"no run in {shown}: a run's folder holds a {CONFIG_FILE}, which `rcpo train` writes; other "
            "tools leave a trainer_state.json"
        )
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as all need to differ."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder, also of another tool.

    A run whose config.yaml cannot be read has no settings, and that as its error.
    """
    if origin_of(folder) is not None:
        return _read_other(folder, name)
    rows = read_rows(folder / METRICS_FILE)
    error = read_object(folder / OUTCOME_FILE).get("reason") or _last_error(folder / "rcpo.log")
    settings: dict[str, Any] = {}
    try:
        settings = read_settings(_config(folder))
    except ConfigError as problem:
        error = str(problem)
    status = _status(folder, bool(rows), error)
    return Run(
        name=name,
        folder=folder,
        settings=settings,
        rows=rows,
        checkpoints=read_rows(folder / CHECKPOINT_RECORDS),
        evaluation=_evaluation(folder, rows),
        judge=read_object(folder / JUDGE_FILE),
        environment=read_object(folder / ENVIRONMENT_FILE),
        samples=read_lines(folder / SAMPLES_FILE),
        status=status,
        error=error if status is Status.ENDED else None,
    )


def _last_evaluated(rows: Sequence[Mapping[str, Any]]) -> int | None:
    return max((row["step"] for row in rows if any(key.startswith("eval/") for key in row)), default=None)


def _evaluation(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of evaluation.json.

    Of a run that was killed in its last evaluation they are those of a step before, and left out, but for
    what benchmarks and a judge measured later.
    """
    values, finished = read_evaluation(folder / EVALUATION_FILE), read_object(folder / FINISHED_FILE)
    later = PAIRS in read_object(folder / EVALUATION_SETTINGS)
    if finished.get(EVALUATED, True) or later or _last_evaluated(rows) == finished.get("step"):
        return values
    return {key: value for key, value in values.items() if key.startswith(LATER)}


def _read_other(folder: Path, name: str) -> Run:
    """A run of another tool, as far as its log tells."""
    log = read_foreign(folder)
    taken = max([log.taken or 0, *(row["step"] for row in log.rows)])
    early = log.planned is not None and taken < log.planned
    return Run(
        name=name,
        folder=folder,
        settings=log.settings | ({} if log.planned is None else {PLANNED: log.planned}),
        rows=log.rows,
        checkpoints=[],
        evaluation=log.evaluation,
        judge={},
        environment={},
        samples=[],
        status=Status.ENDED if early else Status.FINISHED,
        error=None,
        origin=log.origin,
    )


def _status(folder: Path, trained: bool, error: str | None) -> Status:
    if (folder / FINISHED_FILE).exists():
        return Status.FINISHED
    if is_locked(folder):
        return Status.RUNNING
    if trained or error is not None:
        return Status.ENDED
    if (folder / EVALUATION_FILE).exists():
        return Status.EVALUATED
    if not (folder / LOCK_FILE).exists() and (is_submitted(folder) or is_sweeping(folder.parent)):
        return Status.QUEUED
    age = time.time() - _config(folder).stat().st_mtime
    return Status.RUNNING if age < STARTING else Status.ENDED


def is_submitted(folder: Path) -> bool:
    """Whether a cluster's job was submitted that trains in the folder, by itself or as one of a sweep's."""
    if (folder / JOB_FILE.format("train")).exists():
        return True
    return str(folder) in read_object(folder.parent / JOB_FILE.format("sweep")).get("runs", ())


def _last_error(log: Path) -> str | None:
    """The exception, refusal or signal that ended the run, by its log; None where the log names none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            lines = text_lines(file.read().decode("utf-8", "replace"))
    except OSError:
        return None
    for line in reversed(lines):
        if match := _EXCEPTION.match(line):
            return match[3] or match[2] or match[1]
        if "] - refused: " in line:
            return line.split("] - refused: ", 1)[1]
    return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
