"""The disentanglement band before the first step: that of a batch, and the one across samples.

The starting policy is its own reference here, so that r is the one that training begins with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rcpo.config.schema import RunConfig
from rcpo.data.collate import collate_indices
from rcpo.data.diagnosis import BATCH, sampled
from rcpo.data.store import PairDataset
from rcpo.method.band import Dynamics
from rcpo.method.calibration import DynamicsMeter
from rcpo.method.geometry import Sketch
from rcpo.method.incentives import incentives
from rcpo.method.logps import length_weights, pair_logps, token_weights
from rcpo.method.objectives import Objective
from rcpo.method.samples import FEWEST, CrossSamples
from rcpo.models.policy import Policy, policy_inputs
from rcpo.training.forward import PairOutput

Seen = Callable[[Sequence[int], PairOutput], None]  # told of each forward pass: the pairs' places, its output


def band_lines(
    policy: Policy,
    objective: Objective,
    dataset: PairDataset,
    config: RunConfig,
    pad_id: int,
    seen: Seen | None = None,
) -> list[str]:
    """Lines on r and both bands, over batches of `train.batch_size` or as many pairs as there are."""
    places = np.random.default_rng(config.seed).permutation(sampled(dataset))
    size = min(config.train.batch_size, len(places) // (FEWEST + 1))
    if not size:
        return [f"the band at the start needs {FEWEST + 1} pairs; {len(places)} are there"]
    batches = [places[first : first + size] for first in range(0, len(places) - size + 1, size)]
    sketch = Sketch(policy.vocabulary, config.rc.sketch, config.rc.sketch_seed)
    return _in_words(list(start_dynamics(policy, objective, dataset, batches, sketch, pad_id, seen)), size)


def start_dynamics(
    policy: Policy,
    objective: Objective,
    dataset: PairDataset,
    batches: Sequence[np.ndarray],
    sketch: Sketch,
    pad_id: int,
    seen: Seen | None = None,
) -> Iterator[Dynamics]:
    """The dynamics of each batch in turn, with what is known across samples by then."""
    meter = DynamicsMeter(CrossSamples())
    for batch in batches:
        for first in range(0, len(batch), BATCH):
            part = batch[first : first + BATCH].tolist()
            output = _output(policy, objective, dataset, part, sketch, pad_id)
            if seen is not None:
                seen(part, output)
            meter.observe(incentives(objective, output.pairs), output.head_scores(), output.parts())
        yield meter.collect()


def _output(
    policy: Policy, objective: Objective, dataset: PairDataset, places: list[int], sketch: Sketch, pad_id: int
) -> PairOutput:
    batch = collate_indices(dataset, places, pad_id, sides=objective.sides)
    wanted = objective.needs_likelihoods
    with torch.no_grad():
        logps, hidden, scores, squares = policy(**policy_inputs(batch), sketch=sketch, squares=wanted)
    weights = token_weights(logps, batch.sequences, batch.lengths, objective.reduction)
    if objective.length_alpha != 1:
        weights *= length_weights(batch.sequences, batch.lengths, batch.num_pairs, objective.length_alpha)
    pairs = pair_logps(batch, logps, weights, logps, squares if wanted else None)
    return PairOutput(batch, pairs, logps, weights, hidden, scores)


def _in_words(found: Sequence[Dynamics], size: int) -> list[str]:
    known = [(each.band, each.incentive_ratio) for each in found]
    usable = [(band, ratio) for band, ratio in known if band is not None and ratio is not None]
    if not usable:
        return ["the band at the start is not defined: a side has no positive incentive"]
    ratio = float(np.median([ratio for _, ratio in usable]))
    lower = float(np.median([band.lower for band, _ in usable]))
    upper = float(np.median([math.inf if band.upper is None else band.upper for band, _ in usable]))
    inside = np.mean([ratio in band for band, ratio in usable])
    lines = [
        f"band of a batch of {size} at the start: {lower:.3g} ≤ r ≤ {upper:.3g} (medians); r = {ratio:.3g}, "
        f"inside in {inside:.0%} of {len(usable)} batches"
    ]
    samples, band = found[-1].samples, found[-1].sample_band
    if samples is None or band is None:
        values = "" if samples is None else f": ‖S_w‖² = {samples.winner:.3g} ± {samples.winner_error:.2g}, "
        values += "" if samples is None else f"‖S_l‖² = {samples.loser:.3g} ± {samples.loser_error:.2g}"
        return [*lines, f"band across samples: not clear of its noise over {len(found)} batches{values}"]
    highest = math.inf if band.upper is None else band.upper
    side = "inside" if ratio in band else "below, so the winner of other text falls"
    side = "above, so the loser of other text rises" if ratio > highest else side
    lines.append(
        f"band across samples at the start: {band.lower:.4g} ≤ r ≤ {highest:.4g}; r = {ratio:.4g} is {side}"
    )
    return lines
