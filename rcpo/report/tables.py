"""The tables of results: held-out metrics of a run, conditions and their differences, runs line by line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rcpo.evaluation.summary import ROWS, interval, judge_counts, judge_rows
from rcpo.report import words
from rcpo.report.document import Table
from rcpo.report.probes import ANSWERS, Probes, first_and_last
from rcpo.report.runs import Run, natural
from rcpo.runs.comparison import METRICS, Condition, Contrast, Metric
from rcpo.runs.statistics import rank_correlation

HARNESS = "eval/harness/"
JUDGED = (
    Metric("eval/judge/win_rate", "judged win rate", "share"),
    Metric("eval/judge/length_controlled_win_rate", "length-controlled win rate", "share"),
)
_OWN_TABLES = re.compile(r"eval/(?:by_length|harness|judge|dynamics(?:_parameters)?)/")


def downstream(values: Sequence[Mapping[str, float]]) -> list[Metric]:
    """The scores of finished models that any run has: exact match, accuracy, the judge's, the harness's."""
    present = {key for each in values for key in each}
    own = [metric for metric in (*METRICS, *JUDGED) if metric.key in present]
    scores = [metric for metric in own if metric.unit == "share" and metric.key in SCORES]
    tasks = sorted(key for key in present if key.startswith(HARNESS) and not key.endswith("stderr"))
    for key in tasks:
        share = all(0 <= each[key] <= 1 for each in values if key in each)
        scores.append(Metric(key, key.removeprefix(HARNESS).replace("/", " "), "share" if share else ""))
    return scores


OTHERS = {  # held-out means that have no row of their own in the evaluation's table
    f"{name}/{side}": f"{who}'s {title}"
    for side, who in (("chosen", "winner"), ("rejected", "loser"))
    for name, title in (
        ("rewards", "reward"),
        ("token_logps", "log-prob, nats per token"),
        ("token_logratios", "log-ratio, nats per token"),
    )
}
SCORES = {"eval/exact_match", "eval/rewards/accuracies", *(metric.key for metric in JUDGED)}


def held_out(run: Run) -> list[Table]:
    """Everything evaluation.json has: the means with their intervals, then what else was measured."""
    values = run.evaluation
    known, counts = {name for _, name, _ in ROWS}, {"examples", "logratios/examples"}
    others = sorted(
        key.removeprefix("eval/")
        for key in values
        if key.startswith("eval/") and not _OWN_TABLES.match(key) and not key.endswith(("/low", "/high"))
    )
    rows = [(title, interval(values, name, unit)) for title, name, unit in ROWS if f"eval/{name}" in values]
    others = [name for name in others if name not in known | counts]
    rows += [(OTHERS.get(name, name), interval(values, name, "other")) for name in others]
    count, compared = (values.get(f"eval/{name}") for name in ("examples", "logratios/examples"))
    caption = "" if count is None else f"{count:,.0f} held-out pairs; 95 % bootstrap intervals over prompts."
    if compared is not None:
        caption += f" Log-ratios are of {compared:,.0f} of the pairs (reference.track=true: of all)."
    tables = [Table(("held-out", "mean [95 % interval]"), rows, caption)] if rows else []
    return [*tables, *_judged(run), *_by_length(values), *scores(values), *_dynamics(values)]


def _by_length(values: Mapping[str, float]) -> list[Table]:
    cells: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        if key.startswith("eval/by_length/"):
            bucket, _, name = key.removeprefix("eval/by_length/").partition("/")
            cells.setdefault(bucket, {})[name] = value
    if not cells:
        return []
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    titles = {metric.key.removeprefix("eval/"): metric for metric in METRICS}
    rows = [
        (
            bucket,
            *(
                titles.get(name, Metric(name, name, "count" if name == "examples" else "")).show(
                    cell.get(name)
                )
                for name in names
            ),
        )
        for bucket, cell in sorted(cells.items(), key=lambda item: natural(item[0]))
    ]
    header = ("chosen response, tokens", *(titles[n].title if n in titles else n for n in names))
    return [Table(header, rows, "By length of the chosen response.", folded=True)]


def _judged(run: Run) -> list[Table]:
    rows = judge_rows(run.evaluation)
    if not rows:
        return []
    caption = f"{judge_counts(run.evaluation)}; 95 % bootstrap intervals over prompts."
    if run.judge:
        shown = {key: str(run.judge.get(key, "unknown")) for key in ("model", "against", "prompts")}
        caption += f" Judge: {shown['model']}; against: {shown['against']}; prompts: {shown['prompts']}."
    return [Table(("judged", "value [95 % interval]"), rows, caption)]


def scores(values: Mapping[str, float]) -> list[Table]:
    """The harness's scores with their standard errors."""
    rows = []
    for metric in downstream([values]):
        if not metric.key.startswith(HARNESS):
            continue
        error = values.get(f"{metric.key}/stderr")
        text = metric.show(values[metric.key])
        if error is not None:
            text += f" ± {100 * error:.1f}" if metric.unit == "share" else f" ± {error:.3f}"
        rows.append((metric.title, text))
    return [Table(("downstream", "score"), rows, "± is the harness's own standard error.")] if rows else []


def _dynamics(values: Mapping[str, float]) -> list[Table]:
    kinds = {"eval/dynamics/": "output head", "eval/dynamics_parameters/": "all parameters"}
    found = {
        title: {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        for prefix, title in kinds.items()
    }
    found = {title: cells for title, cells in found.items() if cells}
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [(name, *(Metric(name, name).show(cells.get(name)) for cells in found.values())) for name in names]
    caption = "The dynamics of all held-out pairs as one batch."
    return [Table(("dynamics", *found), rows, caption, folded=True)] if rows else []


def of_conditions(found: Sequence[Condition]) -> Table:
    """Means ± standard deviations over seeds, a row a condition."""
    metrics = present([*METRICS, *downstream_of(found)], found)
    rows = [(c.label, str(len(c.runs)), *map(c.show, metrics)) for c in found]
    header = ("condition", "runs", *(metric.title for metric in metrics))
    caption = (
        "Means ± standard deviations over the runs of a condition, which differ by their seed. A run that is "
        "not finished counts with its latest evaluation."
    )
    return Table(header, rows, caption)


def of_contrasts(pairs: Sequence[Contrast]) -> Table:
    """Paired differences, with calibration minus without, a row a contrast."""
    both = [condition for pair in pairs for condition in (pair.base, pair.calibrated)]
    metrics = present([*METRICS, *downstream_of(both)], both)
    rows = []
    for pair in pairs:
        seeds, shown = pair.show(metrics)
        rows.append((pair.label, str(seeds), *(text.replace(" [", "\n[") for text in shown)))
    header = ("with − without calibration", "seeds", *(metric.title for metric in metrics))
    return Table(header, rows, "Mean differences of runs with the same seed, [95 % t interval over seeds].")


def of_correlations(found: Sequence[Condition], across: Sequence[Metric], scores: Sequence[Metric]) -> Table:
    """Rank correlations over runs of each score with each quantity of the dynamics."""
    runs = [run.values for condition in found for run in condition.runs]
    rows = []
    for score in scores:
        cells = []
        for dynamics in across:
            known = [each for each in runs if score.key in each and dynamics.key in each]
            value = rank_correlation(
                [each[dynamics.key] for each in known], [each[score.key] for each in known]
            )
            cells.append("–" if value is None else f"{value:+.2f} ({len(known)} runs)".replace("-", "−"))
        rows.append((score.title, *cells))
    caption = "Spearman's rank correlation over runs: these runs' association, no cause."
    return Table(("downstream", *(metric.title for metric in across)), rows, caption)


def downstream_of(found: Sequence[Condition]) -> list[Metric]:
    """`downstream` of all runs of the conditions."""
    return downstream([run.values for condition in found for run in condition.runs])


def present(metrics: Sequence[Metric], found: Sequence[Condition]) -> list[Metric]:
    """The metrics, each once, that some run of the conditions has."""
    keys = {key for condition in found for run in condition.runs for key in run.values}
    return [metric for metric in dict.fromkeys(metrics) if metric.key in keys]


def of_answers(columns: Sequence[tuple[str, Sequence[Probes]]]) -> list[Table]:
    """Length and repetition of the answers to the probe prompts, first and last; a column a condition."""
    rows = []
    for key, title in ANSWERS.items():
        unit = "share" if key.endswith("repetition") else ""
        form = Metric(key, title, unit).show if unit else "{:.1f}".format
        found = [first_and_last(probes, key) for _, probes in columns]
        if any(found):
            rows.append(
                (title, *("–" if ends is None else f"{form(ends[0])} → {form(ends[1])}" for ends in found))
            )
    caption = "Answers to the probe prompts: at the first and at the last probe."
    return [Table(("mean over prompts", *(title for title, _ in columns)), rows, caption)] if rows else []


def of_runs(runs: Sequence[Run]) -> Table:
    """One line a run: how far it came, and its main numbers."""
    summaries = [run.summary for run in runs]
    metrics = [m for m in METRICS if any(m.key in each.values for each in summaries)]
    rows = [
        (
            run.name,
            run.status.value,
            words.progress(run),
            *(metric.show(summary.values.get(metric.key)) for metric in metrics),
            run.error or "",
        )
        for run, summary in zip(runs, summaries)
    ]
    header = ["run", "status", "steps", *(metric.title for metric in metrics), "ended with"]
    if not any(run.error for run in runs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, rows, texts=(0, 1, len(header) - 1) if any(run.error for run in runs) else (0, 1))
