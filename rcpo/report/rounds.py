"""The rounds of `rcpo iterate` beside each other: in a report, in iterate.json and .md, on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from rcpo.evaluation.summary import equal_rewards
from rcpo.report.document import Section
from rcpo.report.document import Table as Cells
from rcpo.runs.comparison import METRICS, Metric
from rcpo.runs.folder import EVALUATION_FILE, METRICS_FILE, read_evaluation, read_object, read_rows
from rcpo.system.files import replace_text

SETTINGS_FILE = "iterate.yaml"
ROUNDS_FILE, ROUNDS_TABLE = "iterate.json", "iterate.md"
SAMPLES_BAND = "dynamics/samples/"
BAND = ("band_lower", "band_center", "band_upper")
COLUMNS = (
    Metric("pairs", "pairs", "count"),
    Metric("score_mean", "mean score"),
    *(metric for metric in METRICS if metric.key.startswith("eval/")),
    *(Metric(f"{SAMPLES_BAND}{name}", f"across samples: {name.replace('_', ' ')}") for name in BAND),
)


@dataclass(frozen=True)
class Round:
    """What a round left behind: `values` by key, of pairs.json, evaluation.json and metrics.jsonl."""

    number: int
    values: dict[str, float]


def rounds(folder: Path) -> list[Round]:
    """The rounds of an iteration as far as they came."""
    return [Round(number, _values(place)) for number, place in enumerate(_folders(folder))]


def _folders(folder: Path) -> Iterator[Path]:
    number = 0
    while (place := folder / f"round-{number}").is_dir():
        yield place
        number += 1


def _values(place: Path) -> dict[str, float]:
    about = read_object(place / "sample" / "pairs.json")
    found = {key: float(about[key]) for key in ("pairs", "score_mean") if about.get(key) is not None}
    rows = read_rows(place / "train" / METRICS_FILE)
    for name in BAND:
        values = [
            row[f"{SAMPLES_BAND}{name}"] for row in rows if row.get(f"{SAMPLES_BAND}{name}") is not None
        ]
        if values:
            found[f"{SAMPLES_BAND}{name}"] = fmean(values)
    evaluated = read_evaluation(place / "evaluate" / EVALUATION_FILE)
    if equal_rewards(evaluated):  # round 0 is its own reference
        evaluated.pop("eval/rewards/accuracies", None)
    return {**found, **evaluated}


def table(found: Sequence[Round]) -> tuple[list[str], list[list[str]]]:
    """The header and a row for each round, of the columns that some round has."""
    columns = [metric for metric in COLUMNS if any(metric.key in one.values for one in found)]
    rows = [
        [str(one.number), *(_cell(metric, one.values.get(metric.key)) for metric in columns)] for one in found
    ]
    return ["round", *(metric.title for metric in columns)], rows


def _cell(metric: Metric, value: float | None) -> str:
    if metric.unit == "count" and value is not None:
        return f"{value:,.0f}"
    if metric.key == "eval/exact_match" and value is not None:
        return f"{100 * value:.1f} %"  # rounds differ by less than a percent
    return metric.show(value)


def write(folder: Path) -> list[Round]:
    """Write iterate.json and iterate.md of what is there."""
    found = rounds(folder)
    record: dict[str, Any] = {"rounds": [{"round": one.number, **one.values} for one in found]}
    replace_text(folder / ROUNDS_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
    header, rows = table(found)
    lines = [_line(header), "|" + "---|" * len(header), *map(_line, rows)]
    replace_text(folder / ROUNDS_TABLE, "\n".join(lines) + "\n")
    return found


def section(folders: Sequence[Path]) -> Section | None:
    """The rounds as a part of a report; None where no folder is that of an iteration."""
    blocks = [
        Cells(*table(rounds(folder)), caption="Round 0 is the model before them.", texts=())
        for folder in folders
        if (folder / SETTINGS_FILE).is_file()
    ]
    return Section("Rounds", blocks) if blocks else None


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def conclude(folder: Path) -> None:
    """Write the summary and show it."""
    header, rows = table(write(folder))
    shown = Table(title="rounds; round 0 is the model before them", title_justify="left")
    for column in header:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    print(f"rcpo: draw the rounds: rcpo report {os.path.relpath(folder)}", flush=True)
