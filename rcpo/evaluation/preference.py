"""Held-out preference metrics: pure functions from per-pair arrays to the flat names of evaluation.json.

Axes: B pairs, M metrics, R resamples. Everything is NumPy in float64, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rcpo.data.records import VALUES
from rcpo.runs.jsonl import clean_row, write_lines

Floats = NDArray[np.float64]

RESAMPLES = 2000  # the ends of a 95 % interval then move by 0.06 standard errors from seed to seed
CONFIDENCE = 0.95
COMPARED = "eval/logratios/examples"
NOTHING_HELD_OUT = "no held-out example to evaluate: see data.eval_path and data.eval_fraction"
_DRAWS_AT_ONCE = 2**22  # 32 MiB of indices, whatever the size of the held-out set


@dataclass(frozen=True, kw_only=True)
class PreferenceScores:
    """What the policy says about B held-out pairs; arrays of shape (B,), ids and dataset positions alike.

    `example_ids` are hashes of the pairs' tokens, `sources` say where they came from. `*_logps` are z_w and
    z_l in the objective's reduction, `*_logratios` u_w and u_l (None where there is no reference to compare
    with), `*_rewards` βu (βz without a reference), `*_lengths` response tokens, `*_token_logps` and
    `*_token_logratios` means a token whatever the reduction, `*_incentives` d_w and d_l.
    The rejected side is None for data without one; `losses` and `*_incentives` for an objective whose loss is
    not a mean over pairs. In unpaired data an example lacks one side: its length is 0, its other values say
    nothing. `prompts` are equal where the examples' prompts are; None: all prompts differ. `tracked` are the
    examples that were compared with the reference (None: all); the others' log-ratios mean nothing. The last
    four are the rows' own numbers, NaN where a row gives none, None where no row does.
    """

    example_ids: Sequence[str]
    sources: Sequence[str]
    indices: NDArray[np.int64]
    chosen_logps: Floats
    chosen_rewards: Floats
    chosen_lengths: NDArray[np.int64]
    rejected_logps: Floats | None = None
    rejected_rewards: Floats | None = None
    rejected_lengths: NDArray[np.int64] | None = None
    chosen_logratios: Floats | None = None
    rejected_logratios: Floats | None = None
    chosen_token_logps: Floats | None = None
    chosen_token_logratios: Floats | None = None
    rejected_token_logratios: Floats | None = None
    losses: Floats | None = None
    chosen_incentives: Floats | None = None
    rejected_incentives: Floats | None = None
    prompts: NDArray[np.uint64] | None = None
    tracked: NDArray[np.bool_] | None = None
    score_chosen: Floats | None = None
    score_rejected: Floats | None = None
    margin: Floats | None = None
    weight: Floats | None = None

    def __post_init__(self) -> None:
        for name, values in self._columns().items():
            if values is not None and np.shape(values) != (len(self.example_ids),):
                raise ValueError(
                    f"PreferenceScores.{name} has shape {np.shape(values)}; "
                    f"one value for each of {len(self.example_ids)} examples is expected"
                )

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def has_chosen(self) -> NDArray[np.bool_]:
        """Which examples have a chosen response, (B,)."""
        return self.chosen_lengths > 0

    @property
    def has_rejected(self) -> NDArray[np.bool_]:
        """Which examples have a rejected response, (B,)."""
        return np.zeros(len(self), bool) if self.rejected_lengths is None else self.rejected_lengths > 0

    @property
    def paired(self) -> bool:
        """Whether all examples have all sides that there are."""
        return bool(self.has_chosen.all() and (self.rejected_lengths is None or self.has_rejected.all()))

    def _columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def gather(parts: Sequence[PreferenceScores]) -> PreferenceScores:
        """One record of all ranks' parts, in dataset order.

        Fillers (index −1) are dropped and an example scored twice is kept once, so the result is the same for
        any number of ranks. Raises ValueError where the parts have different columns, or there are none.
        """
        if not parts:
            raise ValueError(NOTHING_HELD_OUT)
        columns = [part._columns() for part in parts]
        order, kept = np.unique(np.concatenate([part.indices for part in parts]), return_index=True)
        kept = kept[order >= 0]
        merged: dict[str, Any] = {}
        for name in columns[0]:
            values = [column[name] for column in columns]
            missing = [value is None for value in values]
            if any(missing) and not all(missing):
                raise ValueError(f"PreferenceScores.{name} is there on some ranks and missing on others")
            merged[name] = (
                None if missing[0] else np.concatenate([np.asarray(value) for value in values])[kept]
            )
        for name in ("example_ids", "sources"):
            merged[name] = [str(text) for text in merged[name]]
        return PreferenceScores(**merged)


def preference_columns(scores: PreferenceScores) -> dict[str, Floats]:
    """Per-pair values, each (B,), whose means are the metrics; names without `eval/`, as in metrics.jsonl.

    An accuracy counts the pairs whose chosen side is strictly ahead, as TRL does: a tie is a miss, so the
    rewards' accuracy of an untouched policy is 0. `winner_fell` is the share of pairs with u_w < 0. What
    compares both sides is left out of unpaired data.
    """
    pairs = scores.paired
    values: dict[str, Floats | None] = {
        "loss": scores.losses,
        "rewards/chosen": scores.chosen_rewards,
        "rewards/rejected": scores.rejected_rewards,
        "rewards/margins": _difference(scores.chosen_rewards, scores.rejected_rewards) if pairs else None,
        "rewards/accuracies": _ahead(scores.chosen_rewards, scores.rejected_rewards) if pairs else None,
        "logps/chosen": scores.chosen_logps,
        "logps/rejected": scores.rejected_logps,
        "logps/accuracies": _ahead(scores.chosen_logps, scores.rejected_logps) if pairs else None,
        "logratios/chosen": scores.chosen_logratios,
        "logratios/rejected": scores.rejected_logratios,
        "token_logps/chosen": scores.chosen_token_logps,
        "token_logratios/chosen": scores.chosen_token_logratios,
        "token_logratios/rejected": scores.rejected_token_logratios,
        "winner_fell": _negative(scores.chosen_logratios),
    }
    return {name: np.asarray(value, np.float64) for name, value in values.items() if value is not None}


def _difference(chosen: Floats, rejected: Floats | None) -> Floats | None:
    return None if rejected is None else chosen - rejected


def _ahead(chosen: Floats, rejected: Floats | None) -> Floats | None:
    """1 where the chosen side is ahead, 0 where not, NaN where either is NaN."""
    if rejected is None:
        return None
    return np.where(np.isnan(chosen - rejected), math.nan, chosen > rejected)


def _negative(values: Floats | None) -> Floats | None:
    return None if values is None else np.where(np.isnan(values), math.nan, values < 0)


def preference_metrics(scores: PreferenceScores, seed: int, resamples: int = RESAMPLES) -> dict[str, float]:
    """The flat record of held-out means with their intervals, and `eval/examples`, the number of pairs; of
    the log-ratios by token the medians, too, which a few pairs that moved far do not move.

    In unpaired data the mean of a side is over the examples that have it; where the reference knows some
    examples alone, log-ratios are theirs, `eval/logratios/examples` of them.
    """
    columns = preference_columns(scores)
    record: dict[str, float] = {"eval/examples": len(scores)}
    if scores.tracked is not None and scores.chosen_logratios is not None:
        record[COMPARED] = int(scores.tracked.sum())
    alike: dict[bytes, list[str]] = {}  # columns about the same examples share their resamples
    for name in columns:
        alike.setdefault(rows_with(scores, name).tobytes(), []).append(name)
    for names in alike.values():
        rows = rows_with(scores, names[0])
        if rows.any():
            prompts = None if scores.prompts is None else scores.prompts[rows]
            values = {name: columns[name][rows] for name in names}
            record |= means_with_intervals(values, seed, resamples, prompts)
            record |= {
                f"eval/{name}/median": float(np.median(values[name]))
                for name in names
                if name.startswith("token_logratios/")
            }
    return record


def rows_with(scores: PreferenceScores, name: str) -> NDArray[np.bool_]:
    """The examples that a column is about, (B,): they have its side, and a log-ratio if it is of one."""
    rows = np.ones(len(scores), bool)
    if not scores.paired:
        if name.endswith(("chosen", "winner_fell")):
            rows = scores.has_chosen
        elif name.endswith("rejected"):
            rows = scores.has_rejected
    compares = name == "winner_fell" or "logratios/" in name
    return rows & scores.tracked if compares and scores.tracked is not None else rows


def means_with_intervals(
    columns: Mapping[str, NDArray[Any]],
    seed: int,
    resamples: int = RESAMPLES,
    prompts: NDArray[Any] | None = None,
) -> dict[str, float]:
    """`eval/NAME`, `eval/NAME/low` and `eval/NAME/high` for the mean of every column (B,).

    The interval is the percentile bootstrap's, 95 %, over prompts: the examples of one prompt, those with
    equal `prompts` (B,), are drawn together, because they are not independent (None: all differ). All columns
    share the resamples, so differences between metrics are not blurred; a seed gives the same numbers on any
    machine. A column with a NaN has a NaN mean and interval, which JSON gets as null. Raises ValueError where
    there is no example.
    """
    names = list(columns)
    values = np.stack([np.asarray(columns[name], np.float64) for name in names], axis=1)  # (B, M)
    if not len(values):
        raise ValueError(NOTHING_HELD_OUT)
    low, high = bootstrap_interval(values, seed, resamples, prompts)
    record: dict[str, float] = {}
    for name, mean, lower, upper in zip(names, values.mean(axis=0), low, high, strict=True):
        record |= {
            f"eval/{name}": float(mean),
            f"eval/{name}/low": float(lower),
            f"eval/{name}/high": float(upper),
        }
    return record


def bootstrap_interval(
    values: Floats, seed: int, resamples: int = RESAMPLES, prompts: NDArray[Any] | None = None
) -> tuple[Floats, Floats]:
    """Percentile-bootstrap ends (M,) and (M,) for the means over the rows of `values` (B, M).

    Rows with equal `prompts` (B,) are drawn together: the cluster bootstrap.
    """
    groups = prompt_groups(len(values), prompts)
    count = int(groups.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, values)
    sizes = np.bincount(groups)  # (G,)
    means = [
        drawn @ sums / (drawn @ sizes)[:, None] for drawn in resampled_counts(count, seed, resamples)
    ]  # (…, M) each
    return interval_of(np.concatenate(means))


def prompt_groups(size: int, prompts: NDArray[Any] | None) -> NDArray[np.int64]:
    """The number of each row's prompt, (size,), counted in the order in which prompts first appear."""
    if prompts is None:
        return np.arange(size)
    _, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def interval_of(resampled: Floats) -> tuple[Floats, Floats]:
    """Ends (M,) and (M,) of the 95 % percentile interval of statistics (R, M) of resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return cast(Floats, low), cast(Floats, high)


def resampled_counts(size: int, seed: int, resamples: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """How often each of `size` rows is in each resample, (…, size), some resamples at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        draws = generator.integers(0, size, (count, size))
        draws += size * np.arange(count)[:, None]
        yield np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)


def write_examples(
    path: Path, scores: PreferenceScores, answers: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """examples.jsonl: one object a pair, keyed by its stable `id`, in dataset order.

    The names are those of the means, with `lengths/*`, each pair's incentives under `dynamics/*`, and the
    numbers that its row gives (`score_chosen`, …);
    `answers` adds an example's own fields by id (such as a generated `answer` and whether it is `correct`).
    """
    columns: dict[str, NDArray[Any] | None] = {
        **preference_columns(scores),
        "dynamics/incentive_chosen": scores.chosen_incentives,
        "dynamics/incentive_rejected": scores.rejected_incentives,
        "lengths/chosen": scores.chosen_lengths,
        "lengths/rejected": scores.rejected_lengths,
    }
    present = {
        name: (values, rows_with(scores, name)) for name, values in columns.items() if values is not None
    }
    given = {name: getattr(scores, name) for name in VALUES}
    present |= {name: (values, ~np.isnan(values)) for name, values in given.items() if values is not None}
    extra = answers or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(
        path,
        (
            {"id": identity, "source": scores.sources[row], "index": int(scores.indices[row])}
            | clean_row({name: values[row] for name, (values, rows) in present.items() if rows[row]})
            | dict(extra.get(identity, {}))
            for row, identity in enumerate(scores.example_ids)
        ),
    )
