"""One panel each: a quantity over training, for runs that differ by their seed alone.

Every panel takes axes, runs and the `width` of a stretch in steps. Several runs are thin lines with their
mean in bold; quantities that are ratios are averaged geometrically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from rcpo.evaluation.summary import UNITS
from rcpo.report import theme
from rcpo.report.dynamics import margin, predict_margin
from rcpo.report.runs import Column, Run
from rcpo.report.series import Curve, binned, mean_line, of_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", Sequence[Run], int], None]
BEYOND = 6.0  # how far the ratio's axis reaches past its lines: where ρ is small the band is as good as open
SMALL = 0.01  # nats: less than this is drawn as the nothing that it is


def unit_of(runs: Sequence[Run]) -> str:
    """The unit of log-probs and log-ratios: that of the objective's reduction, where the runs agree."""
    found = {UNITS.get(str(run.settings.get("objective.reduction")), "nats") for run in runs}
    return found.pop() if len(found) == 1 else "nats"


def sides(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """Winner and loser against the reference (log-probs of runs that have none); diamonds are held out."""
    related = any(run.has("logratios/chosen") for run in runs)
    names = "logratios" if related else "logps"
    axes.set_title(f"Winner and loser: {'log-ratios to the reference' if related else 'log-probs'}")
    axes.set_ylabel(unit_of(runs))
    if related:
        level(axes, 0.0, SMALL)
    for side, label, colour in (("chosen", "winner", theme.WINNER), ("rejected", "loser", theme.LOSER)):
        key = f"{names}/{side}"
        _curves(axes, _lines(runs, key, width), width, colour, label)
        for run in runs:
            _held_out(axes, run, key, colour)


def rewards(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """Rewards of winner and loser, as tools log them that have no log-ratios; diamonds are held out."""
    axes.set_title("Winner and loser: rewards")
    axes.set_ylabel("reward")
    level(axes, 0.0, SMALL)
    for side, label, colour in (("chosen", "winner", theme.WINNER), ("rejected", "loser", theme.LOSER)):
        _curves(axes, _lines(runs, f"rewards/{side}", width), width, colour, label)
        for run in runs:
            _held_out(axes, run, f"rewards/{side}", colour)


def reward_margin(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The margin of the rewards; diamonds are held out."""
    axes.set_title("Margin of the rewards")
    axes.set_ylabel("reward")
    level(axes, 0.0, SMALL)
    _curves(axes, _lines(runs, "rewards/margins", width), width, theme.INK, "winner − loser")
    for run in runs:
        _held_out(axes, run, "rewards/margins", theme.INK)


def fresh(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """What the closed loop goes by: fresh winners and losers, and the target; diamonds are held out."""
    axes.set_title("Fresh winner and loser: log-ratios to the start")
    axes.set_ylabel("nats per token")
    for target in sorted({float(run.settings.get("rc.target") or 0.0) for run in runs}):
        level(axes, target, SMALL, label=f"target {target:g}")
    for side, label, colour in (("chosen", "winner", theme.WINNER), ("rejected", "loser", theme.LOSER)):
        _curves(axes, _lines(runs, f"rc/{label}", width), width, colour, label)
        for run in runs:
            _held_out(axes, run, f"token_logratios/{side}", colour)


def _held_out(axes: Axes, run: Run, key: str, colour: str) -> None:
    steps, values = run.held_out(key)
    final = run.evaluation.get(f"eval/{key}")
    if final is not None and run.evaluation_is_final and run.last_step:
        steps, values = np.append(steps, run.last_step), np.append(values, final)
    axes.plot(steps, values, "D", color=colour, markersize=5.5, markeredgecolor=theme.PAPER, clip_on=False)


def ratio(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The incentive ratio, before and after calibration, over the batch's band and the one across samples."""
    axes.set_title("Incentive ratio and the bands")
    axes.set_ylabel("d_w / d_l, log scale")
    centre = _mean_of(runs, "dynamics/band_center", width, geometric=True)
    if not len(centre.steps):
        _say(axes, "not measured")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    before = _mean_of(runs, "dynamics/incentive_ratio", width, geometric=True)
    calibrated = _lines(runs, "rc/calibrated_ratio", width, geometric=True)
    after = mean_line(calibrated, width, geometric=True)
    _band(axes, centre, _mean_of(runs, "dynamics/score_cosine", width), [before, after])
    _sample_band(axes, runs, width)
    _draw(axes, centre, theme.MUTED, "r*", linewidth=1)
    _draw_before(axes, before, "r", calibrated)
    _curves(axes, calibrated, width, theme.CALIBRATED, "α² r", geometric=True)


def _band(axes: Axes, centre: Curve, cosine: Curve, others: Sequence[Curve]) -> None:
    """ρ r* to r*/ρ; open to the edge of the panel where ρ ≤ 0."""
    rho = np.interp(centre.steps, cosine.steps, cosine.values)
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
        steps = np.array([steps[0] - 0.5, steps[0] + 0.5])
        lower, upper = np.repeat(lower, 2), np.repeat(upper, 2)
    axes.fill_between(steps, lower, upper, color=theme.BAND, alpha=0.28, linewidth=0, label="batch's band")


def _sample_band(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """r̄* ρ̄ to r̄*/ρ̄, outlined, for it can be as narrow as a line; nothing before it stands clear of noise."""
    ends = [
        _mean_of(runs, f"dynamics/samples/band_{end}", width, geometric=True) for end in ("lower", "upper")
    ]
    lower, upper = ends
    if not len(lower.steps) or not len(upper.steps):
        return
    high = np.interp(lower.steps, upper.steps, upper.values)
    style: dict[str, Any] = {"color": theme.INK, "alpha": 0.3, "linewidth": 1.0}
    axes.fill_between(lower.steps, lower.values, high, label="samples' band", **style)


def alpha(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The calibration's weight α on a logarithmic axis; 1 means no calibration."""
    axes.set_title("Calibration weight α")
    axes.set_ylabel("α, log scale")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.update_datalim([(1, 0.8), (1, 1.25)], updatex=False)
    level(axes, 1.0)
    lines = _lines(runs, "rc/alpha", width, geometric=True)
    if not lines:
        _say(axes, "no calibration: α = 1")
    _curves(axes, lines, width, theme.CALIBRATED, "α", geometric=True)


def margins(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """The margin, measured on each step's batch and predicted to first order from where it began."""
    axes.set_title("Margin: measured and first order")
    axes.set_ylabel(unit_of(runs))
    measured = of_runs(runs, margin, width)
    begun = 0.0
    if any(run.has("logratios/chosen") for run in runs):
        level(axes, 0.0, SMALL)
    elif measured:
        begun = mean_line(measured, width).values[0]
    _curves(axes, measured, width, theme.INK, "measured")
    predicted = [(run, predict_margin(run, width)) for run in runs]
    lines = [binned(run.steps, begun + found.change, width) for run, found in predicted if found is not None]
    if lines:
        style = (0, (1, 1.5))
        _draw(axes, mean_line(lines, width), theme.CALIBRATED, "first order", linewidth=1.8, linestyle=style)


def cosine(axes: Axes, runs: Sequence[Run], width: int) -> None:
    """ρ: how far the two sides' gradients point the same way."""
    axes.set_title("Score cosine ρ")
    axes.set_ylabel("cos(s_w, s_l)")
    level(axes, 0.0)
    lines = _lines(runs, "dynamics/score_cosine", width)
    if not lines:
        _say(axes, "not measured")
    _curves(axes, lines, width, theme.INK, "ρ")


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
        label = "before calibration" if after else "r in the band"
        _draw_before(axes, mean_line(before, width), label, after)
    if after:
        _draw(axes, mean_line(after, width), theme.CALIBRATED, "calibrated", linewidth=1.8)


def _lines(
    runs: Sequence[Run], key: str, width: int, *, geometric: bool = False, scale: float = 1.0
) -> list[Curve]:
    return of_runs(runs, lambda run: run.column(key) * scale, width, geometric=geometric)


def _mean_of(runs: Sequence[Run], key: str, width: int, *, geometric: bool = False) -> Curve:
    return mean_line(_lines(runs, key, width, geometric=geometric), width, geometric=geometric)


def _curves(
    axes: Axes, lines: Sequence[Curve], width: int, colour: str, label: str, *, geometric: bool = False
) -> None:
    """The runs thin, their mean in bold; one run alone in bold."""
    if not lines:
        return
    if len(lines) > 1:
        for line in lines:
            axes.plot(line.steps, line.values, color=colour, linewidth=0.7, alpha=0.45)
    _draw(axes, mean_line(lines, width, geometric=geometric), colour, label, linewidth=1.8)


def _draw_before(axes: Axes, line: Curve, label: str, after: Sequence[Curve]) -> None:
    """What was there before calibration: dashed where there is something after it."""
    _draw(axes, line, theme.INK, label, linewidth=1.4, linestyle=(0, (4, 2)) if after else "-")


def _draw(axes: Axes, line: Curve, colour: str, label: str, **style: Any) -> None:
    axes.plot(line.steps, line.values, color=colour, label=label, **style, **dots(line.values))


def dots(values: Column) -> dict[str, Any]:
    """A marker for a line so short that it would not be seen."""
    return {"marker": "o", "markersize": 4} if np.count_nonzero(~np.isnan(values)) < 3 else {}


def level(axes: Axes, value: float, around: float = 0.0, label: str | None = None) -> None:
    """A reference line; the axis reaches at least `around` to both sides of it."""
    axes.update_datalim([(1, value - around), (1, value + around)], updatex=False)
    axes.axhline(value, color=theme.MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label=label)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=theme.MUTED)
