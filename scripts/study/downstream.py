"""`python scripts/study/downstream.py START RUN…`: how runs differ from a start in downstream tasks.

START and RUN are folders that `rcpo evaluate` wrote with the same `eval.tasks`. Prints a row for each task's
metric: the mean over the documents of START, then what each RUN adds to it, both with 95 % intervals. The
runs answer the same documents, so a difference's interval is that of the differences document by document.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rcpo.runs.folder import EVALUATION, HARNESS_FOLDER

# what a document's line holds by the harness's names; LAMBADA's perplexity is kept there as a log-likelihood
NAMES = {"acc": "accuracy", "acc_norm": "accuracy, by length", "perplexity": "log-likelihood, nats"}


def documents(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    """A task's documents by their contents' hash."""
    lines = (folder / EVALUATION / HARNESS_FOLDER / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["doc_hash"]: row for row in map(json.loads, lines)}


def interval(values: list[float]) -> str:
    """Mean ± 1.96 standard errors."""
    error = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):+.3f} ± {error:.3f}"


def rows(start: Path, runs: list[Path]) -> list[list[str]]:
    """A table's rows: task, metric, documents, the start's mean, each run's difference."""
    found = []
    for file in sorted((start / EVALUATION / HARNESS_FOLDER).glob("*.jsonl")):
        base = documents(start, file.stem)
        others = [documents(run, file.stem) for run in runs]
        for run, other in zip(runs, others, strict=True):
            if other.keys() != base.keys():
                raise SystemExit(f"{run}: {file.stem} was asked about other documents than in {start}")
        first = next(iter(base.values()))
        for key in NAMES.keys() & first.keys():
            own = [float(row[key]) for row in base.values()]
            cells = [interval(own).removeprefix("+")]
            for other in others:
                cells.append(interval([float(other[name][key]) - value for name, value in zip(base, own)]))
            found.append([file.stem, NAMES[key], str(len(own)), *cells])
    return sorted(found)


def main(start: Path, runs: list[Path]) -> None:
    header = ["task", "metric", "documents", start.name, *(run.name for run in runs)]
    for cells in (header, ["---"] * len(header), *rows(start, runs)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
