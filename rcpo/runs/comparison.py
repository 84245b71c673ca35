"""Runs beside each other: what they differ in, means over seeds, paired differences. No torch.

A *condition* is what runs of different seeds share. A *contrast* is a condition without calibration beside
one with it that is equal in all else; its runs are paired by seed, so that a seed's own effect cancels out.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.config.changes import (
    EVALUATE_ONLY,
    flatten,
    shapes_evaluation,
    shapes_judgement,
    shapes_result,
)
from rcpo.config.paths import conf_dir
from rcpo.runs.folder import (
    CONFIG_FILE,
    EVALUATION_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    PROBES_FILE,
    read_evaluation,
    read_object,
    read_rows,
    read_settings,
)
from rcpo.runs.inputs import EVALUATION_SETTINGS, HELD_OUT, INPUTS, JUDGE, PAIRS, TASKS
from rcpo.runs.statistics import Difference, Spread, paired_difference, spread

SEED = "seed"
CALIBRATED = "rc.enabled"
RULE = "rc"  # off, or what the configuration group calls the rule
MEASURING = ("rc.geometry", "rc.sketch", "rc.sketch_seed")  # what rc=off reads of rc.*
RULE_KEYS = {"rc.alpha": "fixed", "rc.target": "loop", "rc.signal": "loop"}
CONTROL = "rc.control."  # the loop's too
REDUCTION = "objective.reduction"
CONTENTS = "contents"
TASK_KEYS = ("eval.tasks", "eval.limit", "eval.chat_template")
# made from metrics.jsonl; every other value but REPETITION is evaluation.json's
STEPS_IN_BAND = "steps_in_band"
BEFORE_CALIBRATION = "steps_in_band/before_calibration"
BAND_ENTERED = "band_entered"
REPETITION = "probes/repetition"  # made from probes.parquet


@dataclass(frozen=True)
class Metric:
    """A value that runs are compared by: its key, its name for readers, its unit ("nats", "share" or "")."""

    key: str
    title: str
    unit: str = ""

    def show(self, value: float | None, *, signed: bool = False) -> str:
        """The value with a minus that is one: shares in percent, the rest with three decimals."""
        if value is None or math.isnan(value):
            return "–"
        sign = "+" if signed or self.unit == "nats" else ""
        if self.unit == "share":
            return f"{100 * value:{sign}.{int(signed)}f} %".replace("-", "−")
        return f"{value:{sign}.3f}".replace("-", "−")

    def show_spread(self, spread: Spread | None) -> str:
        """`mean ± standard deviation`; the mean alone of a single run."""
        if spread is None:
            return "–"
        if spread.deviation is None:
            return self.show(spread.mean)
        deviation = f"{100 * spread.deviation:.0f}" if self.unit == "share" else f"{spread.deviation:.3f}"
        return f"{self.show(spread.mean)} ± {deviation}"

    def show_difference(self, difference: Difference | None) -> str:
        """`mean [low, high]`, the mean alone of a single pair; shares in percentage points."""
        if difference is None:
            return "–"
        mean = self.show(difference.mean, signed=True).replace("%", "points")
        if difference.low is None or difference.high is None:
            return mean
        low, high = (
            self.show(end, signed=True).removesuffix(" %") for end in (difference.low, difference.high)
        )
        return f"{mean} [{low}, {high}]"


METRICS = (
    Metric("eval/token_logratios/chosen", "winner's log-ratio", "nats"),
    Metric("eval/token_logratios/rejected", "loser's log-ratio", "nats"),
    Metric("eval/winner_fell", "pairs whose winner fell", "share"),
    Metric("eval/rewards/accuracies", "preference accuracy", "share"),
    Metric("eval/exact_match", "exact match", "share"),
    Metric(REPETITION, "repeated 4-grams", "share"),
    Metric(STEPS_IN_BAND, "steps in the band", "share"),
)


@dataclass(frozen=True)
class RunSummary:
    """A run as comparisons see it: `settings` by dotted key, `values` by metric key."""

    name: str
    settings: Mapping[str, Any]
    values: Mapping[str, float]

    @property
    def seed(self) -> Any:
        return self.settings.get(SEED)


@dataclass(frozen=True)
class Condition:
    """Runs that share everything but the seed."""

    label: str
    runs: tuple[RunSummary, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.runs[0].settings

    def values(self, key: str) -> list[float]:
        """The metric's value of each run that has it."""
        return [run.values[key] for run in self.runs if key in run.values]

    def show(self, metric: Metric) -> str:
        """Mean ± standard deviation over the runs, with their number where some lack the metric."""
        values = self.values(metric.key)
        return metric.show_spread(spread(values)) + _of_how_many(len(values), len(self.runs))

    def by_seed(self, key: str) -> dict[Any, float]:
        """The metric by seed, a mean where a seed ran more than once."""
        found: dict[Any, list[float]] = {}
        for run in self.runs:
            if key in run.values:
                found.setdefault(run.seed, []).append(run.values[key])
        return {seed: statistics.fmean(values) for seed, values in found.items()}


@dataclass(frozen=True)
class Contrast:
    """The same training without calibration and by one rule of it."""

    label: str
    base: Condition
    calibrated: Condition

    def difference(self, key: str) -> Difference | None:
        """Calibrated minus uncalibrated, paired by seed: the same data in the same order."""
        return paired_difference(self.base.by_seed(key), self.calibrated.by_seed(key))

    def show(self, metrics: Sequence[Metric]) -> tuple[int, list[str]]:
        """How many pairs of runs there are; each metric's difference, with its pairs where some lack it."""
        found = [self.difference(metric.key) for metric in metrics]
        counts = [0 if difference is None else difference.count for difference in found]
        pairs = max(counts, default=0)
        return pairs, [
            metric.show_difference(difference) + _of_how_many(count, pairs)
            for metric, difference, count in zip(metrics, found, counts)
        ]

    def means(self, key: str) -> tuple[float, float] | None:
        """Both sides' means over the seeds that both have, so that they differ by `difference`'s mean."""
        base, calibrated = self.base.by_seed(key), self.calibrated.by_seed(key)
        common = [seed for seed in base if seed in calibrated]
        if not common:
            return None
        return (
            statistics.fmean(base[seed] for seed in common),
            statistics.fmean(calibrated[seed] for seed in common),
        )


@dataclass(frozen=True)
class Overall:
    """A metric over contrasts: medians of the two sides' means and of the differences, and their signs.

    All of them are over the seeds that both sides of a contrast have.

    Of `count` contrasts `higher` are above zero and `lower` below, `clearly_*` with their whole interval.
    """

    base: float
    calibrated: float
    difference: float
    count: int
    higher: int
    clearly_higher: int
    lower: int
    clearly_lower: int


def _of_how_many(count: int, every: int) -> str:
    """How many of the runs, or pairs, a mean covers; nothing where it covers all or none."""
    return f" ({count} of {every})" if 0 < count < every else ""


def summarise_run(folder: Path) -> RunSummary:
    """Read config.yaml, evaluation.json, metrics.jsonl and probes.parquet of a run.

    A missing or torn one adds no values. Raises ConfigError where the folder has no readable config.yaml.
    """
    values = read_evaluation(folder / EVALUATION_FILE)
    return RunSummary(
        folder.name,
        settings_of_result(folder, read_settings(folder / CONFIG_FILE)),
        run_values(folder, values, read_rows(folder / METRICS_FILE)),
    )


def settings_of_result(folder: Path, configured: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's values depend on: its config.yaml (`configured`), and what that does not tell.

    That is the contents of data and models, shortened, and the settings of later evaluations. Of the keys
    that only those read, a run that had none has none.
    """
    finished, made = read_object(folder / FINISHED_FILE), read_object(folder / EVALUATION_SETTINGS)
    read = {**_node(finished, INPUTS)}
    found = {key: value for key, value in configured.items() if not _is_of_evaluations(key)}
    for part, wanted in ((PAIRS, _shapes_pairs), (TASKS, TASK_KEYS.__contains__), (JUDGE, shapes_judgement)):
        record = _node(made, part)
        found |= {key: value for key, value in flatten(_node(record, "config")).items() if wanted(key)}
        if part == PAIRS:
            read |= {what: hash for what, hash in _node(record, INPUTS).items() if what == HELD_OUT}
    return found | {f"{CONTENTS}.{what}": str(content)[:8] for what, content in read.items()}


def _is_of_evaluations(key: str) -> bool:
    """Whether `rcpo evaluate` alone reads a key."""
    return key in EVALUATE_ONLY or key.startswith("judge.")


def _node(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside a record; empty where there is none."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _shapes_pairs(key: str) -> bool:
    return shapes_evaluation(key) and key not in EVALUATE_ONLY


def run_values(
    folder: Path, evaluation: Mapping[str, float], rows: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """What a run is compared by: its evaluation, how it stood to the band, and how its answers repeat.

    Repetition is for answers that nothing can check.
    """
    values = {**evaluation, **band_record(rows)}
    if "eval/exact_match" not in values and (share := _last_repetition(folder / PROBES_FILE)) is not None:
        values[REPETITION] = share
    return values


def band_record(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How a run stood to the band; a value that nothing is known of is left out.

    The share of steps inside, with the ratio that calibration made of it and with the ratio before it, and
    the first step inside.
    """
    rows = list(rows)
    inside = [row.get("rc/in_band", row.get("dynamics/in_band")) for row in rows]
    found = {
        STEPS_IN_BAND: _share(inside),
        BEFORE_CALIBRATION: _share([row.get("dynamics/in_band") for row in rows]),
        BAND_ENTERED: next((float(row["step"]) for row, is_in in zip(rows, inside) if is_in), None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _share(inside: Iterable[bool | None]) -> float | None:
    """Share of the steps that have a band."""
    known = [bool(value) for value in inside if value is not None]
    return sum(known) / len(known) if known else None


def _last_repetition(path: Path) -> float | None:
    """Mean share of repeated 4-grams in the last greedy answers to the probe prompts."""
    if not path.is_file():
        return None
    import pyarrow as pa  # a third of a second, and for runs with probes alone
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path, columns=["step", "greedy_repetition"]).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    last = max((row["step"] for row in rows), default=0)
    shares = [row["greedy_repetition"] for row in rows if row["step"] == last]
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known else None


def as_equal(value: Any) -> str:
    """The same text for values that mean the same: an objective's β may be written as 1 or as 1.0."""
    return repr(float(value) if type(value) is int else value)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys, sorted, that take more than one value and touch the result; never the seed.

    Contents, and settings of later evaluations, are known of some runs alone, and one that is not known is
    not another.
    """

    def values(key: str) -> set[str]:
        optional = key.startswith(f"{CONTENTS}.") or _is_of_evaluations(key)
        return {as_equal(each.get(key)) for each in settings if key in each or not optional}

    keys = sorted({key for each in settings for key in each})
    return [key for key in keys if key != SEED and shapes_result(key) and len(values(key)) > 1]


def rule_of(settings: Mapping[str, Any]) -> str:
    """The word that `rc=` takes for how a run was calibrated."""
    if not settings.get(CALIBRATED):
        return "off"
    rule = str(settings.get("rc.rule") or "center")
    return "on" if rule == "center" else rule


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the rule as one key, `rc`, and of `rc.*` what this rule reads."""
    rule = rule_of(settings)
    kept = {key: value for key, value in settings.items() if _is_read(key, rule)}
    return kept | {RULE: rule}


def _is_read(key: str, rule: str) -> bool:
    if not key.startswith("rc."):
        return True
    if rule == "off":
        return key in MEASURING
    if key in (CALIBRATED, "rc.rule"):
        return False
    return rule == ("loop" if key.startswith(CONTROL) else RULE_KEYS.get(key, rule))


def conditions(runs: Sequence[RunSummary]) -> list[Condition]:
    """The runs by what they share without the seed, in the order in which each first came."""
    keys = differing([comparable(run.settings) for run in runs])
    grouped = _grouped(runs, lambda run: _identity(comparable(run.settings), keys))
    labels = labelled([group[0].settings for group in grouped])
    return [Condition(label, tuple(group)) for label, group in zip(labels, grouped)]


def contrasts(found: Sequence[Condition]) -> list[Contrast]:
    """Each calibrated condition beside the uncalibrated one that is equal but for `rc.*`, if there is one.

    Of several such, it is the one whose dynamics were measured alike, or else the first.
    """
    settings = [comparable(condition.settings) for condition in found]
    keys = [key for key in differing(settings) if not _is_of_rc(key)]
    bases = [condition for condition in found if rule_of(condition.settings) == "off"]
    matched, places = [], []
    for place, condition in enumerate(found):
        equal = [base for base in bases if _same(base, condition, keys)]
        if equal and rule_of(condition.settings) != "off":
            base = next((each for each in equal if _same(each, condition, MEASURING)), equal[0])
            matched.append((base, condition))
            places.append(place)
    own = [calibrated.settings for _, calibrated in matched]
    variants = [key for key in differing([comparable(each) for each in own]) if _is_of_rc(key)]
    always = {RULE} if any(rule_of(each) != "on" for each in own) else set()
    # told apart from conditions without a partner, too
    labels = labelled([each.settings for each in found], among=[*keys, *variants], always=always)
    return [Contrast(labels[place], *pair) for place, pair in zip(places, matched)]


def _is_of_rc(key: str) -> bool:
    return key == RULE or key.startswith("rc.")


def _same(one: Condition, other: Condition, keys: Sequence[str]) -> bool:
    return _identity(one.settings, keys) == _identity(other.settings, keys)


def labelled(
    settings: Sequence[Mapping[str, Any]],
    among: Sequence[str] | None = None,
    always: Collection[str] = (),
) -> list[str]:
    """A short name for each: its objective, and the keys that tell it from others of the same objective.

    `among` are the keys to tell apart by (None: all that differ), `always` those to name in any case, as is
    a reduction that is not the objective's usual one. A key that the own rule does not read is left out.
    """
    every = [comparable(each) for each in settings]
    labels = []
    for own in every:
        peers = [each for each in every if each.get("objective.name") == own.get("objective.name")]
        keys = [key for key in differing(peers) if among is None or key in among]
        unusual = {REDUCTION} if _is_unusual_reduction(own) else set()
        named = sorted({*keys, *always, *unusual})
        parts = [_said(key, own.get(key)) for key in named if _tells(key, own, peers)]
        labels.append(" ".join([str(own.get("objective.name", "run")), *parts]))
    return labels


def _is_unusual_reduction(settings: Mapping[str, Any]) -> bool:
    """Whether an objective takes log-probs otherwise than its option does: DPO on means, not on sums."""
    usual = _usual_reduction(str(settings.get("objective.name")))
    alike = {"average"} if usual in ("mean", "importance") else set()  # it keeps either
    return usual is not None and settings.get(REDUCTION, usual) not in {usual, *alike}


@functools.cache
def _usual_reduction(objective: str) -> str | None:
    """What the shipped option of that name takes; None where there is none, or it takes no own."""
    shipped = {file.stem: file for file in (conf_dir() / "objective").glob("*.yaml")}
    return read_settings(shipped[objective]).get("reduction") if objective in shipped else None


def _tells(key: str, own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key belongs into a name: of `rc.*` those that the rule reads and others set otherwise."""
    if not key.startswith("rc."):
        return True
    if key == "rc.alpha":
        return own[RULE] == "fixed"
    return (
        key in own and own[RULE] != "off" and len({as_equal(peer[key]) for peer in peers if key in peer}) > 1
    )


def _said(key: str, value: Any) -> str:
    shown = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.removeprefix('objective.')}={shown}"


def _identity(settings: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(as_equal(settings.get(key)) for key in keys)


def _grouped(runs: Sequence[RunSummary], key: Callable[[RunSummary], Any]) -> list[list[RunSummary]]:
    groups: dict[Any, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def overall(found: Sequence[Contrast], key: str) -> Overall | None:
    """What calibration did to a metric over all contrasts that have it; None where there is none."""
    differences = [difference for contrast in found if (difference := contrast.difference(key))]
    means = [both for contrast in found if (both := contrast.means(key))]
    if not differences:
        return None
    up = [difference for difference in differences if difference.mean > 0]
    down = [difference for difference in differences if difference.mean < 0]
    return Overall(
        statistics.median(base for base, _ in means),
        statistics.median(calibrated for _, calibrated in means),
        statistics.median(difference.mean for difference in differences),
        len(differences),
        len(up),
        sum(difference.clear for difference in up),
        len(down),
        sum(difference.clear for difference in down),
    )
