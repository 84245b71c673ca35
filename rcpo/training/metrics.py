"""Sums and counts of an optimizer step, over micro-batches and ranks; every logged mean is their quotient."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from rcpo.method.objectives import Objective
from rcpo.method.types import PairLogps, to_device

CPU = torch.device("cpu")

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


def pair_values(objective: Objective, pairs: PairLogps) -> dict[str, tuple[Tensor, Tensor]]:
    """The per-pair values behind the logged means, as far as objective and reference define them.

    Each (B,) in fp64, and which pairs have what it is about, (B,) bool; 0 for the others, of unpaired data.
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
        by_side = {"chosen": pairs.has_chosen, "rejected": pairs.has_rejected}
        both = pairs.has_chosen & pairs.has_rejected
        found = {}
        for name, value in values.items():
            there = by_side.get(name.rpartition("/")[2], both)
            found[name] = torch.where(there, value.double(), 0.0), there
        return found


class StepSums:
    """Adds up a rank's micro-batches; `means` reduces once over all ranks.

    What comes from the device stays there until then, so that no micro-batch waits for the one before.
    """

    def __init__(self) -> None:
        self._counted = dict.fromkeys(("real_tokens", "slots", "pairs", *VOTES), 0.0)
        self._measured: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the reduction takes, whatever the batch."""
        return 8 * (len(self._counted) + len(MEASURED))

    def computed(self, tokens: int, slots: int) -> None:
        """What a forward pass computed: real `tokens`, and `slots`, padding and fillers included."""
        self._counted["real_tokens"] += tokens
        self._counted["slots"] += slots

    def add(self, losses: Tensor, values: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """`losses` (B,) of real pairs, already weighted and normalised by the global batch.

        Returns 1 where everything added was finite, else NaN: a number on the device.
        """
        totals = {name: value.sum() for name, (value, _) in values.items()}
        totals["loss"] = losses.detach().double().sum()
        finite = torch.stack(list(totals.values())).isfinite().all()
        totals["nonfinite"] = (~finite).double()
        totals |= {_count(name): there.double().sum() for name, (_, there) in values.items()}
        zero = torch.zeros_like(totals["loss"])
        measured = torch.stack([totals.get(name, zero) for name in MEASURED])
        self._measured = measured if self._measured is None else self._measured + measured
        self._counted["pairs"] += len(losses)
        return torch.where(finite, 1.0, math.nan)

    def vote(self, name: str) -> None:
        """One of `VOTES` from this rank: it rides on the step's reduction, so every rank learns of it."""
        assert name in VOTES, name
        self._counted[name] = 1.0

    def means(
        self,
        reduce: Callable[[Tensor], Tensor],
        largest: Callable[[Tensor], Tensor] = lambda x: x,
        device: torch.device = CPU,
    ) -> dict[str, float]:
        """The loss, the mean of each name that the objective defines, the padded share of what was computed;
        in total `pairs` and `real_tokens`, `nonfinite` micro-batches, and the ranks that gave each vote; the
        `largest` of all ranks' peaks of memory. The one wait for `device`.
        """
        counted = torch.tensor(list(self._counted.values()), dtype=torch.float64)
        measured = self._measured
        if measured is None:
            measured = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)
        total = reduce(torch.cat([to_device(counted, device), measured]))
        peak = largest(to_device(torch.tensor([peak_memory()], dtype=torch.float64), device))
        *found, memory = torch.cat([total, peak]).tolist()
        sums = dict(zip((*self._counted, *MEASURED), found, strict=True))
        means = {name: sums[name] / sums[_count(name)] for name in NAMES if sums[_count(name)]}
        totals = {name: sums[name] for name in ("loss", "pairs", "real_tokens", "nonfinite", *VOTES)}
        padded = 1 - sums["real_tokens"] / sums["slots"]
        return {**totals, "padded_share": padded, **means, "peak_memory_bytes": memory}


def _count(name: str) -> str:
    return f"{name} count"


MEASURED = ("loss", "nonfinite", *NAMES, *map(_count, NAMES))
"""What a step adds up on the device."""


def peak_memory() -> int:
    """Bytes at this process's peak: of the accelerator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
