"""The published way to calibrate, written afresh from its equations: the baseline of the benchmark.

arXiv 2604.18239: ‖∇_W z_w‖ and ‖∇_W z_l‖ by two autograd calls to the head's weight for each micro-batch, two
V×D gradients that are made, normed and thrown away; α of the same micro-batch. It runs on rcpo's own fused
head, so what it costs here is less than on logits that are made in full.
"""

from __future__ import annotations

from typing import Any

import torch

from rcpo.method.geometry import Sketch
from rcpo.method.incentives import incentives
from rcpo.training.dynamics import StepDynamics
from rcpo.training.forward import PairOutput


class PublishedCalibration(StepDynamics):
    """`StepDynamics` whose norms come from the head's gradients."""

    decay = 0.98  # per micro-batch, as published

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._averages: torch.Tensor | None = None
        self.alpha = 1.0

    @property
    def sketch(self) -> Sketch | None:
        return None

    def __call__(self, scored: PairOutput) -> Any:
        pairs = scored.pairs
        weight = self.engine.policy.model.get_output_embeddings().weight
        norms = []
        for side in (pairs.chosen, pairs.losers):
            (gradient,) = torch.autograd.grad(side.mean(), weight, retain_graph=True)
            norms.append(gradient.norm().double())
            del gradient
        d = incentives(self.objective, pairs)
        logs = torch.stack([d[0].mean(), d[1].mean(), *norms]).clamp(min=1e-12).log()
        old = self._averages
        self._averages = logs if old is None else self.decay * old + (1 - self.decay) * logs
        d_w, d_l, s_w, s_l = self._averages.tolist()
        alpha = min(10.0, max(0.1, 2.718281828459045 ** (0.5 * ((s_l - s_w) - (d_w - d_l)))))
        self.alpha = alpha
        rejected = pairs.losers / alpha + (1 - 1 / alpha) * pairs.losers.detach()
        return pairs.replace(
            chosen=alpha * pairs.chosen + (1 - alpha) * pairs.chosen.detach(), rejected=rejected
        )

    def end(self) -> dict[str, Any]:
        return {"rc/alpha": self.alpha}
