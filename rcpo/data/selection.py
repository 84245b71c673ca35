"""Which tokenised examples are trained on and which are held out; both follow from contents and seed alone.

Axes: n rows of all sources together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcpo.errors import ConfigError


def split_prompts(prompts: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, ascending: all rows of a prompt go to the same side.

    The distinct `prompts` (n,) are put in the order of a hash of (seed, prompt), whatever their order in the
    file, and the first `fraction` of them (at least one, rounded to the nearest) are held out; 0: none.
    """
    rows = np.arange(len(prompts))
    if fraction == 0:
        return rows, rows[:0]
    distinct = np.unique(prompts)
    ordered = distinct[np.argsort(_mixed(distinct, seed), kind="stable")]
    held_out = ordered[: max(1, round(fraction * len(ordered)))]
    if len(held_out) == len(ordered):
        raise ConfigError(
            f"data.eval_fraction={fraction} of {len(ordered)} distinct prompt(s) leaves none to train on; "
            "lower it, give more data, or give held-out pairs: data.eval_path=FILE"
        )
    is_held_out = np.isin(prompts, held_out)
    return rows[~is_held_out], rows[is_held_out]


def by_margin(
    margins: np.ndarray, lowest: float | None, highest: float | None, *, ties: bool
) -> dict[str, np.ndarray]:
    """Which rows are left out, (n,) bool each, by the reason: a row counts for the first that applies.

    The margins (n,) are how far the chosen response was scored above the rejected one; without `ties` those
    of 0 go.
    """
    left_out: dict[str, np.ndarray] = {}
    seen = np.zeros(len(margins), dtype=bool)
    for reason, rows in (
        ("tied scores (data.ties=drop)", (margins == 0) & (not ties)),
        (f"a margin below data.min_margin={lowest}", margins < (-np.inf if lowest is None else lowest)),
        (f"a margin above data.max_margin={highest}", margins > (np.inf if highest is None else highest)),
    ):
        left_out[reason] = rows & ~seen
        seen |= rows
    return left_out


def mixture(rows: np.ndarray, sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """The rows of an epoch: those of source i, `sizes[i]` of all, `weights[i]` times each.

    The fraction of a weight that is not a whole number is a draw without repetition, by the seed. Rows are
    ascending source by source; a row that is taken twice is there twice.
    """
    borders = np.cumsum([0, *sizes])
    taken = [rows[:0]]
    for number, weight in enumerate(weights):
        own = rows[(rows >= borders[number]) & (rows < borders[number + 1])]
        whole = int(weight)
        taken += [own] * whole
        extra = round((weight - whole) * len(own))
        if extra:
            generator = np.random.default_rng([seed, number])
            taken.append(np.sort(generator.permutation(own)[:extra]))
    return np.concatenate(taken)


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits of each value (n,) uint64 and the seed: splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
