"""Token log-probs straight from hidden states, a chunk of logits at a time, and their reductions to z.

Only response positions reach the head, so N is the number of response tokens. The log-softmax runs in fp32
(in fp64 for fp64 inputs), in place of the logits. Where all of them fit into one chunk it is kept for the
backward pass; else each chunk is computed again there (as gradient checkpointing does; Wijmans et al. 2024,
arXiv 2411.09009, for the head), so never more than a chunk of logits is alive. The head geometry's sketch
(`rcpo.method.geometry`) is read off the same softmax.

Axes: N response tokens, S sequences, D hidden, V vocabulary, k sketch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcpo.method.geometry import HeadShape, Passes, Sketch, excess_, outer_scores, passes_on
from rcpo.method.types import PairLogps, TokenBatch


class _FusedLogps(torch.autograd.Function):
    """(N, D) hidden, (V, D) weight → (N,) log-probs and, given a sketch, (N, k) scores (no gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shape: HeadShape,
        passes: Passes,
        sketch: Sketch | None,
    ) -> tuple[Tensor, Tensor | None]:
        count, chunk = len(labels), passes.tokens(len(weight))
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        ctx.frozen = needs_hidden and not any(needs_head)  # then the gradient by h needs no second pass
        keep = any(needs_head) and count <= chunk
        differentiate = keep or ctx.frozen or sketch is not None
        logps = hidden.new_empty(count, dtype=torch.promote_types(hidden.dtype, torch.float32))
        scores = None if sketch is None else logps.new_empty(count, sketch.size)
        kept = torch.empty_like(hidden) if ctx.frozen else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits = shape.logits(hidden[part], weight, bias)
            own = None if scores is None else scores[part]
            logps[part], excess = _score(
                logits, labels[part], shape, passes, sketch, own, differentiate=differentiate
            )
            del logits
            if kept is not None and ctx.frozen:
                kept[part] = excess.to(weight.dtype) @ weight
            elif keep:
                kept = excess
        if scores is not None:
            if shape.scale != 1.0:
                scores *= shape.scale
            ctx.mark_non_differentiable(scores)
        ctx.save_for_backward(hidden, weight, bias, labels, kept)
        ctx.shape, ctx.passes = shape, passes
        return logps, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, kept = ctx.saved_tensors
        shape: HeadShape = ctx.shape
        coefficients = -shape.scale * grad_logps[:, None]  # (N, 1)
        if ctx.frozen:
            return (kept * coefficients).to(hidden.dtype), *[None] * 6
        gradients = _HeadGradients(hidden, weight, bias, *ctx.needs_input_grad[:3])
        chunk = ctx.passes.tokens(len(weight))
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            excess = kept
            if excess is None:
                logits = shape.logits(hidden[part], weight, bias)
                _, excess = _score(logits, labels[part], shape, ctx.passes, None, None, differentiate=True)
                del logits
            gradients.add(part, excess, coefficients[part])
        return *gradients.found(), *[None] * 4


class _HeadGradients:
    """Gradients by hidden states, weight and bias, a chunk of tokens at a time.

    In bf16 and fp16 the products are those of autocast: operands in the weight's precision, sums in fp32.
    The excess is in fp32 until it is a factor; products of several chunks add up in fp32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *needed: bool) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        needs_hidden, self._needs_weight, self._needs_bias = needed
        self._by_hidden = torch.empty_like(hidden) if needs_hidden else None
        self._by_weight: Tensor | None = None
        self._by_bias: Tensor | None = None
        self._half = weight.dtype in (torch.bfloat16, torch.float16)

    def add(self, part: slice, excess: Tensor, coefficients: Tensor) -> None:
        """The chunk `part` with (p − e_y) ⊙ f′ (n, V) in fp32 or better, and its coefficients (n, 1)."""
        states = self._hidden[part]
        if self._half:
            factor = torch.empty_like(excess, dtype=self._weight.dtype)
            torch.mul(excess, coefficients, out=factor)  # rounded once, for both products
            if self._by_hidden is not None:
                torch.mm(factor, self._weight, out=self._by_hidden[part])
            if self._needs_weight:
                self._by_weight = _sum(self._by_weight, factor.T @ states)
            if self._needs_bias:
                self._by_bias = _sum(self._by_bias, factor.sum(0, dtype=torch.float32))
            return
        # in full precision the smaller factor takes the coefficients
        if self._by_hidden is not None:
            self._by_hidden[part] = (excess @ self._weight) * coefficients
        if self._needs_weight:
            scaled = states * coefficients
            if self._by_weight is None:
                self._by_weight = excess.T @ scaled
            else:
                self._by_weight.addmm_(excess.T, scaled)
        if self._needs_bias:
            self._by_bias = _sum(self._by_bias, excess.T @ coefficients[:, 0])

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients by hidden, weight and bias, those that are needed, in their precision."""
        return (
            self._by_hidden,
            self._as(self._weight, self._by_weight) if self._needs_weight else None,
            self._as(self._bias, self._by_bias) if self._bias is not None and self._needs_bias else None,
        )

    def _as(self, like: Tensor, gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum of products in fp32 or better; one alone stays as it is."""
    if total is None:
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


def _score(
    logits: Tensor,
    labels: Tensor,
    shape: HeadShape,
    passes: Passes,
    sketch: Sketch | None,
    scores: Tensor | None,
    *,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """log p(y) (n,) of a chunk of logits (n, V), with their sketched scores written to `scores` (n, k).

    With `differentiate` also (p − e_y) ⊙ f′ (n, V), which may take the logits' place.
    """
    size = passes.rows(logits.shape[1], len(logits))
    logps, excess = logits.new_empty(len(logits)), logits
    for first in range(0, len(logits), size):
        rows = slice(first, first + size)
        log_softmax = torch.log_softmax(logits[rows], dim=-1)
        torch.gather(log_softmax, 1, labels[rows, None], out=logps[rows, None])
        if not differentiate:
            continue
        block = excess_(log_softmax.exp_(), labels[rows], shape.slope(logits[rows]))
        if scores is not None and sketch is not None:
            scores[rows] = sketch.scores(block, passes)
        if len(block) < len(logits):
            excess[rows] = block
        else:
            excess = block
    return logps, excess


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shape: HeadShape | None = None,
    sketch: Sketch | None = None,
    passes: Passes | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(label) of each token, (N,), and its sketched score S((e_y − p) ⊙ f′), (N, k), if asked for.

    `hidden` (N, D) are the final hidden states that predict `labels` (N,) through the head `weight` (V, D).
    Gradients flow to hidden, weight and bias; the scores carry none. `passes` are those of the device if not
    given.

    >>> logps, _ = token_logps(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
    >>> logps  # log ¼
    tensor([-1.3863])
    """
    assert hidden.shape == (len(labels), weight.shape[1]), (hidden.shape, labels.shape, weight.shape)
    head, portions = shape or HeadShape(), passes or passes_on(hidden.device)
    if not torch.is_grad_enabled():  # the function would take a trained head for one to be differentiated
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    logps, scores = _FusedLogps.apply(hidden, weight, bias, labels, head, portions, sketch)
    return logps, scores


def log_squares(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    shape: HeadShape | None = None,
    passes: Passes | None = None,
) -> Tensor:
    """log Σ_v p(v)² at each position, (N,), no gradient: what a token drawn there scores on average, roughly.

    hidden (N, D), head `weight` (V, D).

    >>> log_squares(torch.ones(1, 2), torch.zeros(4, 2))  # four times ¼²: log ¼
    tensor([-1.3863])
    """
    head, size = shape or HeadShape(), (passes or passes_on(hidden.device)).tokens(len(weight))
    with torch.no_grad():
        parts = [log_squares_of(head.logits(part, weight, bias)) for part in hidden.split(size)]
    return torch.cat(parts)


def log_squares_of(logits: Tensor) -> Tensor:
    """log Σ_v p(v)² of logits (N, V), (N,)."""
    return torch.logsumexp(2 * torch.log_softmax(logits, dim=-1), dim=-1)


def token_weights(logps: Tensor, sequences: Tensor, lengths: Tensor, reduction: str) -> Tensor:
    """Weight of each token's log-prob in its sequence's z: (N,), (N,), (S,) → (N,) in fp64, no gradient.

    sum: 1; mean: 1/length; importance: (1 − p) ÷ its sum over the sequence.
    """
    if reduction == "sum":
        return torch.ones_like(logps, dtype=torch.float64)
    if reduction == "mean":
        return 1.0 / lengths.double()[sequences]
    raw = -torch.expm1(logps.detach().double())
    totals = raw.new_zeros(len(lengths)).index_add(0, sequences, raw)
    return raw / totals.clamp(min=torch.finfo(torch.float64).tiny)[sequences]


def length_weights(sequences: Tensor, lengths: Tensor, pairs: int, alpha: float) -> Tensor:
    """`alpha` for the tokens of a pair's longer response beyond the length of the shorter, else 1: (N,) fp64.

    Liu et al. 2024 (LD-DPO). The tokens are in order, `sequences` (N,) and `lengths` (S,) as in a batch of
    so many `pairs`; responses other than the chosen and the rejected ones count in full.
    """
    shared = lengths.clone()
    shared[: 2 * pairs] = torch.minimum(lengths[:pairs], lengths[pairs : 2 * pairs]).repeat(2)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(len(sequences), device=sequences.device) - starts[sequences]
    beyond = (places >= shared[sequences]).double()
    return 1 + (alpha - 1) * beyond


def sequence_logps(logps: Tensor, weights: Tensor, sequences: Tensor, count: int) -> Tensor:
    """z of each sequence, the weighted sum of its token log-probs: (N,) → (S,) in fp64."""
    return logps.new_zeros(count, dtype=torch.float64).index_add(0, sequences, logps.double() * weights)


def pair_logps(
    batch: TokenBatch,
    logps: Tensor,
    weights: Tensor,
    ref_logps: Tensor | None,
    squares: Tensor | None = None,
) -> PairLogps:
    """The B pairs of a batch from the log-probs of its response tokens, in the reduction of `weights`.

    `ref_logps` (N,), the reference's log-probs of the same tokens, is reduced with the same weights. From
    `squares` (N,), `log_squares` at the same places, come the responses' likelihoods.
    """
    by_length = 1.0 / batch.lengths.double()[batch.sequences]

    def sides(values: Tensor | None, parts: Tensor) -> dict[str, Tensor]:
        """Sums (B,) of the tokens' values by their parts, of each side."""
        if values is None:
            return {}
        totals = sequence_logps(values, parts, batch.sequences, len(batch.lengths))
        return dict(zip(batch.sides, totals.view(len(batch.sides), -1), strict=True))

    z, ref, means = sides(logps, weights), sides(ref_logps, weights), sides(logps, by_length)
    lengths = dict(zip(batch.sides, batch.lengths.view(len(batch.sides), -1), strict=True))
    compared = {} if squares is None else sides((logps - squares).detach(), by_length)
    likelihoods = {side: values.exp() for side, values in compared.items()}
    return PairLogps(
        chosen=z["chosen"],
        rejected=z.get("rejected"),
        ref_chosen=ref.get("chosen"),
        ref_rejected=ref.get("rejected"),
        chosen_lengths=lengths["chosen"],
        rejected_lengths=lengths.get("rejected"),
        chosen_means=means["chosen"],
        kl_chosen=z.get("mismatched"),
        ref_kl_chosen=ref.get("mismatched"),
        weights=batch.weights,
        margins=batch.margins,
        chosen_likelihoods=likelihoods.get("chosen"),
        rejected_likelihoods=likelihoods.get("rejected"),
        gold_means=means.get("gold"),
    )


def score_sides(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    winners: Tensor,
    *,
    bias: Tensor | None = None,
    shape: HeadShape | None = None,
    sketch: Sketch | None = None,
) -> tuple[Tensor, Tensor]:
    """z of S responses, (S,) in fp64, and both sides' summed head scores, (2, k, D), in one pass of the head.

    For training loops other than rcpo's. hidden (S, T, D) predicts `labels` (S, T) through the head `weight`
    (V, D); `weights` (S, T) is each token's part in z, 0 outside the response (a sum: 1, a mean: 1/length);
    `winners` (S,) tells chosen from rejected. Gradients flow through z; the scores, a side's Σ ∇z by the
    head's weight, carry none.

    >>> _ = torch.manual_seed(0)
    >>> hidden, head, labels = torch.randn(2, 3, 4), torch.randn(5, 4), torch.tensor([[0, 1, 2], [3, 4, 0]])
    >>> weights, winners = torch.full((2, 3), 1 / 3), torch.tensor([True, False])
    >>> z, scores = score_sides(hidden, head, labels, weights, winners)
    >>> z.shape, scores.shape
    (torch.Size([2]), torch.Size([2, 5, 4]))
    >>> expected = torch.log_softmax(hidden @ head.T, -1).gather(2, labels[..., None]).mean((1, 2))
    >>> bool(torch.allclose(z.float(), expected))
    True
    """
    sketch = sketch or Sketch(len(weight), None)
    responses = weights != 0
    states, sequences = hidden[responses], responses.nonzero()[:, 0]
    logps, scores = token_logps(states, weight, labels[responses], bias=bias, shape=shape, sketch=sketch)
    assert scores is not None
    z = sequence_logps(logps, weights[responses].double(), sequences, len(hidden))
    parts = [weights[responses] * (winners[sequences] == side) for side in (True, False)]
    return z, torch.stack([outer_scores(states, scores, part) for part in parts])
