"""From a batch of tokens to a batch of pairs: what training, evaluation and the reference pass share.

Axes: B pairs of a micro-batch, N response tokens, k sketch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rcpo.method.geometry import Sketch, outer_scores, parameter_scores
from rcpo.method.logps import length_weights, pair_logps, sequence_logps, token_weights
from rcpo.method.objectives import Objective
from rcpo.method.pairwise import pair_geometry
from rcpo.method.types import PairLogps, TokenBatch
from rcpo.reference.rows import Reference

if TYPE_CHECKING:
    from rcpo.engine.zero import Engine


@dataclass
class PairOutput:
    """A micro-batch's real pairs, and what the head geometry needs of its tokens.

    `pairs` has the fillers left out; `logps` (N,), `ref_logps` (N,) of the reference, if there is one,
    `weights` (N,), `hidden` (N, D) and `scores` (N, k) keep them.
    """

    batch: TokenBatch
    pairs: PairLogps
    logps: Tensor
    weights: Tensor
    hidden: Tensor
    scores: Tensor
    ref_logps: Tensor | None = None

    @property
    def count(self) -> int:
        """Real pairs."""
        return len(self.pairs.chosen)

    def parts(self) -> tuple[Tensor, Tensor]:
        """The parts in the loss's mean of the chosen and of the rejected responses, (B,): 0 where none is."""
        pairs = self.pairs
        return pairs.pair_weights * pairs.has_chosen, pairs.pair_weights * pairs.has_rejected

    def token_means(self) -> tuple[Tensor, Tensor | None]:
        """Mean log-prob, and log-ratio, a token: (sides, B) each, B real pairs, whatever the reduction.

        A side that is not there has a mean of 0.
        """
        ratios = None if self.ref_logps is None else self._means(self.logps - self.ref_logps)
        return self._means(self.logps), ratios

    def _means(self, values: Tensor) -> Tensor:
        batch = self.batch
        each = 1.0 / batch.lengths.double()[batch.sequences]
        means = sequence_logps(values, each, batch.sequences, len(batch.lengths))
        return batch.of_real(means.view(len(batch.sides), -1))

    def head_scores(self) -> Tensor:
        """Σ over the pairs, by their weights, of ∇z by the head's weight: (2, k, D), chosen and rejected."""
        pairs = self.batch.num_pairs
        coefficients = self.weights * self.batch.weights.double()[self.batch.sequences % pairs]
        # tokens are ordered by sequence, so each side is one run of them
        chosen, rejected = self.batch.on_host.lengths[: 2 * pairs].view(2, -1).sum(1).tolist()
        sides = []
        for part in (slice(0, chosen), slice(chosen, chosen + rejected)):
            sides.append(outer_scores(self.hidden[part], self.scores[part], coefficients[part]))
        return torch.stack(sides)

    def pair_geometry(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖s_w‖, ‖s_l‖ and their cosine by the head's weight, of each real pair: three tensors (B,)."""
        lengths = self.batch.on_host.lengths[: 2 * self.batch.num_pairs]
        found = pair_geometry(self.hidden, self.scores, self.weights, lengths)
        norm_w, norm_l, cosine = map(self.batch.of_real, found)
        return norm_w, norm_l, cosine

    def parameter_scores(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Σ over the pairs, by their weights, of ∇z by all trainable parameters: (2, P)."""
        weights = self.pairs.pair_weights
        chosen, rejected = ((weights * side).sum() for side in (self.pairs.chosen, self.pairs.losers))
        return parameter_scores(chosen, rejected, parameters)


class PairForward:
    """Scores batches for one objective, with the reference's log-probs where there is one."""

    def __init__(self, engine: Engine, objective: Objective, reference: Reference | None) -> None:
        self.engine = engine
        self.objective = objective
        self.reference = reference

    def __call__(self, batch: TokenBatch, sketch: Sketch | None = None) -> PairOutput:
        """`batch` is on the engine's device."""
        ref_logps = None if self.reference is None else self.reference(batch)
        objective, wanted = self.objective, self.objective.needs_likelihoods
        logps, hidden, scores, squares = self.engine.forward(batch, sketch, squares=wanted)
        weights = token_weights(logps, batch.sequences, batch.lengths, objective.reduction)
        if objective.length_alpha != 1:
            weights *= length_weights(batch.sequences, batch.lengths, batch.num_pairs, objective.length_alpha)
        pairs = pair_logps(batch, logps, weights, ref_logps, squares if wanted else None)
        if (real := batch.real) is not None:
            pairs = pairs.select(real)
        return PairOutput(batch, pairs, logps, weights, hidden, scores, ref_logps)
