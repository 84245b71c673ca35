"""What happened, as sentences: of one run, of a contrast, of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcpo.config.changes import flatten
from rcpo.evaluation.summary import NOTICEABLE, UNITS, against_the_mean, describe, interval
from rcpo.report.dynamics import Prediction
from rcpo.report.probes import CROSSED, Crossings
from rcpo.report.runs import Run, Status
from rcpo.runs.comparison import METRICS, Contrast, Metric
from rcpo.runs.statistics import spread

WINNER, LOSER = "eval/token_logratios/chosen", "eval/token_logratios/rejected"
FELL = "eval/winner_fell"
LAST = 10  # logged steps that stand for the end of training where nothing was evaluated


@dataclass(frozen=True)
class Extremes:
    """The conditions whose means of a score are highest and lowest: labels and values with their spread."""

    metric: Metric
    highest: tuple[str, str]
    lowest: tuple[str, str]


def headline_of_run(run: Run) -> str:
    """One sentence on a run: where it stands, or what became of winner and loser."""
    if run.status is Status.RUNNING:
        return f"Training, step {progress(run)}: {_standing(run)}."
    if run.status is Status.ENDED:
        reason = f": {run.error.rstrip('.')}" if run.error else ""
        return f"Ended early, at step {progress(run)}{reason}."
    if "nonfinite" in run.evaluation:
        return f"Finished after {run.last_step:,} steps, and what came out has values that are not finite."
    said = _judged(run)
    if {"eval/logratios/chosen", "eval/logps/chosen"} & set(run.evaluation):
        return f"{describe(run.evaluation, _reduction(run))} {said}".strip()
    if said:
        return said
    return f"Finished after {run.last_step:,} steps, not evaluated; {_standing(run)}."


def _judged(run: Run) -> str:
    """What a judge preferred, where one was asked."""
    if "eval/judge/win_rate" not in run.evaluation:
        return ""
    judge = str(run.judge.get("model", "the judge"))
    text = f"Win rate by {judge}: {interval(run.evaluation, 'judge/win_rate', 'percent')}"
    controlled = interval(run.evaluation, "judge/length_controlled_win_rate", "percent")
    return f"{text}, length-controlled {controlled}." if controlled != "–" else f"{text}."


def progress(run: Run) -> str:
    """The last step, and of how many, as far as there are more to come."""
    last, planned = run.last_step, run.planned_steps
    return f"{last:,} of {planned:,}" if planned and planned != last else f"{last:,}"


def _standing(run: Run) -> str:
    """Where winner and loser are at the end of what was logged."""
    names = "logratios" if run.has("logratios/chosen") else "logps"
    values = [run.column(f"{names}/{side}")[-LAST:] for side in ("chosen", "rejected")]
    means = [
        float(np.nanmean(value)) if len(value) and not np.isnan(value).all() else None for value in values
    ]
    if means[0] is None:
        return "nothing is logged yet"
    parts = [
        f"the {side} at {number(mean)}" for side, mean in zip(("winner", "loser"), means) if mean is not None
    ]
    kind = "log-ratios" if names == "logratios" else "log-probs"
    return f"{' and '.join(parts)} ({kind}, {UNITS.get(_reduction(run), 'nats')})"


def _reduction(run: Run) -> str:
    return str(run.settings.get("objective.reduction"))


def number(value: float) -> str:
    """Two decimals with a minus that is one."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def warnings_of_run(run: Run) -> list[str]:
    """What a reader of its numbers has to know."""
    notes = []
    lost = sum(row.get("nonfinite") or 0 for row in run.rows)
    if lost:
        notes.append(f"{lost} logged values were not finite; they are gaps in the figures.")
    if run.status in (Status.RUNNING, Status.ENDED) and run.evaluation and run.last_evaluated is not None:
        steps = f"{run.last_evaluated:,} of {run.planned_steps or run.last_step:,}"
        notes.append(f"The held-out figures are those after step {steps}.")
    for key, text in (
        (
            "rc/skipped",
            "steps said nothing about α (a side without positive incentive) and left it as it was",
        ),
        ("rc/clamped", "times α was clamped to its limit"),
    ):
        counts = run.column(key)
        counts = counts[~np.isnan(counts)]
        if len(counts) and counts[-1] > 0:
            notes.append(f"{int(counts[-1])} {text}.")
    return notes


def other_code(runs: Sequence[Run]) -> list[str]:
    """A note where runs that are compared were not made by the same code."""
    every = [flatten(run.environment) for run in runs if run.environment]
    keys = [key for each in every for key in each if key.partition(".")[0] in ("git", "packages")]
    found = [key for key in dict.fromkeys(keys) if len({str(each.get(key)) for each in every}) > 1]
    return [f"The runs were made by different code ({', '.join(found)}): see Environment."] if found else []


def headline_of_contrasts(pairs: Sequence[Contrast]) -> str:
    """One sentence on all contrasts: the clearest one, and how many of them agree."""
    measured = [pair for pair in pairs if _means(pair) is not None]
    if not measured:
        return "Runs without and with calibration; none has held-out log-ratios on both sides yet."
    kept = [pair for pair in measured if _stopped_the_fall(pair)]
    first = max(kept or measured, key=_gain)
    said = f"{_verdict(first)}{_loser(first)} ({first.label}, {_seeds(first)})."
    if len(measured) == 1:
        return said
    agree = f"In {len(kept)} of {len(measured)} comparisons the mean winner fell without RC and not with it."
    return f"{agree} The largest gain: {said[0].lower()}{said[1:]}"


def sentence_of_contrast(pair: Contrast) -> str:
    """What calibration changed, from means over seeds: "On average RC kept the winner: −0.03 against …"."""
    if _means(pair) is None:
        return f"{pair.label}: no held-out log-ratios on both sides yet."
    return f"{pair.label}: {_verdict(pair)}{_loser(pair)}{_score(pair)} ({_seeds(pair)})."


def _means(pair: Contrast, key: str = WINNER) -> tuple[float, float] | None:
    """Both sides' means over the seeds that both have; over all of each side's where they share none."""
    common = pair.means(key)
    if common is not None:
        return common
    base, calibrated = spread(pair.base.values(key)), spread(pair.calibrated.values(key))
    return None if base is None or calibrated is None else (base.mean, calibrated.mean)


def _gain(pair: Contrast) -> float:
    means = _means(pair)
    assert means is not None
    return means[1] - means[0]


def _stopped_the_fall(pair: Contrast) -> bool:
    """Apply the evaluation's rule: below −0.1 nats a winner fell; a change of less than 0.1 is none."""
    means = _means(pair)
    assert means is not None
    base, calibrated = means
    return base < -NOTICEABLE <= calibrated and not _alike(base, calibrated)


def _alike(base: float, calibrated: float) -> bool:
    return abs(calibrated - base) < NOTICEABLE


def _verdict(pair: Contrast) -> str:
    means = _means(pair)
    assert means is not None
    base, calibrated = means
    fell = _means(pair, FELL)
    share = None if fell is None else fell[1]
    figures = f"{number(calibrated)} against {number(base)} nats per token"
    figures += against_the_mean(share, fell=calibrated < -NOTICEABLE)
    return f"On average {_what_rc_did(pair, base, calibrated)}: {figures}"


def _what_rc_did(pair: Contrast, base: float, calibrated: float) -> str:
    if _stopped_the_fall(pair):
        return "RC kept the winner" if calibrated <= NOTICEABLE else "RC raised the winner"
    if max(abs(base), abs(calibrated)) <= NOTICEABLE:
        return f"the winner stayed within {NOTICEABLE} with and without RC"
    if _alike(base, calibrated):
        return f"RC changed the winner by less than {NOTICEABLE}"
    if min(base, calibrated) >= -NOTICEABLE:
        return "the winner fell neither with nor without RC"
    if calibrated > base:
        return "RC slowed the winner's fall, it did not stop it"
    return "RC did not keep the winner"


def _loser(pair: Contrast) -> str:
    means = _means(pair, LOSER)
    return "" if means is None else f"; the loser went to {number(means[1])} against {number(means[0])}"


def _score(pair: Contrast) -> str:
    for key in ("eval/exact_match", "eval/rewards/accuracies"):
        means = _means(pair, key)
        if means is not None:
            metric = next(metric for metric in METRICS if metric.key == key)
            return f"; {metric.title} {metric.show(means[1])} against {metric.show(means[0])}"
    return ""


def _seeds(pair: Contrast) -> str:
    """How many seeds stand behind the winner's difference, and whether its interval allows none at all."""
    found = pair.difference(WINNER)
    if found is None:
        return "no seed in common"
    if found.low is None or found.high is None:
        return "1 seed"
    doubt = "" if found.clear else "; the difference's interval holds 0"
    return f"{found.count} seeds{doubt}"


def headline_of_runs(runs: Sequence[Run], found: Extremes | None) -> str:
    """Several runs without a contrast: how many ended, and from where to where a downstream score goes.

    Both ends have their spread, so that the best of many noisy ones does not pass for better.
    """
    done = sum(run.status in (Status.FINISHED, Status.EVALUATED) for run in runs)
    text = f"{done} of {len(runs)} runs are finished"
    if found is None:
        return f"{text}."
    (low, least), (high, most) = found.lowest, found.highest
    if low == high:
        return f"{text}; {found.metric.title} {most} ({high})."
    return f"{text}; {found.metric.title} goes from {least} ({low}) to {most} ({high})."


def about_prediction(run: Run, found: Prediction | None) -> str:
    """How the margin's first order was made, and how well it agrees."""
    if found is None:
        return ""
    agreement = (
        ""
        if found.correlation is None
        else f" Its correlation with the measured curve is {found.correlation:.2f}."
    )
    if found.factor is None:
        return f"First order: learning rate times m' added up over the steps, nothing fitted.{agreement}"
    how = f"optim={run.settings.get('optim.name')} and rc.geometry={run.settings.get('rc.geometry')}"
    return (
        f"First order: with {how} the dynamics do not tell the size of a step, so the dotted line adds up "
        f"learning rate times m' of a step of unit length and is scaled by one fitted number "
        f"({found.factor:.3g}); its shape and sign are the prediction.{agreement}"
    )


def about_crossings(label: str, found: Crossings) -> str:
    """Who crossed the start, in counts."""
    were = "was" if found.winner_ever == 1 else "were"
    text = f"{label}: of {found.pairs} probe pairs, {_many(found.winner_ever, 'winner')} {were} "
    text += f"at some probe more than {CROSSED} nats below the start"
    if found.winner_ever:
        text += f"; {found.winner_returned} came back and {found.winner_ended} ended there"
    return f"{text}. {_many(found.loser_ended, 'loser').capitalize()} ended above the start."


def _many(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
