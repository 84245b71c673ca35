"""What a step measures of its own dynamics, and the calibration that follows from it.

One code path for both update modes. `step`: the statistics of the global batch are reduced once per
optimizer step and set α for the next. `microbatch` (the published way): each micro-batch's statistics,
averaged over the ranks, set the α that the same micro-batch uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rcpo.config.schema import CalibrationConfig, RunConfig
from rcpo.data.batches import GlobalBatches
from rcpo.engine.zero import Engine
from rcpo.errors import ConfigError
from rcpo.method.calibration import RewardCalibrator, StepCalibration
from rcpo.method.geometry import Sketch
from rcpo.method.incentives import incentives
from rcpo.method.objectives import Objective
from rcpo.method.pairwise import PairCalibrator
from rcpo.method.types import PairLogps
from rcpo.models.policy import Policy
from rcpo.system import distributed
from rcpo.training.control import ControlPairs
from rcpo.training.forward import PairOutput
from rcpo.training.objective import build_calibrator, build_pair_calibrator

PREVIOUS = "dynamics"  # the name of the last step's scores among a checkpoint's tensors
RULE = ("rule", "scope", "alpha")  # of rc.*: whose state a calibrator's is
GEOMETRY = ("geometry", "sketch", "sketch_seed")  # whose products those across samples are


def measured_every(config: RunConfig, objective: Objective) -> int:
    """Every how many steps the dynamics are measured; 0 is never."""
    if not objective.needs_rejected:
        return 0
    return 1 if config.rc.enabled else config.dynamics.every


def check_geometry(config: RunConfig, objective: Objective, policy: Policy) -> None:
    """Raise ConfigError where the head's geometry is wanted of a model whose head is not known."""
    if policy.fused or config.rc.geometry != "head" or not measured_every(config, objective):
        return
    remedy = "rc.geometry=parameters (engine=zero0)"
    remedy += "" if config.rc.enabled else ", or dynamics.every=0 to go without dynamics"
    raise ConfigError(
        f"rc.geometry=head: the output head of {type(policy.model).__name__} is not W h + b with a known "
        f"scale or cap, so its scores have no closed form; use {remedy}"
    )


class StepDynamics:
    """Measures each step's dynamics and, unless `rc=off`, calibrates its log-probs.

    `fresh_signals` says whether training pairs of the first epoch are readings for the loop; `control` gives
    readings where they are not.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        engine: Engine,
        batches: GlobalBatches,
        *,
        fresh_signals: bool = False,
        control: ControlPairs | None = None,
    ) -> None:
        self.objective = objective
        self.engine = engine
        self._rc = config.rc
        self.every = measured_every(config, objective)
        self.calibrator = build_calibrator(config.rc)
        self._pairwise = build_pair_calibrator(config.rc)
        self._statistics = StepCalibration(
            self.calibrator, update=config.rc.update, reduce=distributed.reduce_sum
        )
        head = config.rc.geometry == "head" and self.every > 0
        self._sketch = (
            Sketch(engine.policy.vocabulary, config.rc.sketch, config.rc.sketch_seed) if head else None
        )
        self._batches = batches
        self._fresh_signals = config.rc.loops and fresh_signals
        self._control = control
        self._measuring = False
        self._fresh = False

    def begin(self, step: int, micro_batches: int) -> None:
        """Start a step of so many micro-batches, counted from 0. Collective."""
        epoch = self._batches.epoch(step)
        new_epoch = step > 0 and epoch != self._batches.epoch(step - 1)
        self._measuring = self.every > 0 and step % self.every == 0
        self._fresh = self._fresh_signals and epoch == 0
        movement = None
        if self._control is not None and not self._fresh:
            movement = self._control.reading(step)
        self._statistics.begin(micro_batches, new_epoch=new_epoch, movement=movement)

    @property
    def sketch(self) -> Sketch | None:
        """What the forward pass has to sketch in this step."""
        return self._sketch if self._measuring else None

    def __call__(self, output: PairOutput) -> PairLogps:
        """Observe a micro-batch; return the log-probs that the loss is to use."""
        if self._measuring:
            d = self._observe(output)
            if self._pairwise is not None and output.count:
                return self._pairwise.calibrate(output.pairs, d, output.pair_geometry())
        return output.pairs if self.calibrator is None else self.calibrator.calibrate(output.pairs)

    def _observe(self, output: PairOutput) -> tuple[Tensor, Tensor]:
        """Add a micro-batch to the step's statistics; return its incentives."""
        by_head = self._sketch is not None
        scores = output.head_scores() if by_head else output.parameter_scores(self.engine.trainable)
        pairs = output.pairs
        none = pairs.chosen.detach()  # fillers alone: nothing to add, yet this rank joins the sums
        d = incentives(self.objective, pairs) if output.count else (none, none)
        moved = output.token_means()[1] if self._fresh else None
        ratios = None if moved is None else (moved[0].detach(), moved[1].detach())
        self._statistics.observe(d, scores, output.parts(), ratios)
        return d

    def end(self) -> dict[str, Any]:
        """Close the step over all ranks: its `dynamics/*` and `rc/*` metrics; set the next step's α."""
        if not self._measuring:
            return {}
        pairwise = {} if self._pairwise is None else self._pairwise.end(distributed.reduce_sum)
        return self._statistics.end() | pairwise

    @property
    def _stateful(self) -> RewardCalibrator | PairCalibrator | None:
        return self.calibrator or self._pairwise

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside `state_dict`: the last step's scores, (elements,)."""
        previous = self._statistics.samples.previous
        return {} if previous is None else {PREVIOUS: previous.flatten()}

    def state_dict(self) -> dict[str, Any]:
        """The calibration's state, ready for JSON; meters are empty between steps."""
        samples = self._statistics.samples
        return {
            "calibrator": None if self._stateful is None else self._stateful.state_dict(),
            "samples": samples.state_dict(),
            "shape": None if samples.previous is None else list(samples.previous.shape),
        }

    def load_state_dict(
        self, state: dict[str, Any], previous: Tensor | None, before: Mapping[str, Any]
    ) -> None:
        """Restore what still applies; `previous` is what `tensors` gave.

        `before` is `rc.*` of the run that it was saved by. With `resume_changed=allow` it may differ: another
        rule begins anew, and so does the geometry across samples where another one is measured.
        """
        earlier = {**vars(CalibrationConfig()), **before}

        def same(keys: Sequence[str]) -> bool:
            return all(earlier[key] == getattr(self._rc, key) for key in keys)

        if self._stateful is not None and state["calibrator"] is not None and same(RULE):
            self._stateful.load_state_dict(state["calibrator"])
        if not same(GEOMETRY):
            return
        samples = self._statistics.samples
        samples.load_state_dict(state["samples"])
        if previous is not None:
            samples.previous = previous.view(state["shape"]).to(self.engine.device)
