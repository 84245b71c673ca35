"""What a sweep showed: `sweep.json`, the same as Markdown, and a table on the terminal. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE, REFUSED, Outcome, read_outcome
from rcpo.runs.comparison import (
    METRICS,
    REPETITION,
    STEPS_IN_BAND,
    Condition,
    Contrast,
    Metric,
    Overall,
    RunSummary,
    conditions,
    contrasts,
    overall,
    rule_of,
    summarise_run,
)
from rcpo.runs.folder import read_object, stored_state, taking_turns
from rcpo.runs.inputs import completed
from rcpo.runs.statistics import CONFIDENCE, Difference, Spread, spread
from rcpo.system.files import write_atomically

SWEEP_FILE, SWEEP_TABLE = "sweep.json", "sweep.md"
_RUN_FILES = ("config.yaml", "outcome.json")  # of a run that began, or was refused
SEVERAL = 3  # contrasts, of which a median says more than they do
# 1: more is better, −1: less; a metric that is not here has no winner
BETTER = {
    "eval/token_logratios/chosen": 1,
    "eval/token_logratios/rejected": -1,
    "eval/winner_fell": -1,
    "eval/rewards/accuracies": 1,
    "eval/exact_match": 1,
    REPETITION: -1,
    STEPS_IN_BAND: 1,
}


@dataclass(frozen=True)
class Comparison:
    """The complete runs of a sweep beside each other, and why the others are not."""

    runs: list[RunSummary]
    incomplete: dict[str, Outcome]
    conditions: list[Condition]
    contrasts: list[Contrast]

    @property
    def metrics(self) -> list[Metric]:
        """The shown metrics that at least one run has."""
        return [metric for metric in METRICS if any(metric.key in run.values for run in self.runs)]

    def winner(self, key: str) -> str | None:
        """The condition with the best mean; None of one condition, a tie, or a metric without a direction.

        A condition of which some run has no value, because it diverged, is not the best by the others.
        """
        whole = [c for c in self.conditions if len(c.values(key)) == len(c.runs)]
        found = [(c.label, s.mean) for c in whole if (s := spread(c.values(key))) is not None]
        if key not in BETTER or len(found) < 2:
            return None
        ranked = sorted(found, key=lambda pair: -BETTER[key] * pair[1])
        return None if ranked[0][1] == ranked[1][1] else ranked[0][0]


def compare(sweep_dir: Path) -> Comparison:
    """Read the runs in a sweep's folder; raise ConfigError where there is none."""
    if sweep_dir.exists() and not sweep_dir.is_dir():
        raise ConfigError(f"{sweep_dir} is not a folder: give the folder of a sweep")
    inside = [path for path in sorted(sweep_dir.iterdir()) if path.is_dir()] if sweep_dir.exists() else []
    folders = [path for path in inside if any((path / name).exists() for name in _RUN_FILES)]
    if not folders:
        raise ConfigError(f"{sweep_dir} holds no runs: it is not the folder of a sweep")
    runs: list[RunSummary] = []
    rest: dict[str, Outcome] = {}
    for folder in folders:
        try:
            if completed(folder):
                runs.append(summarise_run(folder))
            else:
                rest[folder.name] = _why_incomplete(folder)
        except ConfigError as error:  # a damaged record, which costs no other run its place
            rest[folder.name] = Outcome(REFUSED, str(error))
    found = conditions(runs)
    return Comparison(runs, rest, found, contrasts(found))


def conclude(sweep_dir: Path, search: Mapping[str, Any] | None = None) -> Comparison:
    """Compare the runs in a sweep's folder and write it down; processes that do so take turns."""
    with taking_turns(sweep_dir / f".{SWEEP_FILE}.lock"):
        comparison = compare(sweep_dir)
        write(comparison, sweep_dir, search)
    return comparison


def _why_incomplete(folder: Path) -> Outcome:
    outcome = read_outcome(folder)
    if outcome is not None and outcome.code != DONE:
        return outcome
    state = stored_state(folder)
    saved = "" if state is None else f"; saved after step {state['step']}"
    return Outcome(-1, f"under way, or lost without a word{saved}")


def write(comparison: Comparison, sweep_dir: Path, search: Mapping[str, Any] | None = None) -> None:
    """Write sweep.json, with everything that a report needs, and sweep.md; a study that it had stays."""
    search = search or read_object(sweep_dir / SWEEP_FILE).get("search")
    record = as_dict(comparison) | ({} if search is None else {"search": search})
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(sweep_dir / SWEEP_FILE, f"{text}\n".encode())
    write_atomically(sweep_dir / SWEEP_TABLE, markdown(comparison).encode())


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison for JSON: every value of evaluation.json, intervals of the examples left out."""
    everything = {key for run in comparison.runs for key in run.values}
    keys = sorted(key for key in everything if not key.endswith(("/low", "/high")))
    by_name = {run.name: c.label for c in comparison.conditions for run in c.runs}
    return {
        "confidence": CONFIDENCE,
        "metrics": [{**asdict(metric), "better": BETTER.get(metric.key)} for metric in METRICS],
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "condition": by_name[run.name],
                "values": {key: run.values[key] for key in keys if key in run.values},
            }
            for run in comparison.runs
        ],
        "incomplete": [{"name": name, **asdict(why)} for name, why in comparison.incomplete.items()],
        "conditions": [
            {
                "label": c.label,
                "seeds": [run.seed for run in c.runs],
                "means": _present({key: spread(c.values(key)) for key in keys}),
            }
            for c in comparison.conditions
        ],
        "contrasts": [
            {
                "label": c.label,
                "base": c.base.label,
                "calibrated": c.calibrated.label,
                "differences": _present({key: c.difference(key) for key in keys}),
            }
            for c in comparison.contrasts
        ],
        "overall": _present({key: overall(comparison.contrasts, key) for key in keys}),
        "winners": {metric.key: comparison.winner(metric.key) for metric in comparison.metrics},
    }


def _present(values: Mapping[str, Spread | Difference | Overall | None]) -> dict[str, Any]:
    return {key: asdict(value) for key, value in values.items() if value is not None}


# a table's title, its header, and its rows
Sheet = tuple[str, list[str], list[list[str]]]


def sheets(comparison: Comparison, strong: str = "**{}**") -> list[Sheet]:
    """The tables of a comparison; `strong` marks winners, and differences whose interval leaves out zero."""
    found = []
    if comparison.conditions:
        found.append(_of_conditions(comparison, strong))
    if comparison.contrasts:
        found.append(_of_contrasts(comparison, strong))
    for rule in dict.fromkeys(rule_of(c.calibrated.settings) for c in comparison.contrasts):
        same = [c for c in comparison.contrasts if rule_of(c.calibrated.settings) == rule]
        if len(same) >= SEVERAL:
            found.append(_over_contrasts(same, comparison.metrics, rule))
    if comparison.incomplete:
        rows = [[name, str(why.code), why.reason or ""] for name, why in comparison.incomplete.items()]
        found.append(("not complete", ["run", "exit code", "reason"], rows))
    return found


def _of_conditions(comparison: Comparison, strong: str) -> Sheet:
    metrics = comparison.metrics
    winners = {metric.key: comparison.winner(metric.key) for metric in metrics}
    rows = []
    for c in comparison.conditions:
        cells = [(c.label == winners[m.key], c.show(m)) for m in metrics]
        rows.append([c.label, str(len(c.runs)), *_marked(cells, strong)])
    title = "mean ± standard deviation over seeds; log-ratios in nats per token"
    return title, ["runs of", "n", *(metric.title for metric in metrics)], rows


def _of_contrasts(comparison: Comparison, strong: str) -> Sheet:
    metrics = comparison.metrics
    rows = []
    for contrast in comparison.contrasts:
        differences = [contrast.difference(m.key) for m in metrics]
        pairs, shown = contrast.show(metrics)
        cells = [(d is not None and d.clear, text) for d, text in zip(differences, shown)]
        rows.append([contrast.label, str(pairs), *_marked(cells, strong)])
    title = f"with calibration minus rc=off, paired by seed, {CONFIDENCE:.0%} t interval"
    return title, ["runs of", "pairs", *(metric.title for metric in metrics)], rows


def _over_contrasts(contrasts: Sequence[Contrast], metrics: Sequence[Metric], rule: str) -> Sheet:
    """One row a metric: what most readers of a long sweep want first."""
    rows = []
    for metric in metrics:
        found = overall(contrasts, metric.key)
        if found is None:
            continue
        rows.append(
            [
                metric.title,
                metric.show(found.base),
                metric.show(found.calibrated),
                metric.show_difference(Difference(found.difference, None, None, 1)),
                f"{found.higher} ({found.clearly_higher})",
                f"{found.lower} ({found.clearly_lower})",
            ]
        )
    title = (
        f"medians over {len(contrasts)} contrasts, and how many rc={rule} raised and lowered, "
        f"in brackets with a {CONFIDENCE:.0%} interval that leaves out zero"
    )
    return title, ["", "off", rule, "difference", "higher", "lower"], rows


def _marked(cells: Iterable[tuple[bool, str]], strong: str) -> list[str]:
    return [strong.format(text) if mark else text for mark, text in cells]


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown."""
    parts = []
    for title, header, rows in sheets(comparison):
        lines = [f"{title[0].upper()}{title[1:]}:", "", _row(header), "|" + "---|" * len(header)]
        parts.append("\n".join([*lines, *map(_row, rows)]))
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def show(comparison: Comparison, console: Console) -> None:
    """The tables on the terminal."""
    for title, header, rows in sheets(comparison, strong="\0{}"):
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(_rich, row))
        console.print(table)


def _rich(cell: str) -> str:
    return f"[bold]{escape(cell[1:])}[/]" if cell.startswith("\0") else escape(cell)
