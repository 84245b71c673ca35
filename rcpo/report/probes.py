"""The probe set followed through training: fans of its pairs, who crossed where, and where the mass went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rcpo.report.runs import Column, Run
from rcpo.runs.folder import PROBES_FILE

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CROSSED = 0.01  # nats: one percent of probability, above what rounding does to an untouched pair
MASSES = {
    "chosen_mass": "winner",
    "rejected_mass": "loser",
    "greedy_mass": "policy's own greedy answer",
    "ref_greedy_mass": "starting policy's greedy answer",
}

ANSWERS = {
    "greedy_length": "greedy answers, tokens",
    "greedy_repetition": "greedy answers, repeated 4-grams",
    "sample_length": "drawn answers, tokens",
    "sample_repetition": "drawn answers, repeated 4-grams",
}

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Probes:
    """The probe pairs of one run: `steps` (S,) ascending, each column (S, E) over E pairs, NaN where null."""

    steps: Column
    columns: dict[str, Table]

    def has(self, key: str) -> bool:
        """Whether any pair has a number there at any step."""
        return key in self.columns and not np.isnan(self.columns[key]).all()

    @cached_property
    def changes(self) -> dict[str, Table]:
        """How far each side is from the reference, or from the first probe without one, in nats (S, E).

        Beside `winner` and `loser`, `disordered` is 1 where the loser is likelier than the winner, else 0.
        """
        winner, loser = self.columns["chosen_logps"], self.columns["rejected_logps"]
        below = np.where(np.isnan(winner - loser), np.nan, (winner < loser).astype(np.float64))
        return {"winner": self._change("chosen"), "loser": self._change("rejected"), "disordered": below}

    def _change(self, side: str) -> Table:
        if self.has(f"{side}_logratios"):
            return self.columns[f"{side}_logratios"]
        values = self.columns[f"{side}_logps"]
        return values - values[0]

    def knows(self, side: str) -> bool:
        """Whether any pair has that side."""
        return self.has("chosen_logps" if side == "winner" else "rejected_logps")


@dataclass(frozen=True)
class Crossings:
    """Of `pairs` probe pairs: whose winner was below its start, is at the end, came back; losers above."""

    pairs: int
    winner_ever: int
    winner_ended: int
    winner_returned: int
    loser_ended: int


def read_probes(folder: Path) -> Probes | None:
    """A run's probes; None where it kept none, or the file is torn."""
    path = folder / PROBES_FILE
    if not path.is_file():
        return None
    import pyarrow as pa  # only where there are probes: it takes a third of a second
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        table.validate(full=True)  # damage that is not looked for would end the process
    except (OSError, pa.ArrowException):
        return None
    names = set(table.column_names)
    if not table.num_rows or not {"step", "example_id", "chosen_logps", "rejected_logps"} <= names:
        return None
    steps, step_of = np.unique(table["step"].to_numpy(), return_inverse=True)
    examples, example_of = np.unique(table["example_id"].to_numpy(), return_inverse=True)
    columns = {}
    for name in names:
        kind = table.schema.field(name).type
        if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and name != "step"):
            grid = np.full((len(steps), len(examples)), np.nan)
            grid[step_of, example_of] = table[name].to_numpy().astype(np.float64)
            columns[name] = grid
    return Probes(steps.astype(np.float64), columns)


def probes_of(runs: Sequence[Run]) -> list[Probes]:
    """The probes of the runs that have them."""
    return [probes for run in runs if (probes := read_probes(run.folder)) is not None]


def pooled(probes: Sequence[Probes], side: str) -> tuple[Column, Table]:
    """Steps (S,) that all runs have and their pairs' changes beside each other, (S, all pairs)."""
    common = sorted(set.intersection(*({float(step) for step in each.steps} for each in probes)))
    tables = [each.changes[side][np.isin(each.steps, common)] for each in probes]
    return np.array(common), np.concatenate(tables, axis=1)


def fan(values: Table) -> Table:
    """The `QUANTILES` over pairs at each step, (5, S); NaN where no pair is known."""
    known = ~np.isnan(values).all(axis=1)
    quantiles = np.full((len(QUANTILES), len(values)), np.nan)
    quantiles[:, known] = np.nanquantile(values[known], QUANTILES, axis=1)
    return quantiles


def crossed_share(values: Table, side: str) -> Column:
    """Of the pairs that are known at each step, the share that is `CROSSED` beyond its start: (S,)."""
    beyond = values < -CROSSED if side == "winner" else values > CROSSED
    return mean_over_pairs(np.where(np.isnan(values), np.nan, beyond.astype(np.float64)))


def mean_over_pairs(values: Table) -> Column:
    """Means over the pairs that are known at each step, (S,); NaN where none is."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def first_and_last(probes: Sequence[Probes], key: str) -> tuple[float, float] | None:
    """Means over pairs and runs at the first and the last probe that has the column; None without any."""
    ends = []
    for each in probes:
        means = mean_over_pairs(each.columns[key]) if key in each.columns else np.zeros(0)
        known = means[~np.isnan(means)]
        ends += [(known[0], known[-1])] if len(known) else []
    return (float(np.mean([a for a, _ in ends])), float(np.mean([b for _, b in ends]))) if ends else None


def crossings(probes: Sequence[Probes]) -> Crossings:
    """Count over the pairs of all runs; a pair has crossed when it is `CROSSED` beyond its start."""
    counts = np.zeros(5, dtype=np.int64)
    for each in probes:
        low, high = each.changes["winner"] < -CROSSED, each.changes["loser"] > CROSSED
        ever, ended = low.any(axis=0), low[-1]
        counts += [low.shape[1], ever.sum(), ended.sum(), (ever & ~ended).sum(), high[-1].sum()]
    return Crossings(*(int(count) for count in counts))
