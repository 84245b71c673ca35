"""Where a plan does not fit: the nearest configuration that does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

from rcpo.config.schema import RunConfig
from rcpo.config.validation import validate
from rcpo.errors import ConfigError
from rcpo.planner.plan import Plan, Planner

Change = tuple[str, object]  # a key and its new value


@dataclass(frozen=True)
class Advice:
    """A plan that fits, and what it changes."""

    plan: Plan
    changes: tuple[Change, ...]

    @property
    def overrides(self) -> str:
        """The changes as the command line takes them."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes)


def nearest(planner: Planner, plan: Plan) -> Advice | None:
    """The plan that fits with the fewest keys changed, each as mildly as it goes; None where none fits.

    Of several the fastest.
    """
    ways = list(_ways(plan.config))
    others = tuple(way[-1] for way in ways if way[0][0] != "engine")
    strongest = [others, *((*others, change) for way in ways for change in way if change[0] == "engine")]
    if _first_fitting(planner, plan, strongest) is None:
        return None
    for count in range(1, len(ways) + 1):
        mildest = (_first_fitting(planner, plan, product(*chosen)) for chosen in combinations(ways, count))
        found = [advice for advice in mildest if advice is not None]
        if found:
            return min(found, key=_seconds)
    return None


def _first_fitting(planner: Planner, plan: Plan, candidates: Iterable[tuple[Change, ...]]) -> Advice | None:
    """The first plan that fits, of those with one of the changes each."""
    advised = (_changed(planner, plan, changes) for changes in candidates)
    return next((advice for advice in advised if advice is not None and advice.plan.fits), None)


def _changed(planner: Planner, plan: Plan, changes: tuple[Change, ...]) -> Advice | None:
    """The plan with changes; None where no run could have them."""
    config = copy.deepcopy(plan.config)
    for key, value in changes:
        _set(config, key, value)
    try:
        validate(config)
        return Advice(planner.plan(config, plan.ranks), changes)
    except ConfigError:
        return None


def _seconds(advice: Advice) -> float:
    times = advice.plan.times
    return 0.0 if times is None else times.step


def _ways(config: RunConfig) -> Iterator[list[Change]]:
    """What may change, each from the mildest to the strongest."""
    if not config.train.gradient_checkpointing:
        yield [("train.gradient_checkpointing", True)]
    sizes = {
        "train.micro_batch_size": config.train.micro_batch_size or 1,
        "eval.batch_size": config.eval.batch_size,
    }
    for key, size in sizes.items():
        if size > 1:
            yield [(key, size >> halvings) for halvings in range(1, size.bit_length())]
    engines = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    engine = config.engine
    place = engine.stage if not engine.offload_optimizer else (5 if engine.offload_parameters else 4)
    if place < len(engines) - 1:
        yield [("engine", name) for name in engines[place + 1 :]]


def _set(config: RunConfig, key: str, value: object) -> None:
    if key == "engine":
        name = str(value)
        config.engine.stage = int(name[4])
        config.engine.offload_optimizer = name.endswith("_offload")
        config.engine.offload_parameters = name == "zero3_offload"
        return
    node, _, leaf = key.partition(".")
    setattr(getattr(config, node), leaf, value)
