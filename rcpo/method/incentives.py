"""Incentives d_w = −∂L/∂z_w and d_l = +∂L/∂z_l (arXiv 2604.18239), by autodiff of the objective itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcpo.method.objectives import Objective
from rcpo.method.types import PairLogps


def incentives(
    objective: Objective | Callable[[PairLogps], Tensor], logps: PairLogps
) -> tuple[Tensor, Tensor]:
    """(d_w, d_l), each (B,), of the sum of the losses; detached, whatever graph `logps` carries.

    `objective` is one of `get_objective`, or any function from log-probs to losses (B,). The chosen mean
    log-prob of `nll_coef` is a multiple of z_w and counts into d_w. d_l is 0 for an objective without a
    rejected side.

    >>> from rcpo.method.objectives import get_objective
    >>> even = torch.zeros(1)
    >>> incentives(get_objective("dpo", beta=1.0), PairLogps(even, even, even, even))  # β σ(0) on both sides
    (tensor([0.5000]), tensor([0.5000]))
    >>> incentives(lambda logps: 3 * logps.rejected - logps.chosen, PairLogps(even, even))
    (tensor([1.]), tensor([3.]))
    """
    with torch.enable_grad():
        chosen = logps.chosen.detach().requires_grad_()
        rejected = None if logps.rejected is None else logps.rejected.detach().requires_grad_()
        leaves = logps.replace(chosen=chosen, rejected=rejected)
        if isinstance(objective, Objective) and objective.uses_chosen_means:
            slope = objective.mean_slope(logps)
            offset = objective.chosen_means(logps).detach() - chosen.detach() * slope
            leaves = leaves.replace(chosen_means=chosen * slope + offset)
        inputs = [chosen] if rejected is None else [chosen, rejected]
        gradients = torch.autograd.grad(objective(leaves).sum(), inputs, allow_unused=True)
    d_w = torch.zeros_like(chosen) if gradients[0] is None else -gradients[0]
    d_l = torch.zeros_like(chosen) if len(gradients) == 1 or gradients[1] is None else gradients[1]
    return d_w.detach(), d_l.detach()
