"""Records that travel between the modules.

Axes: B pairs, S sequences, N response tokens, R rows, L row length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs, each of shape (B,), in nats.

    `chosen` and `rejected` are z_w and z_l: the objective's reduction (sum, mean or importance) of the
    response tokens' log-probs under the policy; `ref_*` the same under the reference (r_w, r_l). `rejected`
    is None for supervised objectives, the references for those that need none. `*_lengths` count response
    tokens, 0 where unpaired data has none on that side. `chosen_means` is the chosen responses' mean log-prob
    a token, needed by `nll_coef` on summed log-probs. `kl_chosen` and `ref_kl_chosen` score chosen responses
    under prompts of other pairs (kto's K). `weights` are the pairs' parts in the batch mean (None: all
    alike), `margins` how far somebody scored the chosen responses above the rejected ones. `*_likelihoods`
    are geometric means over a response's tokens of p ÷ Σ_v p(v)² (wpo). `gold_means` is the mean log-prob a
    token of third answers, better than both (tpo).

    >>> chosen, rejected, reference = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.5])
    >>> logps = PairLogps(chosen, rejected, ref_chosen=reference, ref_rejected=reference)
    >>> logps.chosen_logratios, logps.rejected_logratios
    (tensor([0.5000]), tensor([-0.5000]))
    """

    chosen: Tensor
    rejected: Tensor | None = None
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    chosen_means: Tensor | None = None
    kl_chosen: Tensor | None = None
    ref_kl_chosen: Tensor | None = None
    weights: Tensor | None = None
    margins: Tensor | None = None
    chosen_likelihoods: Tensor | None = None
    rejected_likelihoods: Tensor | None = None
    gold_means: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape != self.chosen.shape:
                raise ValueError(
                    f"PairLogps.{field.name} has shape {tuple(value.shape)}; "
                    f"chosen has {tuple(self.chosen.shape)}: one value a pair is expected"
                )
        if self.chosen.dim() != 1:
            raise ValueError(f"PairLogps.chosen has shape {tuple(self.chosen.shape)}; (B,) is expected")

    @property
    def chosen_logratios(self) -> Tensor:
        """u_w = z_w − r_w, shape (B,)."""
        return self.chosen - _require(self.ref_chosen, "ref_chosen")

    @property
    def rejected_logratios(self) -> Tensor:
        """u_l = z_l − r_l, shape (B,)."""
        return self.losers - _require(self.ref_rejected, "ref_rejected")

    @property
    def losers(self) -> Tensor:
        """z_l, shape (B,); an error where the objective was given no rejected side."""
        return _require(self.rejected, "rejected")

    @property
    def score_margins(self) -> Tensor:
        """How far the chosen responses were scored above the rejected ones, shape (B,)."""
        return _require(self.margins, "margins")

    @property
    def gold(self) -> Tensor:
        """Mean log-prob a token of the gold answers, shape (B,)."""
        return _require(self.gold_means, "gold_means")

    @property
    def likelihood(self) -> Tensor:
        """How alike both responses are to what the policy would say, shape (B,): the product of the two."""
        chosen = _require(self.chosen_likelihoods, "chosen_likelihoods")
        return chosen * _require(self.rejected_likelihoods, "rejected_likelihoods")

    @property
    def pair_weights(self) -> Tensor:
        """The pairs' parts in the batch mean, shape (B,): 1 where nothing else is said."""
        return torch.ones_like(self.chosen) if self.weights is None else self.weights

    @property
    def has_chosen(self) -> Tensor:
        """Which pairs have a chosen response, (B,) bool: all of them, but for unpaired data."""
        return _there(self.chosen_lengths, self.chosen)

    @property
    def has_rejected(self) -> Tensor:
        """Which pairs have a rejected response, (B,) bool: all of them, but for unpaired data."""
        return _there(self.rejected_lengths, self.chosen)

    def replace(self, **changes: Any) -> PairLogps:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def select(self, keep: Tensor) -> PairLogps:
        """The pairs where `keep` (B,) is true, or at the places (b,) that it holds."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: value[keep] for name, value in values.items() if value is not None}
        return replace(self, **chosen)


def _there(lengths: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if lengths is None else lengths > 0


def _require(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the objective needs PairLogps.{name}, which is None")
    return value


SIDES = ("chosen", "rejected", "mismatched", "gold")
"""A pair's responses that a batch may hold, in their order; `mismatched` is another prompt's (kto's K)."""

PAIR = SIDES[:2]


@dataclass
class TokenBatch:
    """A micro-batch of B pairs, independent of how the rows are laid out.

    `input_ids` and `position_ids` (R, L) feed the model's body; so do `segments` (R, L) where rows hold more
    than one sequence (`models/attention.py` makes their mask). Padding is on the right, so that the causal
    mask hides it from a row of one sequence.
    `predictors` (N,) are flat indices into R·L of the positions whose hidden states predict the N response
    tokens `labels` (N,); `sequences` (N,) says which response a token belongs to: those on the first
    of `sides` (some of `SIDES`) are 0..B−1, on the second B..2B−1, and so on. `lengths` (S,) counts
    response tokens, `weights` (B,) are the pairs' weights in the loss, 0 for a filler that evens out the
    ranks' last batch, `margins` (B,) how far the chosen response was scored above the other, None where
    nobody says so of each. `ref_logps` (N,) are the reference's log-probs of the same tokens. `num_tokens`
    counts what the model's body computes for real pairs: neither padding nor fillers, a shared prompt once.
    A batch that was moved to a device has its `origin` on the CPU.

    >>> one = torch.tensor([[5, 6, 7]])  # a prompt of one token, a response of two; no rejected side
    >>> batch = TokenBatch(
    ...     input_ids=one, position_ids=torch.arange(3)[None], predictors=torch.tensor([0, 1]),
    ...     labels=torch.tensor([6, 7]), sequences=torch.tensor([0, 0]),
    ...     lengths=torch.tensor([2]), weights=torch.ones(1), indices=torch.tensor([0]),
    ...     example_ids=["a"], sides=("chosen",),
    ... )
    >>> batch.num_pairs
    1
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    labels: Tensor
    sequences: Tensor
    lengths: Tensor
    weights: Tensor
    indices: Tensor
    example_ids: list[str]
    sides: tuple[str, ...] = PAIR
    ref_logps: Tensor | None = None
    segments: Tensor | None = None
    margins: Tensor | None = None
    num_tokens: int = 0
    origin: TokenBatch | None = None

    @property
    def num_pairs(self) -> int:
        """B, fillers included."""
        return len(self.weights)

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on another device, with this one as its `origin`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(v, device) for name, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **moved, origin=self.on_host)

    @property
    def on_host(self) -> TokenBatch:
        """The batch as it was made, on the CPU: what is read from it waits for no device."""
        return self if self.origin is None else self.origin

    @property
    def real(self) -> Tensor | None:
        """The places (b,) of the real pairs, on the batch's device; None where all B are real."""
        there = self.on_host.weights > 0
        return None if bool(there.all()) else to_device(there.nonzero()[:, 0], self.weights.device)

    def of_real(self, values: Tensor) -> Tensor:
        """Of values (…, B) those of the real pairs, (…, b)."""
        real = self.real
        return values if real is None else values.index_select(-1, real)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on a device; to a GPU it is copied beside its work, from pinned memory."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
