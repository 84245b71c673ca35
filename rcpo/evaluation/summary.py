"""What happened to winner and loser on held-out pairs, in one plain sentence and one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from rich.table import Table

NOTICEABLE = 0.1  # nats: e^0.1 is 10 % more probability, in the unit of the objective's reduction
UNITS = {  # of log-probs and log-ratios, by `objective.reduction`
    "mean": "nats per token",
    "average": "nats per token",
    "sum": "nats per response",
    "importance": "nats, weighted tokens",
}

ROWS = (
    ("preference accuracy (rewards)", "rewards/accuracies", "percent"),
    ("preference accuracy (log-probs)", "logps/accuracies", "percent"),
    ("exact match", "exact_match", "percent"),
    ("winner's mean log-ratio", "logratios/chosen", "nats"),
    ("loser's mean log-ratio", "logratios/rejected", "nats"),
    ("winner's median log-ratio per token", "token_logratios/chosen/median", "nats"),
    ("loser's median log-ratio per token", "token_logratios/rejected/median", "nats"),
    ("pairs whose winner fell", "winner_fell", "percent"),
    ("KL to the reference per answer", "kl", "nats"),
    ("winner's mean log-prob", "logps/chosen", "nats"),
    ("loser's mean log-prob", "logps/rejected", "nats"),
    ("reward margin", "rewards/margins", "nats"),
    ("loss", "loss", "nats"),
)


JUDGE_ROWS = (
    ("win rate", "win_rate", "percent"),
    ("length-controlled win rate", "length_controlled_win_rate", "percent"),
    ("wins", "wins", "percent"),
    ("losses", "losses", "percent"),
    ("ties", "ties", "percent"),
    ("both orders agree", "agreement", "percent"),
    ("Cohen's kappa of the orders", "kappa", "other"),
    ("verdicts for what was shown first", "first_position_rate", "percent"),
    ("agrees with the labels", "label_agreement", "percent"),
    ("Cohen's kappa with the labels", "label_kappa", "other"),
)


class Move(Enum):
    """Where a side's mean log-ratio went, as far as its interval tells; single pairs may differ."""

    FELL = "fell"
    SLIPPED = f"fell, perhaps by less than {NOTICEABLE}"
    KEPT = f"moved by less than {NOTICEABLE}"
    GAINED = f"rose, perhaps by less than {NOTICEABLE}"
    ROSE = "rose"
    OPEN = "moved too unevenly to call"

    @property
    def down(self) -> bool:
        """Whether the mean fell, however far."""
        return self in (Move.FELL, Move.SLIPPED)


def move(low: float, high: float) -> Move:
    """What an interval of the mean log-ratio, in nats, says about a side.

    The rule: within ±`NOTICEABLE` = 0.1 nats (a probability changed by less than 10 %) counts as kept. An
    interval below, inside, or above that zone is clear. One across an edge tells the direction, but not the
    size, where it leaves out 0, and otherwise nothing.
    """
    if high < -NOTICEABLE:
        return Move.FELL
    if low > NOTICEABLE:
        return Move.ROSE
    if low >= -NOTICEABLE and high <= NOTICEABLE:
        return Move.KEPT
    if high < 0:
        return Move.SLIPPED
    return Move.GAINED if low > 0 else Move.OPEN


def describe(values: Mapping[str, float | None], reduction: str | None) -> str:
    """The sentence for a record of evaluation.json (`eval/NAME`, `…/low`, `…/high`).

    `reduction` is the objective's, which gives log-ratios their unit. Without log-ratios (no reference to
    compare with) the sentence has the log-probs instead.
    """
    return _what_moved(values, UNITS.get(reduction or "", "nats")) + _how_good(values) + "."


def _what_moved(values: Mapping[str, float | None], unit: str) -> str:
    winner, loser = _move_of(values, "logratios/chosen"), _move_of(values, "logratios/rejected")
    if winner is None:
        shown = " and ".join(
            f"{side} {interval(values, f'logps/{key}')}"
            for side, key in (("winner", "chosen"), ("loser", "rejected"))
            if _value(values, f"logps/{key}") is not None
        )
        known = f"{shown} {unit}" if shown else "unknown"
        return f"There is no reference to compare with (mean log-probs: {known})"
    if _all_zero(values, "logratios/chosen") and _all_zero(values, "logratios/rejected"):
        return "The policy gives the held-out pairs the same probabilities as the reference"
    won = f"mean log-ratio {interval(values, 'logratios/chosen')} {unit}{_of_how_many(values)}"
    won += against_the_mean(_value(values, "winner_fell"), fell=winner.down)
    if loser is None:
        return f"On average the winner {winner.value} ({won})"
    lost = interval(values, "logratios/rejected")
    if winner is Move.FELL and loser is Move.FELL:
        return (
            f"On average the winner fell with the loser: likelihood displacement ({won}; the loser's {lost})"
        )
    if winner.down and not loser.down:
        return f"On average the winner {winner.value} ({won}) although the loser {_did(loser)} ({lost})"
    joint = "while" if loser.down or loser is Move.OPEN else "and"
    return f"On average the winner {winner.value} ({won}) {joint} the loser {loser.value} ({lost})"


def against_the_mean(share: float | None, *, fell: bool) -> str:
    """Return the share of pairs whose winner fell, where the mean suggests that most did the opposite."""
    if share is None or not (share < 0.5 if fell else share > 0.5):
        return ""
    return f"; the winner fell in {'only ' if fell else ''}{_percent(share)} of the pairs"


def _of_how_many(values: Mapping[str, float | None]) -> str:
    """How many pairs the log-ratios are of, where they are not of all."""
    compared = _value(values, "logratios/examples")
    return "" if compared is None else f" of {int(compared):,} pairs"


def _did(loser: Move) -> str:
    return "did not" if loser is Move.KEPT else loser.value


def _how_good(values: Mapping[str, float | None]) -> str:
    named = [("held-out accuracy", "rewards/accuracies"), ("exact match", "exact_match")]
    if equal_rewards(values):
        named[0] = ("held-out accuracy by log-probs", "logps/accuracies")
    figures = [
        f"{name} {_percent(value)}" for name, key in named if (value := _value(values, key)) is not None
    ]
    return f"; {', '.join(figures)}" if figures else ""


def equal_rewards(values: Mapping[str, float | None]) -> bool:
    """Whether no reward prefers a side, so that an accuracy by rewards tells nothing."""
    return _all_zero(values, "rewards/margins")


def _all_zero(values: Mapping[str, float | None], name: str) -> bool:
    """Whether a metric is 0 for every pair, as a policy's rewards are that is its own reference."""
    return all(_value(values, f"{name}{end}") == 0 for end in ("", "/low", "/high"))


def _move_of(values: Mapping[str, float | None], name: str) -> Move | None:
    low, high = _value(values, f"{name}/low"), _value(values, f"{name}/high")
    return None if low is None or high is None else move(low, high)


def _value(values: Mapping[str, float | None], name: str) -> float | None:
    value = values.get(f"eval/{name}")
    return None if value is None or math.isnan(value) else value


def interval(values: Mapping[str, float | None], name: str, unit: str = "nats") -> str:
    """`mean [low, high]` of a metric, in percent or with two decimals; a dash where it is missing."""
    form = _percent if unit == "percent" else _nats
    mean, low, high = (_value(values, f"{name}{end}") for end in ("", "/low", "/high"))
    if name == "rewards/accuracies" and equal_rewards(values):
        return "– (equal rewards)"
    if mean is None:
        return "–"
    return form(mean) if low is None or high is None else f"{form(mean)} [{form(low)}, {form(high)}]"


def _percent(share: float) -> str:
    """A share as a whole percentage, with one decimal where rounding would claim 0 or 100."""
    percentage = 100 * share
    rounded = round(percentage)
    return f"{percentage:.1f} %" if rounded in (0, 100) and percentage != rounded else f"{rounded} %"


def _nats(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def summary_table(values: Mapping[str, float | None]) -> Table:
    """The main held-out numbers that the record has, with their 95 % intervals."""
    table = Table(title=_title(values), title_justify="left")
    table.add_column("held-out")
    table.add_column("mean [95 % interval]", justify="right")
    for label, name, unit in ROWS:
        if _value(values, name) is not None:
            table.add_row(label, interval(values, name, unit))
    return table


def task_table(values: Mapping[str, float | None]) -> Table:
    """The harness's metrics with their standard errors, from `eval/harness/TASK/METRIC`."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for title in ("task", "metric"):
        table.add_column(title)
    table.add_column("value ± standard error", justify="right")
    for name, value in values.items():
        if name.endswith("/stderr") or value is None:
            continue
        _, _, task, metric = name.split("/", 3)
        error = values.get(f"{name}/stderr")
        table.add_row(task, metric, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return table


def judge_rows(values: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """What `eval/judge/*` of a record says, in words and with 95 % intervals."""
    return [
        (label, interval(values, f"judge/{name}", unit))
        for label, name, unit in JUDGE_ROWS
        if _value(values, f"judge/{name}") is not None
    ]


def judge_counts(values: Mapping[str, float | None]) -> str:
    """How many pairs of answers were judged, and how many have no verdict."""
    count, failed = _value(values, "judge/examples") or 0, _value(values, "judge/failed") or 0
    labels = _value(values, "judge/labelled")
    text = f"{int(count):,} pairs of answers, both orders"
    text += f", {int(labels):,} with a label" if labels else ""
    return text + (f"; {int(failed):,} more without a verdict" if failed else "")


def judge_table(values: Mapping[str, float | None]) -> Table:
    """The judge's record as a table for the terminal."""
    table = Table(title=f"Judge: {judge_counts(values)}", title_justify="left")
    table.add_column("judged")
    table.add_column("value [95 % interval]", justify="right")
    for row in judge_rows(values):
        table.add_row(*row)
    return table


def _title(values: Mapping[str, float | None]) -> str:
    count = _value(values, "examples")
    title = "Held-out evaluation" if count is None else f"Held-out evaluation on {int(count):,} pairs"
    compared = _value(values, "logratios/examples")
    return title if compared is None else f"{title}, log-ratios on {int(compared):,} of them"
