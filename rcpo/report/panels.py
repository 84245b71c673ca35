"""One panel each: a quantity over training, for runs that differ by their seed alone.

Every panel takes axes, runs and the `width` of a stretch in steps. Several runs are thin lines with their
mean in bold; quantities that are ratios are averaged geometrically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from rcpo.report import theme
from rcpo.report.dynamics import margin, predict_margin
from rcpo.report.runs import Column, Run
from rcpo.report.series import Line, binned, mean_line, of_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", Sequence[Run], int], None]
BEYOND = 6.0  # how far the ratio's axis reaches past its lines: where ρ is small the band is as good as open
SMALL = 0.01  # nats: less than this is drawn as the nothing that it is
UNITS = {"mean": "nats a token", "sum": "nats a response", "importance": "nats, weighted tokens"}


def unit_of(runs: Sequence[Run]) -> str:
    """The unit of log-probs and log-ratios: that of the objective's reduction, where the runs agree."""
    found = {UNITS.get(str(run.settings.get("objective.reduction")), "nats") for run in runs}
    return found.pop() if len(found) == 1 else "nats"


def sides(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """Winner and loser against the reference (log-probs of runs that have none); diamonds are held out."""
    related = any(run.has("logratios/chosen") for run in runs)
    names = "logratios" if related else "logps"
    axes.set_title("Winner and loser against the reference" if related else "Winner and loser, log-probs")
    axes.set_ylabel(unit_of(runs))
    if related:
        _level(axes, 0.0, SMALL)
    for side, colour in (("chosen", theme.WINNER), ("rejected", theme.LOSER)):
        key = f"{names}/{side}"
        label = "winner" if side == "chosen" else "loser"
        _curves(axes, _lines(runs, key, width), colour, label)
        for run in runs:
            _held_out(axes, run, key, colour)


def _held_out(axes: Axes, run: Run, key: str, colour: str) -> None:
    steps, values = run.held_out(key)
    final = run.evaluation.get(f"eval/{key}")
    if final is not None and run.last_step:
        steps, values = np.append(steps, run.last_step), np.append(values, final)
    axes.plot(steps, values, "D", color=colour, markersize=5.5, markeredgecolor=theme.PAPER, clip_on=False)


def ratio(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The incentive ratio over the shaded band with its centre; after calibration too, where there is one."""
    axes.set_title("Incentive ratio and the band")
    axes.set_ylabel("d_w / d_l, log scale")
    centre = _geometric(runs, "dynamics/band_center", width)
    if not len(centre.steps):
        _say(axes, "not measured")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    before = _geometric(runs, "dynamics/incentive_ratio", width)
    after = _geometric(runs, "rc/calibrated_ratio", width)
    _band(axes, centre, _mean(runs, "dynamics/score_cosine", width), [before, after])
    axes.plot(
        centre.steps, centre.values, color=theme.MUTED, linewidth=1, label="centre r*", **dots(centre.values)
    )
    dashes = (0, (4, 2)) if len(after.steps) else "-"
    label = "r, before calibration" if len(after.steps) else "r"
    axes.plot(
        before.steps,
        before.values,
        color=theme.INK,
        linewidth=1.4,
        linestyle=dashes,
        label=label,
        **dots(before.values),
    )
    if len(after.steps):
        _curves(
            axes,
            _lines(runs, "rc/calibrated_ratio", width, geometric=True),
            theme.CALIBRATED,
            "α² r",
            geometric=True,
        )


def _band(axes: Axes, centre: Line, cosine: Line, others: Sequence[Line]) -> None:
    """ρ r* to r*/ρ; open to the edge of the panel where ρ ≤ 0."""
    rho = np.interp(centre.steps, cosine.steps, cosine.values) if len(cosine.steps) else np.zeros(0)
    known = np.concatenate([centre.values, *(line.values for line in others)])
    known = known[np.isfinite(known)]
    low, high = known.min() / BEYOND, known.max() * BEYOND
    axes.set_ylim(low, high)
    unknown = np.where(np.isnan(centre.values + rho), np.nan, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = np.where(rho > 0, rho * centre.values, low) + unknown
        upper = np.where(rho > 0, centre.values / rho, high) + unknown
    steps = centre.steps
    if len(steps) == 1:  # a single point has no area
        steps, lower, upper = (
            np.array([steps[0] - 0.5, steps[0] + 0.5]),
            np.repeat(lower, 2),
            np.repeat(upper, 2),
        )
    axes.fill_between(steps, lower, upper, color=theme.BAND, alpha=0.28, linewidth=0, label="band")


def alpha(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The calibration's weight α; 1 is no calibration."""
    axes.set_title("Calibration weight α")
    axes.set_ylabel("α")
    _level(axes, 1.0)
    lines = _lines(runs, "rc/alpha", width, geometric=True)
    if not lines:
        _say(axes, "no calibration: α = 1")
    _curves(axes, lines, theme.CALIBRATED, "α", geometric=True)


def margins(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The margin's change, measured on each step's batch and predicted to first order."""
    axes.set_title("Margin: measured and first order")
    axes.set_ylabel(unit_of(runs))
    _level(axes, 0.0, SMALL)
    _curves(axes, of_runs(runs, margin, width), theme.INK, "measured")
    predicted = [(run, predict_margin(run, width)) for run in runs]
    lines = [binned(run.steps, found.change, width) for run, found in predicted if found is not None]
    if lines and not any(run.has("logratios/chosen") for run in runs):
        start = mean_line(of_runs(runs, margin, width)).values[0]
        lines = [Line(line.steps, line.values + start) for line in lines]
    if lines:
        mean = mean_line(lines)
        axes.plot(
            mean.steps,
            mean.values,
            color=theme.CALIBRATED,
            linewidth=1.8,
            linestyle=(0, (1, 1.5)),
            label="first order",
            **dots(mean.values),
        )


def cosine(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """ρ: how far the two sides' gradients point the same way."""
    axes.set_title("Score cosine ρ")
    axes.set_ylabel("cos(s_w, s_l)")
    _level(axes, 0.0)
    lines = _lines(runs, "dynamics/score_cosine", width)
    if not lines:
        _say(axes, "not measured")
    _curves(axes, lines, theme.INK, "ρ")


def in_band(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """Share of the steps of each stretch whose ratio was in the band."""
    axes.set_title("Steps in the band")
    axes.set_ylabel("percent")
    axes.set_ylim(-4, 104)
    before = _lines(runs, "dynamics/in_band", width, scale=100)
    after = _lines(runs, "rc/in_band", width, scale=100)
    if not before and not after:
        _say(axes, "not measured")
    if before:
        mean = mean_line(before)
        style = (0, (4, 2)) if after else "-"
        label = "before calibration" if after else "r in the band"
        axes.plot(
            mean.steps,
            mean.values,
            color=theme.INK,
            linewidth=1.4,
            linestyle=style,
            label=label,
            **dots(mean.values),
        )
    if after:
        mean = mean_line(after)
        axes.plot(
            mean.steps,
            mean.values,
            color=theme.CALIBRATED,
            linewidth=1.8,
            label="calibrated",
            **dots(mean.values),
        )


def _lines(
    runs: Sequence[Run], key: str, width: int, *, geometric: bool = False, scale: float = 1.0
) -> list[Line]:
    return of_runs(runs, lambda run: run.column(key) * scale, width, geometric=geometric)


def _geometric(runs: Sequence[Run], key: str, width: int) -> Line:
    return mean_line(_lines(runs, key, width, geometric=True), geometric=True)


def _mean(runs: Sequence[Run], key: str, width: int) -> Line:
    return mean_line(_lines(runs, key, width))


def _curves(axes: Axes, lines: Sequence[Line], colour: str, label: str, *, geometric: bool = False) -> None:
    """The runs thin, their mean in bold; one run alone in bold."""
    if not lines:
        return
    if len(lines) > 1:
        for line in lines:
            axes.plot(line.steps, line.values, color=colour, linewidth=0.7, alpha=0.45)
    mean = mean_line(lines, geometric=geometric)
    axes.plot(mean.steps, mean.values, color=colour, linewidth=1.8, label=label, **dots(mean.values))


def dots(values: Column) -> dict[str, Any]:
    """A marker for a line so short that it would not be seen."""
    return {"marker": "o", "markersize": 4} if np.count_nonzero(~np.isnan(values)) < 3 else {}


def _level(axes: Axes, value: float, around: float = 0.0) -> None:
    """A reference line; the axis reaches at least `around` to both sides of it."""
    axes.update_datalim([(1, value - around), (1, value + around)], updatex=False)
    axes.axhline(value, color=theme.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=theme.MUTED)
