"""One α per pair, from the pair's own norms (`rc.scope=pair`).

The family of pairwise-normalized gradients (arXiv 2410.13828) and AdaDPO (2605.28440). A pair's head scores
G = Σ_t c_t q_t h_tᵀ are never formed: ‖G‖² = Σ_{t,t'} c_t c_t' ⟨q_t, q_t'⟩⟨h_t, h_t'⟩ takes the Gram matrices
of its tokens, T²(k + D) operations and no buffer of B × k × D.

Axes: B pairs, N response tokens, T tokens of the longest response, k sketch, D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rcpo.method.calibration import Reduce, scale_gradients
from rcpo.method.types import PairLogps, to_device


def pair_geometry(
    hidden: Tensor, scores: Tensor, coefficients: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """‖s_w‖, ‖s_l‖ and cos(s_w, s_l) of each pair: three tensors (B,) in fp64.

    `hidden` (N, D), token `scores` q (N, k), `coefficients` c (N,). `lengths` (2B,), on the CPU, count the
    tokens of each response: the chosen ones come first, then the rejected; tokens after them are left out.
    The cosine of a zero score is 0.
    """
    pairs, longest = len(lengths) // 2, int(lengths.max())
    count = int(lengths.sum())
    # where each token stands among the padded rows, worked out on the CPU
    shifts = longest * torch.arange(2 * pairs) - (lengths.cumsum(0) - lengths)
    places = to_device(torch.arange(count) + shifts.repeat_interleave(lengths), hidden.device)

    def padded(tokens: Tensor) -> Tensor:
        rows = tokens.new_zeros(2 * pairs * longest, tokens.shape[1])
        return rows.index_copy_(0, places, tokens[:count]).view(2 * pairs, longest, tokens.shape[1])

    states = padded(hidden.detach().to(scores.dtype) * coefficients.to(scores.dtype)[:, None])
    errors = padded(scores.detach())

    def inner(left: slice, right: slice) -> Tensor:
        products = (states[left] @ states[right].mT) * (errors[left] @ errors[right].mT)
        return products.double().sum((1, 2))

    chosen, rejected = slice(0, pairs), slice(pairs, 2 * pairs)
    norm_w, norm_l = (inner(side, side).clamp(min=0).sqrt() for side in (chosen, rejected))
    product = norm_w * norm_l
    cosine = torch.where(product > 0, inner(chosen, rejected) / product, 0.0)
    return norm_w, norm_l, cosine


class PairCalibrator:
    """α of each pair, by the rule of `BandRule` without averages: to the center, or to the nearest edge.

    A pair whose incentive or score is not positive on some side keeps α = 1 and is counted in `skipped`;
    `clamped` counts those beyond [1/alpha_max, alpha_max].
    """

    def __init__(self, *, edge: bool, alpha_max: float | None) -> None:
        self._edge = edge
        self._limit = math.inf if alpha_max is None else math.log(alpha_max)
        self.skipped = 0
        self.clamped = 0
        self._sums: Tensor | None = None  # log α, pairs, skipped, clamped of this step

    def calibrate(
        self,
        logps: PairLogps,
        incentives: tuple[Tensor, Tensor],
        geometry: tuple[Tensor, Tensor, Tensor],
    ) -> PairLogps:
        """The same values, with gradients scaled by each pair's α and 1/α."""
        return scale_gradients(logps, self.alphas(incentives, geometry))

    def alphas(self, incentives: tuple[Tensor, Tensor], geometry: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """α of each pair, (B,) in fp64."""
        d_w, d_l = (side.detach().double() for side in incentives)
        norm_w, norm_l, cosine = geometry
        ratio, center = d_w / d_l, norm_l / norm_w
        values = torch.stack([d_w, d_l, norm_w, norm_l, ratio, center])
        usable = ((values > 0) & values.isfinite()).all(0)
        distance = torch.where(usable, center / ratio, 1.0).log()
        if self._edge:
            width = -cosine.clamp(max=1.0).log()  # of the band's half, in logs; NaN where there is no edge
            beyond = (distance.abs() - width).clamp(min=0) * distance.sign()
            distance = torch.where(cosine > 0, beyond, 0.0)
        log_alpha = 0.5 * distance
        clamped = log_alpha.clamp(-self._limit, self._limit)
        counts = [usable.double().sum(), (~usable).double().sum(), (clamped != log_alpha).double().sum()]
        sums = torch.stack([clamped.sum(), counts[0] + counts[1], *counts[1:]])
        self._sums = sums if self._sums is None else self._sums + sums
        return clamped.exp()

    def end(self, reduce: Reduce) -> dict[str, Any]:
        """Close a step over all ranks: its `rc/*` metrics; `rc/alpha` is the geometric mean."""
        sums = torch.zeros(4, dtype=torch.float64) if self._sums is None else self._sums
        total, self._sums = reduce(sums).tolist(), None
        self.skipped += int(total[2])
        self.clamped += int(total[3])
        alpha = math.exp(total[0] / total[1]) if total[1] else None
        return {"rc/alpha": alpha, "rc/skipped": self.skipped, "rc/clamped": self.clamped}

    def state_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {"skipped": self.skipped, "clamped": self.clamped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped, self.clamped = state["skipped"], state["clamped"]
