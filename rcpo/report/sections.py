"""From runs to a document: one run by itself, or several against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rcpo.report import appendix, figures, frontier, overview, panels, tables, words
from rcpo.report.document import Block, Document, Paragraph, Picture, Section
from rcpo.report.dynamics import predict_margin
from rcpo.report.foreign_sections import of_foreign, sections_of
from rcpo.report.probes import MASSES, Probes, crossings, probes_of
from rcpo.report.runs import Run, Status
from rcpo.report.series import stretch
from rcpo.runs.comparison import METRICS, STEPS_IN_BAND, Condition, Contrast, Metric, conditions, contrasts
from rcpo.runs.statistics import spread

BY_KEY = {metric.key: metric for metric in METRICS}
ACROSS = [BY_KEY["eval/token_logratios/chosen"], BY_KEY[STEPS_IN_BAND]]
FEW = 8  # conditions that are shown in full; more show what says most, so that a page is made in seconds

HOW_TO_READ = (
    "The winner should stay at 0, the loser fall. While the ratio r is in the batch's band, a small step "
    "neither lowers the batch's winners nor raises its losers; at the center r* both sides pull equally. "
    "Other text has a band of its own, the samples' band, drawn once it stands clear of noise. Calibration "
    "makes α² r of r."
)

FRONTIER = (
    "Up and to the right is better: a larger held-out margin, and a winner that did not fall. A point is the "
    "mean of a condition, its bars the standard deviation over seeds; a line joins the values of a constant. "
    "In the shaded area the winner did not fall and the loser did not rise."
)


@dataclass(frozen=True)
class Column:
    """Runs that differ by their seed, under the title of their column."""

    title: str
    runs: Sequence[Run]


def document_of(runs: Sequence[Run], title: str) -> Document:
    """The report of one run, or of several."""
    own, others = [run for run in runs if not run.origin], [run for run in runs if run.origin]
    if not own and len(others) == 1:
        return of_foreign(others[0])
    more = [section for run in others for section in sections_of(run)]
    if not own:
        tools = ", ".join(sorted({run.origin for run in others}))
        return Document(title, tools, f"{len(others)} runs of other tools", sections=more)
    document = _of_run(own[0]) if len(own) == 1 else _of_runs(own, title)
    return replace(document, sections=[*document.sections, *more])


def _of_run(run: Run) -> Document:
    parts = [
        Section("Training", _training(run)),
        Section("Pair by pair", _pair_by_pair([Column(run.name, [run])])),
        Section("Held out", tables.held_out(run)),
        Section("Samples", appendix.samples_of_run(run)),
        Section("Settings", appendix.settings_of_run(run)),
        Section("Environment", appendix.environment([run])),
    ]
    return Document(
        title=run.name,
        status=run.status.value,
        headline=words.headline_of_run(run),
        notes=words.warnings_of_run(run),
        sections=[part for part in parts if part.blocks],
    )


def _training(run: Run) -> list[Block]:
    if run.status is Status.EVALUATED:
        return []
    if not run.last_step:
        return [Paragraph("No step is logged yet.")]
    width = stretch([run])
    caption = (
        f"{_points(width)} Diamonds are held out. {HOW_TO_READ} "
        f"{words.about_prediction(run, predict_margin(run, width))}"
    )
    return [Picture("training", figures.dynamics_of_run([run]), caption.strip())]


def _points(width: int) -> str:
    return "Each point is a step." if width == 1 else f"Each point is the mean of {width} steps."


def _pair_by_pair(columns: Sequence[Column], name: str = "", *, full: bool = True) -> list[Block]:
    """The probe set of the columns that have one; winners alone where it is not to be `full`."""
    followed = [(column.title, probes_of(column.runs)) for column in columns]
    followed = [(title, probes) for title, probes in followed if probes]
    if not followed:
        return []
    unit = panels.unit_of([run for column in columns for run in column.runs])
    caption = "The probe pairs at each probe. " + " ".join(
        words.about_crossings(title, crossings(probes)) for title, probes in followed
    )
    blocks: list[Block] = [Picture(f"{name}pairs", figures.fans(followed, unit, full=full), caption)]
    if full and _have_masses([each for _, probes in followed for each in probes]):
        caption = (
            "Where the probability goes: log-probs of whole answers, means over probe prompts. A winner and "
            "a loser that fall together hand their mass to other answers, such as the greedy one."
        )
        blocks.append(Picture(f"{name}masses", figures.masses(followed), caption))
    return [*blocks, *tables.of_answers(followed)]


def _have_masses(probes: Sequence[Probes]) -> bool:
    return any(each.has(key) for each in probes for key in MASSES)


def _of_runs(runs: Sequence[Run], title: str) -> Document:
    summaries = {run.name: run for run in runs}
    found = conditions([run.summary for run in runs])
    pairs = contrasts(found)
    groups = _groups(overview.overview_rows(found, pairs), summaries)
    parts = [
        Section("At a glance", _at_a_glance(found, pairs)),
        Section("Training", _side_by_side(groups)),
        Section("Pair by pair", _probes_of_groups(groups)),
        Section("Downstream over dynamics", _downstream(found)),
        Section("Samples", _samples(groups)),
        Section("Runs", [tables.of_runs(runs)]),
        Section("Settings", appendix.settings_of_runs(runs)),
        Section("Environment", appendix.environment(runs)),
    ]
    return Document(
        title=title,
        status=_status(runs),
        headline=_headline(runs, found, pairs),
        details=[words.sentence_of_contrast(pair) for pair in pairs],
        notes=[
            *words.other_code(runs),
            *(f"{run.name}: {note}" for run in runs for note in words.warnings_of_run(run)),
        ],
        sections=[part for part in parts if part.blocks],
    )


def _headline(runs: Sequence[Run], found: Sequence[Condition], pairs: Sequence[Contrast]) -> str:
    return words.headline_of_contrasts(pairs) if pairs else words.headline_of_runs(runs, extremes(found))


@dataclass(frozen=True)
class Group:
    """Columns that are shown beside each other; `name` is its figures', no other group's."""

    name: str
    columns: Sequence[Column]


def _groups(rows: Sequence[overview.Row], runs: dict[str, Run]) -> list[Group]:
    """A contrast's two sides beside each other; what is in no contrast, two conditions at a time."""

    def column(title: str, condition: Condition) -> Column:
        return Column(title, [runs[run.name] for run in condition.runs])

    labels: list[str] = []
    found: list[list[Column]] = []
    alone: list[Column] = []
    for row in rows:
        if row.base is not None and row.calibrated is not None:
            labels.append(row.label)
            found.append([column(condition.label, condition) for condition in (row.base, row.calibrated)])
        else:
            condition = row.base or row.calibrated
            assert condition is not None
            alone.append(column(condition.label, condition))
    for place in range(0, len(alone), 2):
        found.append(alone[place : place + 2])
        labels.append(" and ".join(each.title for each in found[-1]))
    return [Group(name, columns) for name, columns in zip(_file_names(labels), found)]


def _file_names(labels: Sequence[str]) -> list[str]:
    """Short names of letters, digits and dashes, no two alike."""
    names: list[str] = []
    for label in labels:
        name = "".join(letter if letter.isalnum() else "-" for letter in label.lower())[:60]
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _status(runs: Sequence[Run]) -> str:
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.status.value] = counts.get(run.status.value, 0) + 1
    return f"{len(runs)} runs: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def extremes(found: Sequence[Condition]) -> words.Extremes | None:
    """The conditions with the highest and the lowest mean of the first downstream score."""
    for metric in tables.downstream_of(found):
        known = [(mean, each) for each in found if (mean := spread(each.values(metric.key)))]
        ends = [pick(known, key=lambda pair: pair[0].mean)[1] for pick in (max, min)]
        highest, lowest = ((each.label, _with_spread(each, metric)) for each in ends)
        return words.Extremes(metric, highest, lowest)
    return None


def _with_spread(condition: Condition, metric: Metric) -> str:
    """A mean over seeds ± their standard deviation; of a single run its own 95 % interval."""
    values = [run.values for run in condition.runs if metric.key in run.values]
    if len(values) == 1:
        (own,) = values
        low, high = (own.get(f"{metric.key}/{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            return f"{metric.show(own[metric.key])} [{metric.show(low)}, {metric.show(high)}]"
    return condition.show(metric)


def _at_a_glance(found: Sequence[Condition], pairs: Sequence[Contrast]) -> list[Block]:
    blocks: list[Block] = []
    metrics = tables.present([*tables.downstream_of(found)[:2], BY_KEY[STEPS_IN_BAND]], found)
    if metrics or tables.present(ACROSS, found):
        caption = (
            "Hollow: without calibration, filled: with it. A small dot is a run, a large one the mean. "
            "Log-ratios: the winner should stay at 0, the loser lie to the left."
        )
        rows = overview.overview_rows(found, pairs)
        blocks.append(Picture("overview", overview.overview(rows, metrics), caption))
    blocks += [
        Picture(f"frontier-{place}" if place else "frontier", frontier.frontier(points), FRONTIER)
        for place, points in enumerate(frontier.frontiers(found))
    ]
    if pairs:
        blocks.append(tables.of_contrasts(pairs))
    return [*blocks, tables.of_conditions(found)]


def _side_by_side(groups: Sequence[Group]) -> list[Block]:
    few = _are_few(groups)
    blocks: list[Block] = []
    if not few:
        blocks.append(
            Paragraph("The two main panels of each condition; the report of a single run shows all.")
        )
    for group in groups:
        runs = [run for column in group.columns for run in column.runs]
        if not any(run.last_step for run in runs):
            continue
        columns = [(column.title, column.runs) for column in group.columns]
        width = stretch(runs)
        several = "Thin lines are runs, bold ones their mean. " if len(runs) > len(group.columns) else ""
        caption = f"{_points(width)} {several}Diamonds are held out. {'' if blocks else HOW_TO_READ}"
        chosen = figures.all_panels(runs) if few else figures.main_panels(runs)
        if few:
            predicted = words.about_prediction(runs[0], predict_margin(runs[0], width))
            of = f"{columns[0][0]}: " if predicted and len(runs) > 1 else ""
            caption += f" {of}{predicted}"
        blocks.append(
            Picture(f"training-{group.name}", figures.side_by_side(columns, chosen), caption.strip())
        )
    return blocks


def _probes_of_groups(groups: Sequence[Group]) -> list[Block]:
    full = _are_few(groups)
    parts = [_pair_by_pair(group.columns, f"{group.name}-", full=full) for group in groups]
    return [block for part in parts for block in part]


def _are_few(groups: Sequence[Group]) -> bool:
    return sum(len(group.columns) for group in groups) <= FEW


def _downstream(found: Sequence[Condition]) -> list[Block]:
    """Scores of the finished models joined to the dynamics that led there."""
    across = tables.present(ACROSS, found)
    scores = [metric for metric in tables.downstream_of(found) if metric not in across]
    if not across or not scores or sum(len(each.runs) for each in found) < 2:
        return []
    caption = "A point is a run, a shape an objective; hollow without calibration, filled with it."
    picture = Picture("downstream", overview.scatter(found, across, scores[:4]), caption)
    return [picture, tables.of_correlations(found, across, scores)]


def _samples(groups: Sequence[Group]) -> list[Block]:
    return [
        table
        for group in groups
        for table in appendix.samples_of_conditions(
            [(column.title, column.runs[0]) for column in group.columns]
        )
    ]
