"""Sums and counts of an optimizer step, over micro-batches and ranks; every logged mean is their quotient."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from rcpo.method.objectives import Objective
from rcpo.method.types import PairLogps

NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
)

# what ranks tell each other at the end of a step: asked to stop, a checkpoint is due, one is on the disk
VOTES = ("stop", "save", "written")


def pair_values(objective: Objective, pairs: PairLogps) -> dict[str, Tensor]:
    """The per-pair values behind the logged means, as far as objective and reference define them.

    Each is of shape (B,), or shorter for unpaired data: of the pairs that have what it is about.
    """
    with torch.no_grad():
        chosen, rejected = objective.rewards(pairs)
        values = {"rewards/chosen": chosen, "logps/chosen": pairs.chosen}
        if rejected is not None:
            values |= {"rewards/rejected": rejected, "rewards/margins": chosen - rejected}
            values["rewards/accuracies"] = (chosen > rejected).double()
            values["logps/rejected"] = pairs.losers
        if pairs.ref_chosen is not None:
            values["logratios/chosen"] = pairs.chosen_logratios
        if pairs.ref_rejected is not None:
            values["logratios/rejected"] = pairs.rejected_logratios
        there = {"chosen": pairs.has_chosen, "rejected": pairs.has_rejected}
        both = pairs.has_chosen & pairs.has_rejected
        return {name: value[there.get(name.rpartition("/")[2], both)] for name, value in values.items()}


class StepSums:
    """Adds up a rank's micro-batches; `means` reduces once over all ranks."""

    def __init__(self) -> None:
        own = ("loss", "real_tokens", "slots", "pairs", "nonfinite")
        self._sums = dict.fromkeys((*own, *VOTES, *NAMES, *map(_count, NAMES)), 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes that the reduction takes, whatever the batch."""
        return 8 * len(self._sums)

    def computed(self, tokens: int, slots: int) -> None:
        """What a forward pass computed: real `tokens`, and `slots`, padding and fillers included."""
        self._sums["real_tokens"] += tokens
        self._sums["slots"] += slots

    def add(self, losses: Tensor, values: dict[str, Tensor]) -> bool:
        """`losses` (B,) of real pairs, already weighted and normalised by the global batch.

        Returns whether everything added was finite.
        """
        totals = [value.detach().double().sum() for value in (losses, *values.values())]
        loss, *others = torch.stack(totals).tolist()  # one wait for the device, not one for each
        finite = math.isfinite(loss) and all(map(math.isfinite, others))
        self._sums["loss"] += loss
        self._sums["pairs"] += len(losses)
        for (name, value), total in zip(values.items(), others, strict=True):
            self._sums[name] += total
            self._sums[_count(name)] += len(value)
        self._sums["nonfinite"] += not finite
        return finite

    def vote(self, name: str) -> None:
        """One of `VOTES` from this rank: it rides on the step's reduction, so every rank learns of it."""
        assert name in VOTES, name
        self._sums[name] = 1.0

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The loss, the mean of each name that the objective defines, the padded share of what was computed;
        in total `pairs` and `real_tokens`, `nonfinite` micro-batches, and the ranks that gave each vote.
        """
        total = reduce(torch.tensor(list(self._sums.values()), dtype=torch.float64))
        sums = dict(zip(self._sums, total.tolist(), strict=True))
        means = {name: sums[name] / sums[_count(name)] for name in NAMES if sums[_count(name)]}
        totals = {name: sums[name] for name in ("loss", "pairs", "real_tokens", "nonfinite", *VOTES)}
        return {**totals, "padded_share": 1 - sums["real_tokens"] / sums["slots"], **means}


def _count(name: str) -> str:
    return f"{name} count"


def peak_memory() -> int:
    """Bytes at this process's peak: of the accelerator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
