"""Score geometry: ‖s_w‖, ‖s_l‖ and cos(s_w, s_l), s = ∇_θ z, of the mean over a batch of pairs.

`head`: θ is the output head, in closed form from what the forward pass already has. With final hidden states
h_t, probabilities p_t and the weights c_t of the token log-probs in z, G = Σ_t c_t ((e_y − p_t) ⊙ f′) h_tᵀ
and ‖s‖ = ‖G‖_F. With tied embeddings it is the head's use of the matrix alone. `parameters`: θ is everything
that is trained, by autograd; exact, for small models.

Both are linear in the pairs, so sums over micro-batches and ranks are the scores of the global batch.

Axes: N tokens, D hidden, V vocabulary, k sketch (k = V where it is exact), P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 8
"""Partial sums of a sketch, which the order of its additions is made of: equal on all devices."""


@dataclass(frozen=True)
class Passes:
    """In which portions a device goes through logits (N, V).

    `chunk` logits are alive at once: enough for efficient products at any vocabulary. Of these, `block` at a
    time go through the softmax and the sketch, and are still in a CPU's cache at the next operation. A GPU
    takes them all (None), for there each operation costs its start.
    """

    chunk: int
    block: int | None = None

    def tokens(self, vocabulary: int) -> int:
        """Tokens of a chunk."""
        return max(1, self.chunk // vocabulary)

    def rows(self, vocabulary: int, tokens: int) -> int:
        """Of so many `tokens`, those of a block."""
        return max(1, tokens if self.block is None else self.block // vocabulary)


ON_CPU = Passes(chunk=2**25, block=2**22)  # 128 MiB and 16 MiB in fp32
ON_GPU = Passes(chunk=2**27)  # 512 MiB in fp32: 882 tokens of Qwen 2.5


def passes_on(device: torch.device) -> Passes:
    """The portions for a device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


class Sketch:
    """CountSketch S (k, V) of the vocabulary axis, one signed 1 a column: token v goes to bucket v mod k.

    E‖S G‖² = ‖G‖², inner products are unbiased, and S is linear, so sketches add up over micro-batches and
    ranks (Charikar, Chen & Farach-Colton 2002). With `size` None or ≥ V it is the identity.

    >>> sketch = Sketch(vocabulary=6, size=2)
    >>> sketch.scores(excess_(torch.full((1, 6), 1 / 6), torch.tensor([3]), slope=None)).shape
    torch.Size([1, 2])
    """

    def __init__(self, vocabulary: int, size: int | None, seed: int = 0) -> None:
        self.vocabulary = vocabulary
        self.exact = size is None or size >= vocabulary
        self.size = vocabulary if size is None or size >= vocabulary else size
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (vocabulary,), generator=generator).float() * 2 - 1
        self._signs = torch.ones(vocabulary) if self.exact else signs

    def signs(self, like: Tensor) -> Tensor:
        """The signs (V,) on the device and in the dtype of `like`."""
        if self._signs.device != like.device or self._signs.dtype != like.dtype:
            self._signs = self._signs.to(like)
        return self._signs

    def scores(self, excess: Tensor, passes: Passes | None = None) -> Tensor:
        """S ((e_y − p) ⊙ f′) of each token, from `excess_` (N, V), which is minus that: (N, k).

        The sum over the ⌈V/k⌉ blocks of the vocabulary: block b goes to partial sum b mod `LANES`, and the
        partial sums are added up by halves. `passes` decide only how many of them are made at once.
        """
        if self.exact:
            return -excess
        together = (passes or passes_on(excess.device)).block is None
        return self._all_lanes(excess) if together else self._lanes(excess, 0, 1)

    def _all_lanes(self, excess: Tensor) -> Tensor:
        """All partial sums at once: few operations."""
        sums = self._partial(excess, 0, LANES * self.size, LANES * self.size)
        width = sums.shape[1]
        while width > self.size:
            width //= 2
            sums = sums[:, :width].add_(sums[:, width : 2 * width])
        return sums

    def _lanes(self, excess: Tensor, first: int, step: int) -> Tensor:
        """The partial sums first, first + step, …, one after the other: little memory."""
        if step == LANES:
            return self._partial(excess, first * self.size, LANES * self.size, self.size)
        half = self._lanes(excess, first, 2 * step)
        return half.add_(self._lanes(excess, first + step, 2 * step))

    def _partial(self, excess: Tensor, start: int, step: int, width: int) -> Tensor:
        """−Σ of the signed columns start … start + width, then those a `step` further, …: (N, width)."""
        signs = self.signs(excess)
        sums = excess.new_zeros(len(excess), width)
        for first in range(start, self.vocabulary, step):
            part = slice(first, first + width)
            block = excess[:, part]
            sums[:, : block.shape[1]].addcmul_(block, signs[part], value=-1)
        return sums


def excess_(probabilities: Tensor, labels: Tensor, slope: Tensor | None) -> Tensor:
    """(p − e_y) ⊙ f′, minus the gradient of log p(y) by the logits: (N, V), (N,) → (N, V), in place of p."""
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities if slope is None else probabilities.mul_(slope)


@dataclass(frozen=True)
class HeadShape:
    """What a model does to W h beyond the product: logits = cap · tanh(scale · (W h + b) / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits (N, V) in fp32 or better; outside autograd, as they are changed in place."""
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return self.finish(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def finish(self, logits: Tensor) -> Tensor:
        """The logits of W h + b (N, V), scaled and capped in place."""
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """f′, the capped logits' derivative by the uncapped ones, from the capped; None without a cap."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()


@dataclass(frozen=True)
class ScoreGeometry:
    """Norms of the winner's and loser's scores and the cosine between them.

    >>> ScoreGeometry.of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    ScoreGeometry(norm_chosen=5.0, norm_rejected=2.0, cosine=0.8)
    """

    norm_chosen: float
    norm_rejected: float
    cosine: float

    @staticmethod
    def of(scores: Tensor) -> ScoreGeometry:
        """From stacked scores (2, …): chosen, rejected. The cosine of a zero score is 0."""
        return ScoreGeometry.of_products(*score_products(scores).tolist())

    @staticmethod
    def of_products(chosen: float, rejected: float, cross: float) -> ScoreGeometry:
        """From ‖s_w‖², ‖s_l‖² and ⟨s_w, s_l⟩."""
        norm_chosen, norm_rejected = chosen**0.5, rejected**0.5
        product = norm_chosen * norm_rejected
        return ScoreGeometry(norm_chosen, norm_rejected, cross / product if product else 0.0)


def score_products(scores: Tensor) -> Tensor:
    """‖s_w‖², ‖s_l‖² and ⟨s_w, s_l⟩ of stacked scores (2, …), in fp64 on their device: (3,)."""
    assert scores.shape[0] == 2, scores.shape
    chosen, rejected = scores[0].reshape(-1, scores.shape[-1]), scores[1].reshape(-1, scores.shape[-1])
    return torch.stack([inner(chosen, chosen), inner(rejected, rejected), inner(chosen, rejected)])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors of a shape, a number in fp64: rows in their own precision, then their sum."""
    return torch.linalg.vecdot(a, b).double().sum()


def outer_scores(hidden: Tensor, scores: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_t c_t q_t h_tᵀ: hidden (N, D), token scores q (N, k), c (N,) → (k, D)."""
    weighted = hidden.detach().to(scores.dtype) * coefficients.to(scores.dtype)[:, None]
    return scores.T @ weighted


def head_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    shape: HeadShape | None = None,
    sketch: Sketch | None = None,
) -> Tensor:
    """G = Σ_t c_t ((e_y − p) ⊙ f′) hᵀ of one side: the gradient of Σ_t c_t log p(y_t) by the head's weight.

    hidden (N, D), weight (V, D), labels (N,), coefficients (N,) → (V, D), or the sketch S G (k, D).

    >>> hidden, head = torch.tensor([[1.0, 0.0]]), torch.zeros(2, 2)  # p is even: (e_y − p) hᵀ = ±½ hᵀ
    >>> head_scores(hidden, head, torch.tensor([0]), torch.ones(1))
    tensor([[ 0.5000,  0.0000],
            [-0.5000,  0.0000]])
    """
    head, sketch = shape or HeadShape(), sketch or Sketch(len(weight), None)
    passes = passes_on(weight.device)
    chunk = passes.tokens(len(weight))
    total = weight.new_zeros(
        sketch.size, hidden.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    with torch.no_grad():
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = head.logits(hidden[part], weight, bias)
            excess = excess_(torch.softmax(logits, dim=-1), labels[part], head.slope(logits))
            scores = sketch.scores(excess, passes)
            total += head.scale * outer_scores(hidden[part], scores, coefficients[part])
    return total


def parameter_scores(chosen: Tensor, rejected: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """∇_θ of two scalars (sums of z over the pairs) over all parameters: (2, P). Keeps the graph.

    In fp32 or better, for they are added up over micro-batches and ranks.
    """
    rows = []
    for total in (chosen, rejected):
        gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        precise = [g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in filled]
        rows.append(torch.cat(precise))
    return torch.stack(rows)
