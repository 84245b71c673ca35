"""Bytes on each rank through an optimizer step: phase by phase, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rcpo.config.schema import RunConfig
from rcpo.planner.communication import BUCKET
from rcpo.planner.gathers import Gathers
from rcpo.planner.states import (
    ELEMENT,
    MASTER,
    SUM,
    Parameter,
    States,
    flat_elements,
    partition,
    plain,
    states,
    sums_apart,
)
from rcpo.planner.trace import Trace


@dataclass(frozen=True)
class Phase:
    """The worst moment of a phase of the step: bytes by part, on the device and in the host's memory."""

    name: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class StepMemory:
    """A rank's optimizer step of several micro-batches, and the traces that its memory follows from.

    `scoring` is the trace of a reference's or an evaluation's batch. `gathered` are ZeRO-3's gathers.
    `scores` are the elements of both sides' sketched scores. `on_gpu` says that DeepSpeed's buffers take all
    their bytes at once, as on a GPU; in a process they take what was written to them.
    """

    config: RunConfig
    parameters: Sequence[Parameter]
    ranks: int
    microbatches: int
    training: Trace
    scoring: Trace
    gathered: Gathers | None
    scores: int
    on_gpu: bool
    rank: int = 0

    def phases(self) -> list[Phase]:
        """The step's phases in their order."""
        scoring = self._phase("scoring", self._standing_gradients, self.scoring.forward_peak)
        backward = max(self._backward(), key=lambda phase: phase.device_bytes)
        return [scoring, backward, self._reduction(), self._update()]

    @property
    def worst(self) -> Phase:
        """The phase that takes most of the device's memory."""
        return max(self.phases(), key=lambda phase: phase.device_bytes)

    @property
    def checkpoint_copy(self) -> int:
        """Bytes of the host's memory that a checkpoint takes while it is written beside training."""
        if not self.config.saves_in_background:
            return 0
        if self._stage == 0:  # each rank writes its share of what all hold
            return (MASTER * sum(self._trained) + self._states.optimizer) // self.ranks
        return self._states.optimizer  # with the fp32 weights

    @cached_property
    def _states(self) -> States:
        return states(self.parameters, self.config, self.ranks, self.rank)

    @cached_property
    def _trained(self) -> list[int]:
        return [p.numel for p in self.parameters if p.trained]

    @property
    def _stage(self) -> int:
        return self.config.zero_stage

    @property
    def _element(self) -> int:
        return ELEMENT[self.config.train.dtype]

    def _phase(
        self, name: str, gradients: int, activations: int, buffers: int = 0, *, gathers: bool = True
    ) -> Phase:
        alone = self.ranks == 1 and not self.config.engine.offload_parameters
        whole = 0 if self.gathered is None or alone else self.gathered.peak_elements
        if self._stage == 3:
            buffers += self._bucket(sum(self._trained))
        device = {
            "weights": self._states.weights,
            "gathered weights": self._element * whole if gathers else 0,
            "gradients": gradients,
            "optimizer": self._states.optimizer,
            "activations": activations,
            "geometry": 4 * self.scores,
            "communication": buffers,
            "reference": self._states.weights if self.config.reference.mode == "model" else 0,
        }
        host = dict.fromkeys(device, 0)
        if self.config.engine.offload_optimizer:
            host["optimizer"], device["optimizer"] = device["optimizer"], 0
            host["gradients"] = MASTER * self.own_elements
            if self._stage > 1:  # reduced pieces go there, to be added up
                host["gradients"] += SUM * self.own_elements
                device["gradients"] = 0
        if self.config.engine.offload_parameters:
            for part in ("weights", "reference"):
                host[part], device[part] = device[part], 0
        return Phase(name, device, host)

    @property
    def own_elements(self) -> int:
        """Elements that this rank's optimizer updates."""
        if self._stage == 0:
            return sum(self._trained)
        if self._stage == 3:
            return sum(partition(numel, self.ranks) for numel in self._trained)
        return flat_elements(self._trained, self.ranks) // self.ranks

    def _bucket(self, elements: int) -> int:
        """Bytes of the buffer that gradients are reduced in, once `elements` were written to it."""
        return self._element * (BUCKET if self.on_gpu else min(elements, BUCKET))

    @property
    def _standing_gradients(self) -> int:
        """Gradients that stay from one step to the next."""
        if sums_apart(self.config):
            return SUM * flat_elements(self._trained, self.ranks)
        return self._states.gradients if self._stage == 3 else 0

    @property
    def _earlier_gradients(self) -> int:
        """Gradients of earlier micro-batches in the last one."""
        if self._stage == 3:
            return self._states.gradients
        if self.microbatches == 1:
            return self._standing_gradients
        if self._stage == 2 or sums_apart(self.config):
            return self._states.gradients
        return SUM * sum(self._trained)

    def _backward(self) -> Iterator[Phase]:
        """The moments of the last backward pass."""
        for moment in self.training.backward:
            new = 0
            if self._stage < 2 and self.microbatches == 1:
                new = self._element * moment.gradients
            bucket = self._bucket(moment.gradients) if self._stage == 2 else 0
            yield self._phase("backward", self._earlier_gradients + new, moment.activations, bucket)

    def _reduction(self) -> Phase:
        """The end of the last backward pass: gradients, the buffer that they go through, a flat message."""
        total = sum(self._trained)
        message = SUM * min(total, BUCKET)
        gradients = SUM * total if self._stage == 0 else self._earlier_gradients
        if sums_apart(self.config):  # sent as they lie
            return self._phase("reduction", self._states.gradients, self.training.kept)
        if self._stage == 0 and self.ranks == 1 and plain(self.config):
            message = 0
        if self._stage == 1:  # moved into the buffer as it is filled
            gradients = 0
        if self._stage in (1, 2):
            message += self._bucket(total)
        if self._stage == 3 and not self.on_gpu:
            message *= 2  # gloo scatters from a copy of its own
        return self._phase("reduction", gradients, self.training.kept, message)

    def _update(self) -> Phase:
        """The optimizer's step: gradients once more, flat and in the masters' precision."""
        copies = 0 if self._stage == 0 else MASTER * self.own_elements
        if self.config.engine.offload_optimizer or sums_apart(self.config):
            copies = 0
        return self._phase("update", self._states.gradients, self.training.kept, copies, gathers=False)
