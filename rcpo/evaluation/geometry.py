"""The dynamics of training, measured on held-out pairs: all of them together, as if they were one batch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rcpo.method.calibration import DynamicsMeter
from rcpo.method.geometry import Sketch
from rcpo.method.incentives import incentives
from rcpo.system import distributed
from rcpo.training.dynamics import measured_every
from rcpo.training.forward import PairOutput
from rcpo.training.session import Session


class HeldOutDynamics:
    """Collects incentives and scores over the held-out batches of this rank; `metrics` reduces over ranks.

    By the output head's geometry (`eval/dynamics/*`) where the head is known, and `by_parameters` by all
    trainable ones too (`eval/dynamics_parameters/*`). Nothing is measured where the run measures nothing, and
    where a pair's incentives depend on its micro-batch: they would change with the number of ranks.
    """

    def __init__(self, session: Session, *, by_parameters: bool) -> None:
        objective, rc = session.objective, session.config.rc
        wanted = measured_every(session.config, objective) > 0 and not objective.spec.couples_batch
        policy = session.engine.policy
        head = wanted and policy.fused
        self._objective = objective
        self._engine = session.engine
        self.sketch = Sketch(policy.vocabulary, rc.sketch, rc.sketch_seed) if head else None
        self._meters = {"dynamics": DynamicsMeter()} if head else {}
        self._by_parameters = wanted and by_parameters
        if self._by_parameters:
            self._meters["dynamics_parameters"] = DynamicsMeter()

    def forward_mode(self) -> AbstractContextManager[None]:
        """The context for the forward pass: gradients only where all parameters' are asked for."""
        return torch.enable_grad() if self._by_parameters else torch.no_grad()

    def observe(self, output: PairOutput) -> tuple[Tensor, Tensor] | None:
        """Add a batch; return its pairs' incentives (N,) and (N,), or None where nothing is measured."""
        if not self._meters:
            return None
        none = output.pairs.chosen.detach()  # fillers alone: nothing to add, yet this rank joins the sums
        d = incentives(self._objective, output.pairs) if output.count else (none, none)
        for name, meter in self._meters.items():
            by_head = name == "dynamics"
            scores = output.head_scores() if by_head else output.parameter_scores(self._engine.trainable)
            meter.observe(d, scores, output.parts())
        return d

    def metrics(self) -> dict[str, Any]:
        """`eval/dynamics/*` and `eval/dynamics_parameters/*`, equal on all ranks. Collective."""
        record: dict[str, Any] = {}
        for name, meter in self._meters.items():
            values = meter.collect(distributed.reduce_sum).metrics()
            record |= {f"eval/{name}/{key.removeprefix('dynamics/')}": value for key, value in values.items()}
        return record
