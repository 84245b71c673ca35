"""Calibration of a trainer that is not rcpo's: steer its log-probs, read off its incentives and its head.

The loss stays the trainer's own. Its log-probs pass through `steer`, which leaves their values and scales
their gradients; the gradient of the finished loss by that same tensor gives the incentives of any loss.

Axes: S sequences, T positions, N response tokens, D hidden, V vocabulary, k sketch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcpo.method.geometry import HeadShape, Sketch
from rcpo.method.logps import score_sides


@dataclass
class Factor:
    """α of one micro-batch. It may still change until the backward pass begins."""

    alpha: float = 1.0


class _Steered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, winners: Tensor, factor: Factor) -> Tensor:
        ctx.winners, ctx.factor = winners, factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        alpha = ctx.factor.alpha
        scale = torch.where(ctx.winners, alpha, 1 / alpha).to(gradient.dtype)
        return gradient * scale.view(-1, *[1] * (gradient.dim() - 1)), None, None


def steer(values: Tensor, winners: Tensor, factor: Factor) -> Tensor:
    """`values` (S, …) as they are; gradients × α where `winners` (S,) is true, ÷ α elsewhere."""
    return _Steered.apply(values, winners, factor)


@dataclass
class Seen:
    """What the forward passes of a micro-batch showed.

    Of the one with gradients: its arguments, hidden states (S, T, D), steered log-probs of tokens (S, T) or
    of sequences (S,), and the steered part of an NLL; of one without: the reference's log-probs.
    """

    winners: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    hidden: Tensor | None = None
    steered: Tensor | None = None
    nll: Tensor | None = None
    reference: Tensor | None = None


@contextmanager
def last_hidden_states(backbone: nn.Module, seen: Seen) -> Iterator[None]:
    """Keep the last hidden states of `backbone`'s forward pass with gradients, in their graph.

    Passes without gradients are a reference's. Raises ValueError for a second one with gradients.
    """

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if seen.hidden is not None:
            raise ValueError(
                "reward calibration expects one forward pass of the policy a micro-batch, not two"
            )
        seen.arguments, seen.hidden = (args, kwargs), output.last_hidden_state

    handle = backbone.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


IGNORED = -100  # the label of a token that is not part of a response


@dataclass(frozen=True)
class Responses:
    """The responses of a micro-batch, aligned with the hidden states that predict them.

    `labels` (S, T) are the tokens to predict, `weights` (S, T) each one's part in z, 0 outside the response,
    `winners` (S,) tells chosen from rejected. `rows` (S,) are the rows of the forward pass, where the trainer
    changes their order.
    """

    labels: Tensor
    weights: Tensor
    winners: Tensor
    rows: Tensor | None = None

    @classmethod
    def of_labels(
        cls,
        labels: Tensor,
        winners: Tensor,
        *,
        mean: bool,
        tail: float | None = None,
        rows: Tensor | None = None,
    ) -> Responses:
        """From the labels of whole sequences (S, T + 1), IGNORED outside responses; z is a sum or a mean.

        Tokens beyond the shorter response of a pair weigh `tail` (LD-DPO), winners before losers.
        """
        labels = labels[:, 1:]
        mask = labels != IGNORED
        weights = mask.float()
        if tail is not None:
            shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
            weights = torch.where(mask.cumsum(1) <= shared[:, None], 1.0, float(tail)) * mask
        if mean:
            weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
        return cls(labels.clamp(min=0), weights, winners, rows)

    def align(self, values: Tensor) -> Tensor:
        """What a forward pass gave at each position (S, T + 1, …), at the positions before `labels`.

        The last position predicts nothing; prompt learning puts its own positions before the others.
        """
        values = values[:, :-1][:, -self.labels.shape[1] :]
        return values if self.rows is None else values[self.rows]

    @property
    def lengths(self) -> Tensor:
        """Response tokens, (S,)."""
        return (self.weights != 0).sum(1)

    def by_z(self, gradients: Tensor) -> Tensor:
        """∂L/∂z of each response (S,) from ∂L/∂(token log-prob) (S, T).

        It is what reproduces the token gradients best: exactly where they are z's weights times a number, as
        for every loss that is a function of z.
        """
        weights = self.weights.double()
        return (gradients.double() * weights).sum(1) / weights.square().sum(1).clamp(min=1e-30)

    def by_side(self, by_z: Tensor) -> tuple[Tensor, Tensor]:
        """d_w = −∂L/∂z_w and d_l = +∂L/∂z_l of each pair's own loss, from the batch mean's ∂L/∂z (S,)."""
        pairs = len(self.winners) / 2
        return -pairs * by_z[self.winners], pairs * by_z[~self.winners]


def score_head(
    responses: Responses,
    hidden: Tensor,
    head: nn.Module,
    shape: HeadShape,
    sketch: Sketch,
    gathered: AbstractContextManager[Any],
) -> tuple[Tensor, Tensor]:
    """`rcpo.method.logps.score_sides` without gradients: z (S,) and scores (2, k, D).

    Inside `gathered` the head's parameters are whole; sharded tensors are gathered here. The logits of the
    response tokens are made once more, a chunk at a time.
    """
    with torch.no_grad(), gathered:
        return score_sides(
            hidden, whole(head.weight), responses.labels, responses.weights, responses.winners,
            bias=whole(head.bias), shape=shape, sketch=sketch,
        )  # fmt: skip


def whole(parameter: Any) -> Any:
    """The full tensor of a parameter that FSDP2 may have sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
