"""Whole figures of training: a run's panels, conditions side by side, the probe set's fans and masses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rcpo.report import panels, theme
from rcpo.report.panels import Panel, dots
from rcpo.report.probes import MASSES, Probes, crossed_share, fan, mean_over_pairs, pooled
from rcpo.report.runs import Run
from rcpo.report.series import Curve, mean_line, stretch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.0  # inches
ROW = 1.75

SIDE_COLOURS = {"winner": theme.WINNER, "loser": theme.LOSER}
MASS_COLOURS = (theme.WINNER, theme.LOSER, theme.INK, theme.MUTED)
MASS_STYLES = ("-", "-", (0, (4, 2)), (0, (1, 1.5)))


def main_panels(runs: Sequence[Run]) -> list[Panel]:
    """The ones that say most, as far as the runs measured what they show: sides, α, the ratio."""
    chosen: list[Panel] = [panels.fresh if runs and all(run.loops for run in runs) else panels.sides]
    chosen += [panels.alpha] if _any(runs, "rc/alpha") else []
    return chosen + ([panels.ratio] if _any(runs, "dynamics/score_cosine") else [])


def all_panels(runs: Sequence[Run]) -> list[Panel]:
    """Every panel that the runs measured something for, the main ones first."""
    chosen = main_panels(runs)
    chosen += [panels.margins] if _any(runs, "logps/rejected") else []
    return chosen + ([panels.cosine, panels.in_band] if _any(runs, "dynamics/score_cosine") else [])


def _any(runs: Sequence[Run], key: str) -> bool:
    return any(run.has(key) for run in runs)


def dynamics_of_run(runs: Sequence[Run]) -> Figure:
    """The panels of one condition: the main ones wide, the others beside each other."""
    main, chosen = len(main_panels(runs)), all_panels(runs)
    others = len(chosen) - main
    rows = main + (others + 1) // 2
    figure = _figure(rows, titled=False)
    figure.subplots_adjust(wspace=0.2)
    grid = figure.add_gridspec(rows, 2, height_ratios=[1.25] * main + [1] * (rows - main))
    places = [grid[row, :] for row in range(main)]
    places += [grid[main + index // 2, index % 2] for index in range(others)]
    if others % 2:  # the last panel has its row to itself
        places[-1] = grid[rows - 1, :]
    width = stretch(runs)
    for place, panel in zip(places, chosen):
        axes = figure.add_subplot(place, sharex=figure.axes[0] if figure.axes else None)
        panel(axes, runs, width)
        _finish(axes)
        if place.is_last_row():
            axes.set_xlabel("optimizer step")
    return figure


def side_by_side(columns: Sequence[tuple[str, Sequence[Run]]], chosen: Sequence[Panel]) -> Figure:
    """A column a condition, a row a panel; a row shares its vertical axis, so that heights compare."""
    figure = _figure(len(chosen), titled=len(columns) > 1)
    grid = figure.subplots(len(chosen), len(columns), sharex=True, sharey="row", squeeze=False)
    width = stretch([run for _, runs in columns for run in runs])
    for row, panel in zip(grid, chosen):
        for axes, (_, runs) in zip(row, columns):
            panel(axes, runs, width)
            if axes is not row[0]:
                axes.set_ylabel("")
            _finish(axes)
    _head(figure, grid, [title for title, _ in columns])
    return figure


def fans(columns: Sequence[tuple[str, Sequence[Probes]]], unit: str, *, full: bool = True) -> Figure:
    """How the probe pairs spread: quantiles of each side, and how many crossed; a column a condition.

    Winners alone where it is not to be `full`.
    """
    sides = [side for side in ("winner", "loser") if any(each.knows(side) for _, p in columns for each in p)]
    rows = [*sides, "crossed"] if full else sides[:1]
    figure = _figure(len(rows), titled=len(columns) > 1)
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    for line, row in zip(grid, rows):
        for axes, (_, probes) in zip(line, columns):
            if row == "crossed":
                _crossed(axes, probes, sides)
            else:
                _fan(axes, probes, row, unit)
            if axes is not line[0]:
                axes.set_ylabel("")
            _finish(axes)
    _head(figure, grid, [title for title, _ in columns])
    return figure


def _fan(axes: Axes, probes: Sequence[Probes], side: str, unit: str) -> None:
    steps, values = pooled(probes, side)
    colour = SIDE_COLOURS[side]
    lowest, low, middle, high, highest = fan(values)
    axes.set_title(f"{side.capitalize()}s of the probe pairs")
    axes.set_ylabel(unit)
    panels.level(axes, 0.0, panels.SMALL)
    axes.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0, label="5 to 95 %")
    axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0, label="25 to 75 %")
    axes.plot(steps, middle, color=colour, linewidth=1.8, label="median", **dots(middle))


def _crossed(axes: Axes, probes: Sequence[Probes], sides: Sequence[str]) -> None:
    axes.set_title("Pairs that crossed")
    axes.set_ylabel("percent of pairs")
    axes.set_ylim(-4, 104)
    for side in sides:
        steps, values = pooled(probes, side)
        share = 100 * crossed_share(values, side)
        label = "winner below start" if side == "winner" else "loser above start"
        axes.plot(steps, share, color=SIDE_COLOURS[side], linewidth=1.5, label=label, **dots(share))
    if len(sides) == 2:
        steps, values = pooled(probes, "disordered")
        share = 100 * mean_over_pairs(values)
        style = (0, (4, 2))
        axes.plot(
            steps,
            share,
            color=theme.INK,
            linewidth=1.2,
            linestyle=style,
            label="loser likelier",
            **dots(share),
        )


def masses(columns: Sequence[tuple[str, Sequence[Probes]]]) -> Figure:
    """Where the probability goes: the policy's log-prob of whole answers, means over probe prompts."""
    figure = _figure(1, titled=len(columns) > 1)
    grid = figure.subplots(1, len(columns), sharex=True, sharey="row", squeeze=False)
    for axes, (_, probes) in zip(grid[0], columns):
        axes.set_title("Log-prob of whole answers")
        axes.set_ylabel("nats per answer" if axes is grid[0, 0] else "")
        for (key, label), colour, style in zip(MASSES.items(), MASS_COLOURS, MASS_STYLES):
            lines = [_known(each.steps, each.columns[key]) for each in probes if each.has(key)]
            if lines:
                line = mean_line(lines)
                axes.plot(
                    line.steps,
                    line.values,
                    color=colour,
                    linestyle=style,
                    linewidth=1.5,
                    label=label,
                    **dots(line.values),
                )
        _finish(axes)
    _head(figure, grid, [title for title, _ in columns])
    return figure


def _known(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Means over pairs (S, E) at the steps that have any."""
    present = ~np.isnan(values).all(axis=1)
    return Curve(steps[present], np.nanmean(values[present], axis=1))


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width, `height` inches high."""
    return Figure(figsize=(WIDTH, height))


def _figure(rows: int, *, titled: bool) -> Figure:
    """An empty figure of so many rows; where its columns are `titled`, there is room above them."""
    top = 0.62 if titled else 0.42
    height = ROW * rows + 0.6
    figure = new_figure(height)
    figure.subplots_adjust(
        left=0.085, right=0.985, top=1 - top / height, bottom=0.42 / height, hspace=0.6, wspace=0.14
    )
    return figure


def _head(figure: Figure, grid: np.ndarray, titles: Sequence[str]) -> None:
    """The columns' names above them, where there is more than one, and the steps below."""
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    if len(titles) < 2:
        return
    for axes, title in zip(grid[0], titles):
        place = axes.get_position()
        y = 1 - 0.02 / figure.get_figheight()
        figure.text(place.x0, y, title, fontsize=11, fontweight="bold", va="top", color=theme.INK)


def _finish(axes: Axes) -> None:
    """Title, legend under it, few ticks: the same for every panel."""
    axes.set_title(axes.get_title(loc="left"), pad=15, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.97),
            ncol=6,
            handlelength=1.6,
            columnspacing=1.1,
            borderpad=0,
            handletextpad=0.5,
        )
    left, right = axes.get_xlim()
    if right - left < 2:  # one step
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_plainly)
    axes.yaxis.set_major_formatter(_plainly)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _: object) -> str:
    """A tick's label by itself, without an offset that belongs to all."""
    return f"{value:g}".replace("-", "−")
