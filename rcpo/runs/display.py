"""The terminal view of a run: a live bar on a terminal, thinned plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from rcpo.runs.jsonl import Scalar
from rcpo.runs.sparkline import History, extent, sparkline

PLAIN_LINES = 20  # a whole run fits on one screen of a log file
PLAIN_SECONDS = 60.0  # but a slow run still shows that it is alive
SIDES = {"log-ratio": "logratios", "log-prob": "logps"}  # what a side is shown by: the first that a row has
CHART_STYLES = {"winner": "#0072b2", "loser": "#d55e00", "margin": "default"}  # as in the report
CHART_TEXT = 30  # columns of a chart's line beside the chart: its name and its scale


class Display(Protocol):
    """Where a run speaks to the person who started it."""

    def row(self, step: int, row: Mapping[str, Scalar]) -> None:
        """Show a logged step."""

    def message(self, text: str) -> None:
        """Show a line of text, whatever the progress."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def open_display(console: Console, total_steps: int, first_step: int) -> Display:
    """The live view on a terminal that can redraw, plain lines elsewhere; `first_step` steps are done."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, total_steps, first_step)
    return PlainDisplay(console, total_steps)


class _Bar(Progress):
    """The bar, two lines for the figures, a line for each chart: all fit a terminal of 80 columns."""

    figures: Sequence[str] = ()
    unicode = True  # the ellipsis is none of ASCII's letters
    charts: Sequence[Text] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in self.figures:
            yield Text(line, no_wrap=True, overflow="ellipsis" if self.unicode else "crop")
        yield from self.charts


class _Charts:
    """Winner, loser and margin since the run began (or went on), a line each; the sides share their scale."""

    def __init__(self) -> None:
        self._histories = {name: History() for name in ("winner", "loser", "margin")}

    def add(self, row: Mapping[str, Scalar]) -> None:
        _, winner, loser = _sides(row)
        values = {"winner": winner, "loser": loser, "margin": row.get("rewards/margins")}
        for name, history in self._histories.items():
            history.add(values[name])

    def lines(self, width: int) -> list[Text]:
        """One line for each quantity that is known, in a terminal of `width` columns."""
        points = {
            name: history.points(max(8, width - CHART_TEXT)) for name, history in self._histories.items()
        }
        sides, margin = extent(points["winner"], points["loser"]), extent(points["margin"])
        scales = {"winner": sides, "loser": sides, "margin": margin}
        lines = []
        for name, values in points.items():
            scale = scales[name]
            if scale is None or extent(values) is None:
                continue
            line = Text(f"{name:<7}", no_wrap=True, overflow="crop")
            line.append(sparkline(values, *scale), style=CHART_STYLES[name])
            lines.append(line.append(f"  {scale[0]:+.3f} to {scale[1]:+.3f}", style="dim"))
        return lines


class LiveDisplay:
    """A view that redraws itself: step, bar, time left; the figures of the last step; charts of the run."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn())
        self._charts = _Charts()
        self._bar = _Bar(*columns, console=console, expand=True)
        self._bar.unicode = not console.options.ascii_only
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step)
        self._bar.start()

    def row(self, step: int, row: Mapping[str, Scalar]) -> None:
        alpha = "α" if self._bar.unicode else "alpha"
        objective, calibration = _figures(row, alpha, width=0)
        lines = (objective + calibration, _side_figures(row, width=0))
        self._bar.figures = ["  ".join(line) for line in lines if line]
        self._charts.add(row)
        if self._bar.unicode:
            self._bar.charts = self._charts.lines(self._console.width)
        self._bar.update(self._task, completed=step)

    def message(self, text: str) -> None:
        _print(self._console, text)

    def close(self) -> None:
        self._bar.stop()


class PlainDisplay:
    """About `PLAIN_LINES` aligned lines a run, and one a minute where steps are slow."""

    def __init__(
        self, console: Console, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._total = total_steps
        self._stride = nice_stride(total_steps, PLAIN_LINES)
        self._clock = clock
        self._begun: tuple[int, float] | None = None  # the first row: what came before it was preparation
        self._shown: tuple[int, float] | None = None

    def row(self, step: int, row: Mapping[str, Scalar]) -> None:
        now = self._clock()
        self._begun = self._begun or (step, now)
        if not self._is_due(step, now):
            return
        self._shown = step, now
        width = len(str(self._total))
        objective, calibration = _figures(row, "alpha", width=9)
        figures = "  ".join([*objective, *_side_figures(row, width=9), *calibration])
        line = f"step {step:>{width}}/{self._total}  {figures}  {self._time_left(step, now)}"
        _print(self._console, line.rstrip())

    def _is_due(self, step: int, now: float) -> bool:
        if self._shown is None or step >= self._total:
            return True
        crossed = step // self._stride > self._shown[0] // self._stride
        return crossed or now - self._shown[1] >= PLAIN_SECONDS

    def _time_left(self, step: int, now: float) -> str:
        assert self._begun is not None
        done = step - self._begun[0]
        if done == 0:
            return ""
        seconds = round((now - self._begun[1]) / done * (self._total - step))
        hours, rest = divmod(seconds, 3600)
        clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
        return f"{clock:>7} left"

    def message(self, text: str) -> None:
        _print(self._console, text)

    def close(self) -> None:
        """Nothing to restore."""


def nice_stride(total: int, lines: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that cuts `total` steps into at most `lines` parts."""
    stride, factors = 1, (2, 5, 10)
    while True:
        for step in (stride, *(stride * factor for factor in factors[:2])):
            if step * lines >= total:
                return step
        stride *= factors[2]


def _figures(row: Mapping[str, Scalar], alpha: str, width: int) -> tuple[list[str], list[str]]:
    """`name value` for loss and margin, and for α and speed, as far as the row has them; right-aligned."""

    def shown(name: str, value: Scalar, form: str) -> list[str]:
        return [] if value is None else [f"{name} {form.format(value):>{width}}"]

    objective = shown("loss", row.get("loss"), "{:.4f}")
    objective += shown("margin", row.get("rewards/margins"), "{:+.4f}")
    calibration = shown(alpha, row.get("rc/alpha"), "{:.3f}")
    speed = row.get("tokens_per_second")
    if speed is not None:
        calibration.append(f"{_compact(speed):>{min(width, 6)}} tok/s")
    return objective, calibration


def _side_figures(row: Mapping[str, Scalar], width: int) -> list[str]:
    """`log-ratio: winner value`, `loser value`, or the same with log-probs where that is all there is."""
    unit, *values = _sides(row)
    shown = [
        f"{name} {value:>+{width}.3f}"
        for name, value in zip(("winner", "loser"), values)
        if value is not None
    ]
    return [f"{unit}: {shown[0]}", *shown[1:]] if shown else []


def _sides(row: Mapping[str, Scalar]) -> tuple[str, Scalar, Scalar]:
    """What the sides are shown by, and their values."""
    kinds = [(unit, row.get(f"{name}/chosen"), row.get(f"{name}/rejected")) for unit, name in SIDES.items()]
    return next((kind for kind in kinds if kind[1:] != (None, None)), kinds[-1])


def _compact(value: float) -> str:
    """A number in four characters or so: 853, 12.4k, 1.3M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def _print(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours, no wrapping, and `?` for what the console cannot encode."""
    safe = text.encode(console.encoding, "replace").decode(console.encoding)
    console.print(safe, markup=False, highlight=False, emoji=False, soft_wrap=True)
