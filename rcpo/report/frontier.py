"""The frontier of a sweep: what each condition gives of margin, and what of the winner it pays for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from rcpo.report import theme
from rcpo.report.figures import new_figure
from rcpo.runs.comparison import Condition, as_equal, comparable, differing, labelled, rule_of
from rcpo.runs.statistics import Spread, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINNER, LOSER = "eval/token_logratios/chosen", "eval/token_logratios/rejected"
NLL = "objective.nll_coef"
FEWEST = 3  # conditions; two are compared by the overview
# of a label from its point, in points: up and to the right first, where a falling curve leaves room
OFFSETS = [(side * 7, side * up) for up in (5, 17, 30, 45, 62) for side in (1, -1)]
MARKERS = {"off": "o", "on": "s", "edge": "^", "loop": "D", "fixed": "v"}


@dataclass(frozen=True)
class Point:
    """A condition by its held-out winner and margin, in nats per token."""

    condition: Condition
    winner: Spread
    margin: Spread

    @property
    def rule(self) -> str:
        return rule_of(self.condition.settings)

    @property
    def alpha(self) -> float | None:
        """The constant α of the condition, which is 1 without calibration; None where α varies."""
        value = 1.0 if self.rule == "off" else self.condition.settings.get("rc.alpha")
        return None if self.rule not in ("off", "fixed") or value is None else float(value)

    @property
    def nll(self) -> float:
        """The weight of the winner's negative log-likelihood in the objective."""
        return float(self.condition.settings.get(NLL) or 0.0)


def frontiers(found: Sequence[Condition]) -> list[list[Point]]:
    """The points that differ in `rc.*` and `objective.nll_coef` alone, a list for each figure."""
    points = [point for condition in found if (point := _point(condition)) is not None]
    settings = [comparable(point.condition.settings) for point in points]
    keys = [key for key in differing(settings) if key not in ("rc", NLL) and not key.startswith("rc.")]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point, own in zip(points, settings):
        groups.setdefault(tuple(as_equal(own.get(key)) for key in keys), []).append(point)
    return [group for group in groups.values() if len(group) >= FEWEST]


def _point(condition: Condition) -> Point | None:
    runs = [run.values for run in condition.runs if WINNER in run.values and LOSER in run.values]
    winner, margin = (
        spread([values[WINNER] for values in runs]),
        spread([values[WINNER] - values[LOSER] for values in runs]),
    )
    return None if winner is None or margin is None else Point(condition, winner, margin)


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The tuned constants by what a reader calls them, each in the order of its values; none of one point."""
    alphas = [point for point in points if point.alpha is not None and point.nll == 0]
    nlls = [point for point in points if point.rule == "off"]
    found = {
        "constant α": sorted(alphas, key=lambda point: point.alpha or 0.0),
        "nll_coef": sorted(nlls, key=lambda point: point.nll),
    }
    return {name: curve for name, curve in found.items() if len(curve) > 1}


def frontier(points: Sequence[Point]) -> Figure:
    """Held-out margin against the held-out winner."""
    figure = new_figure(4.2)
    figure.subplots_adjust(left=0.085, right=0.98, top=0.9, bottom=0.12)
    axes = figure.subplots()
    axes.axvline(0, color=theme.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.axhline(0, color=theme.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for (name, curve), style in zip(curves(points).items(), ((0, (4, 2)), (0, (1, 1.5)))):
        axes.plot(
            [point.winner.mean for point in curve],
            [point.margin.mean for point in curve],
            color=theme.MUTED,
            linestyle=style,
            linewidth=1.2,
            label=name,
            zorder=1,
        )
    for point in points:
        _draw(axes, point)
    axes.set_title("Margin against winner, held out")
    axes.set_xlabel("winner's log-ratio, nats per token")
    axes.set_ylabel("margin, nats per token")
    axes.margins(0.12)
    _shade_kept_winners(axes)
    _write(axes, labels(points))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", bbox_to_anchor=(1, 1.1), ncol=2)
    return figure


def _shade_kept_winners(axes: Axes) -> None:
    """Shade where the winner did not fall and the loser did not rise: 0 ≤ winner ≤ margin."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.fill_between(
        [0, max(right, 0)],
        [0, max(right, 0)],
        max(top, right),
        color=theme.CALIBRATED,
        alpha=0.08,
        linewidth=0,
    )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _write(axes: Axes, texts: Mapping[tuple[float, float], str]) -> None:
    """Write each label at the nearest of `OFFSETS` where it covers no point and no other label."""
    area = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in axes.transData.transform(list(texts))]
    for place, text in sorted(texts.items()):
        note = axes.annotate(
            text, place, OFFSETS[0], textcoords="offset points", fontsize=8, color=theme.INK, zorder=3
        )
        for right, up in OFFSETS:
            note.set_position((right, up))
            note.set_horizontalalignment("left" if right > 0 else "right")
            note.set_verticalalignment("bottom" if up > 0 else "top")
            box = note.get_window_extent()
            inside = area.x0 < box.x0 and box.x1 < area.x1 and area.y0 < box.y0 and box.y1 < area.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if (right, up) not in OFFSETS[:2]:  # a line to what it names
            line = {"arrowstyle": "-", "color": theme.MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", place, (right, up), textcoords="offset points", arrowprops=line)


def labels(points: Sequence[Point]) -> dict[tuple[float, float], str]:
    """What to write at each place; conditions that fall on one place share it."""
    found: dict[tuple[float, float], str] = {}
    for point, full in zip(points, labelled([point.condition.settings for point in points])):
        place = point.winner.mean, point.margin.mean
        label = _short(point, full)
        found[place] = f"{found[place]}, {label}" if place in found else label
    return found


def _short(point: Point, label: str) -> str:
    """The label without objective, reduction, and what is as usual; a constant is α = its value."""
    _, *parts = label.split(" ")
    usual = ["reduction=", "nll_coef=" if point.nll == 0 else "rc=off"]
    if point.rule == "fixed":
        usual += ["rc=fixed", "rc.alpha="]
        parts.append(f"α={point.alpha:g}")
    return " ".join(part for part in parts if not part.startswith(tuple(usual))) or label


def _draw(axes: Axes, point: Point) -> None:
    colour = theme.INK if point.rule == "off" else theme.CALIBRATED
    axes.errorbar(
        point.winner.mean,
        point.margin.mean,
        xerr=point.winner.deviation,
        yerr=point.margin.deviation,
        fmt=MARKERS.get(point.rule, "o"),
        color=colour,
        markerfacecolor=theme.PAPER if point.rule == "off" else colour,
        markersize=7,
        elinewidth=1,
        zorder=2,
    )
