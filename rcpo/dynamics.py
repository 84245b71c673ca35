"""What a step measures of its own dynamics, and the calibration that follows from it.

One code path for both update modes. `step`: the statistics of the global batch are reduced once per
optimizer step and set α for the next. `microbatch` (the published way): each micro-batch's statistics,
averaged over the ranks, set the α that the same micro-batch uses.
"""

from __future__ import annotations

from typing import Any

from rcpo import distributed
from rcpo.calibration import RewardCalibrator, StepCalibration
from rcpo.config import ConfigError, RunConfig
from rcpo.engine import Engine
from rcpo.geometry import Sketch
from rcpo.incentives import incentives
from rcpo.models import Policy
from rcpo.objectives import Objective
from rcpo.scoring import Scored
from rcpo.types import PairLogps


def measured_every(config: RunConfig, objective: Objective) -> int:
    """Every how many steps the dynamics are measured; 0 is never."""
    if not objective.needs_rejected:
        return 0
    return 1 if config.rc.enabled else config.dynamics.every


def check_geometry(config: RunConfig, objective: Objective, policy: Policy) -> None:
    """Raises ConfigError where the head's geometry is wanted of a model whose head is not known."""
    if policy.fused or config.rc.geometry != "head" or not measured_every(config, objective):
        return
    remedy = "rc.geometry=parameters (engine=zero0)"
    remedy += "" if config.rc.enabled else ", or dynamics.every=0 to go without dynamics"
    raise ConfigError(
        f"rc.geometry=head: the output head of {type(policy.model).__name__} is not W h + b with a known "
        f"scale or cap, so its scores have no closed form; use {remedy}"
    )


class StepDynamics:
    """Measures each step's dynamics and, with `rc=on`, calibrates its log-probs."""

    def __init__(self, config: RunConfig, objective: Objective, engine: Engine) -> None:
        rc = config.rc
        self.objective = objective
        self.engine = engine
        self.every = measured_every(config, objective)
        self.calibrator = RewardCalibrator(ema=rc.decay, alpha_max=rc.alpha_max) if rc.enabled else None
        self._statistics = StepCalibration(self.calibrator, update=rc.update, reduce=distributed.reduce_sum)
        head = rc.geometry == "head" and self.every > 0
        self._sketch = Sketch(engine.policy.vocabulary, rc.sketch, rc.sketch_seed) if head else None
        self._measuring = False

    def begin(self, step: int) -> None:
        """Starts a step, counted from 1."""
        self._measuring = self.every > 0 and (step - 1) % self.every == 0

    @property
    def sketch(self) -> Sketch | None:
        """What the forward pass has to sketch in this step."""
        return self._sketch if self._measuring else None

    def __call__(self, scored: Scored) -> PairLogps:
        """Observes a micro-batch; returns the log-probs that the loss is to use."""
        if self._measuring:
            self._observe(scored)
        return scored.pairs if self.calibrator is None else self.calibrator.calibrate(scored.pairs)

    def _observe(self, scored: Scored) -> None:
        by_head = self._sketch is not None
        scores = scored.head_scores() if by_head else scored.parameter_scores(self.engine.trainable)
        none = scored.pairs.chosen.detach()  # fillers alone: nothing to add, yet this rank joins the sums
        d = incentives(self.objective, scored.pairs) if scored.count else (none, none)
        weights = scored.pairs.pair_weights, scored.pairs.pair_weights
        if scored.count:  # an unpaired example has one side only
            there = scored.pairs.has_chosen, scored.pairs.has_rejected
            d = d[0][there[0]], d[1][there[1]]
            weights = weights[0][there[0]], weights[1][there[1]]
        self._statistics.observe(d, scores, weights)

    def end(self) -> dict[str, Any]:
        """Closes the step over all ranks: its `dynamics/*` and `rc/*` metrics; sets the next step's α."""
        return self._statistics.end() if self._measuring else {}

    def state_dict(self) -> dict[str, Any]:
        """The calibration's state, ready for JSON; meters are empty between steps."""
        return {"calibrator": None if self.calibrator is None else self.calibrator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it where both runs calibrate."""
        if self.calibrator is not None and state["calibrator"] is not None:
            self.calibrator.load_state_dict(state["calibrator"])
