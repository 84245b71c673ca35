"""Figures of runs against each other: what calibration changed, and downstream scores over dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rcpo.report import theme
from rcpo.report.figures import new_figure
from rcpo.runs.comparison import Condition, Contrast, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

LOG_RATIOS = (("eval/token_logratios/chosen", theme.WINNER), ("eval/token_logratios/rejected", theme.LOSER))
ROW = 0.42
FAR = 5.0  # times the upper quartile: a row further out would press the others together
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Row:
    """One line of the overview: a contrast, or a condition that has no counterpart (one of both is None)."""

    label: str
    base: Condition | None
    calibrated: Condition | None


def overview_rows(found: Sequence[Condition], pairs: Sequence[Contrast]) -> list[Row]:
    """Contrasts first, then the conditions that are in none."""
    paired = [condition for pair in pairs for condition in (pair.base, pair.calibrated)]
    rows = [Row(pair.label, pair.base, pair.calibrated) for pair in pairs]
    for condition in found:
        if condition not in paired:
            calibrated = bool(condition.settings.get("rc.enabled"))
            rows.append(
                Row(condition.label, None, condition) if calibrated else Row(condition.label, condition, None)
            )
    return rows


def overview(rows: Sequence[Row], metrics: Sequence[Metric]) -> Figure:
    """Held-out log-ratios, then each other metric: hollow without calibration, filled with it.

    A small dot is a run, a large one the mean of its condition.
    """
    count = 1 + len(metrics)
    height = ROW * len(rows) + 1.5
    figure = new_figure(height)
    ratios = [2.0, *([1.0] * len(metrics))]
    left = min(0.35, 0.03 + 0.011 * max(len(row.label) for row in rows))
    figure.subplots_adjust(left=left, right=0.98, top=1 - 0.87 / height, bottom=0.52 / height, wspace=0.12)
    grid = figure.subplots(1, count, sharey=True, squeeze=False, width_ratios=ratios)[0]
    _log_ratios(grid[0], rows)
    for axes, metric in zip(grid[1:], metrics):
        _values(axes, rows, metric.key, theme.INK, 100 if metric.unit == "share" else 1)
        axes.set_title(metric.title.capitalize().replace(" ", "\n", 1))
        axes.set_xlabel("percent" if metric.unit == "share" else metric.unit)
        if metric.unit == "share":
            left, right = axes.get_xlim()
            axes.set_xlim(max(left, -4), min(right, 104))
            _whole_shares(axes.xaxis)
    grid[0].set_yticks(range(len(rows)), [row.label for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    _legend(figure, height)
    return figure


def _log_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=theme.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for key, colour in LOG_RATIOS:
        _values(axes, rows, key, colour, 1)
    axes.set_title("Held-out log-ratios")
    axes.set_xlabel("nats against the reference")
    sizes = np.abs([value for key, _ in LOG_RATIOS for row in rows for value in _means(row, key)])
    if len(sizes) and sizes.max() > FAR * np.quantile(sizes, 0.75) > 0:
        axes.set_xscale("symlog", linthresh=float(np.quantile(sizes, 0.75)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        axes.set_xlabel("nats, far ones logarithmic")


def _means(row: Row, key: str) -> list[float]:
    values = [condition.values(key) for condition in (row.base, row.calibrated) if condition]
    return [float(np.mean(each)) for each in values if each]


def _values(axes: Axes, rows: Sequence[Row], key: str, colour: str, scale: float) -> None:
    for place, row in enumerate(rows):
        means = []
        for condition, filled in ((row.base, False), (row.calibrated, True)):
            values = np.array(condition.values(key) if condition else []) * scale
            if not len(values):
                continue
            face = colour if filled else theme.PAPER
            axes.plot(
                values, [place] * len(values), "o", color=colour, markersize=2.5, alpha=0.6, markeredgewidth=0
            )
            axes.plot(
                values.mean(),
                place,
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=7.5,
                markeredgewidth=1.6,
                zorder=3,
            )
            means.append(values.mean())
        if len(means) == 2:
            axes.plot(means, [place, place], color=colour, linewidth=1.6, alpha=0.5, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6 if key in dict(LOG_RATIOS) else 3))
    axes.tick_params(axis="y", left=False)
    axes.grid(axis="y", visible=False)


def _legend(figure: Figure, height: float) -> None:
    from matplotlib.lines import Line2D

    def mark(colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [], [], linestyle="", marker="o", markersize=7, color=colour, markerfacecolor=face, label=label
        )

    handles = [
        mark(theme.WINNER, theme.WINNER, "winner"),
        mark(theme.LOSER, theme.LOSER, "loser"),
        mark(theme.INK, theme.PAPER, "without calibration"),
        mark(theme.INK, theme.INK, "with calibration"),
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncol=4, fontsize=9, handletextpad=0.1
    )


def scatter(found: Sequence[Condition], across: Sequence[Metric], up: Sequence[Metric]) -> Figure:
    """Each run's downstream scores (`up`, rows) over its dynamics (`across`, columns)."""
    height = 2.1 * len(up) + 0.9
    figure = new_figure(height)
    figure.subplots_adjust(
        left=0.085, right=0.98, top=1 - 0.7 / height, bottom=0.45 / height, hspace=0.25, wspace=0.12
    )
    grid = figure.subplots(len(up), len(across), sharex="col", sharey="row", squeeze=False)
    objectives = list(dict.fromkeys(str(c.settings.get("objective.name")) for c in found))
    for line, score in zip(grid, up):
        for axes, dynamics in zip(line, across):
            for condition in found:
                _cloud(
                    axes,
                    condition,
                    dynamics,
                    score,
                    MARKERS[objectives.index(str(condition.settings.get("objective.name"))) % len(MARKERS)],
                )
        line[0].set_ylabel(_with_unit(score))
        if score.unit == "share":
            _whole_shares(line[0].yaxis)
    for axes, dynamics in zip(grid[-1], across):
        axes.set_xlabel(_with_unit(dynamics))
        if dynamics.unit == "share":
            _whole_shares(axes.xaxis)
    _cloud_legend(figure, objectives)
    return figure


def _whole_shares(axis: Axis) -> None:
    """No tick beyond 0 and 100 percent; the ends of the axis stay where they are."""
    low, high = axis.get_view_interval()
    axis.set_ticks([tick for tick in axis.get_majorticklocs() if max(low, 0) <= tick <= min(high, 100)])


def _cloud(axes: Axes, condition: Condition, dynamics: Metric, score: Metric, marker: str) -> None:
    points = [
        (run.values[dynamics.key] * _scale(dynamics), run.values[score.key] * _scale(score))
        for run in condition.runs
        if dynamics.key in run.values and score.key in run.values
    ]
    if not points:
        return
    calibrated = bool(condition.settings.get("rc.enabled"))
    colour = theme.CALIBRATED if calibrated else theme.INK
    axes.plot(
        *zip(*points),
        marker,
        color=colour,
        markerfacecolor=colour if calibrated else theme.PAPER,
        markersize=6,
        linestyle="",
    )


def _cloud_legend(figure: Figure, objectives: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [], [], linestyle="", marker=marker, markersize=6, color=colour, markerfacecolor=face, label=label
        )

    handles = [
        mark(MARKERS[i % len(MARKERS)], theme.MUTED, theme.MUTED, name) for i, name in enumerate(objectives)
    ]
    handles += [
        mark("o", theme.INK, theme.PAPER, "without calibration"),
        mark("o", theme.CALIBRATED, theme.CALIBRATED, "with calibration"),
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncol=6, fontsize=9, handletextpad=0.1
    )


def _scale(metric: Metric) -> float:
    return 100 if metric.unit == "share" else 1


def _with_unit(metric: Metric) -> str:
    return f"{metric.title}, {'percent' if metric.unit == 'share' else metric.unit or 'score'}"
