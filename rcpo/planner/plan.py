"""A plan: one configuration's parameters, memory, communication and time, from its numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

from transformers import PreTrainedConfig

from rcpo.config.schema import RunConfig
from rcpo.data.store import PairDataset
from rcpo.engine.pieces import PERSISTS, longest_vector
from rcpo.method.geometry import ON_CPU, ON_GPU
from rcpo.method.objectives import Objective
from rcpo.models.attention import choose_layout
from rcpo.models.policy import Policy
from rcpo.planner.communication import Message, messages, own_messages
from rcpo.planner.gathers import Gathers, gathers, module_order
from rcpo.planner.memory import Phase, StepMemory
from rcpo.planner.model import architecture, depth, few_layers, owned, parameters
from rcpo.planner.settings import GpuConfig, PlanConfig
from rcpo.planner.states import Parameter
from rcpo.planner.timing import Machine, Times, times
from rcpo.planner.trace import BatchShape, Trace, Work, trace
from rcpo.planner.update import reduction, update
from rcpo.planner.workload import Workload, training_data, workload
from rcpo.training.objective import build_objective

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a run of `config` on `ranks` processes will take; `gpu` None is a process on a CPU.

    `work` is that of a step's passes, `update` that of its end, both of one rank.
    """

    config: RunConfig
    settings: PlanConfig
    gpu: GpuConfig | None
    ranks: int
    parameters: list[Parameter]
    workload: Workload
    step: StepMemory
    work: Work
    update: Work
    scoring_flops: float
    deepspeed: list[Message]
    own: list[Message]

    @cached_property
    def worst(self) -> Phase:
        """The phase that takes most of the device's memory."""
        return self.step.worst

    @property
    def room(self) -> float | None:
        """Bytes of the GPU that a plan may fill; None without a GPU."""
        return None if self.gpu is None else self.gpu.memory * (1 - self.settings.headroom)

    @property
    def fits(self) -> bool:
        if self.gpu is None or self.room is None:
            return True
        return self.worst.device_bytes <= self.room and self.worst.host_bytes <= self.gpu.host_memory

    @cached_property
    def times(self) -> Times | None:
        """A step's seconds; None without a GPU."""
        if self.gpu is None:
            return None
        return times(
            self.config,
            Machine(self.gpu, self.settings, self.ranks),
            self.work,
            self.update,
            [*self.deepspeed, *self.own],
            self.step.own_elements,
            self.workload.microbatches,
            self.worst.host["weights"],
        )

    @property
    def reference_seconds(self) -> float:
        """The pass that scores all pairs with the reference once, before the first step."""
        if self.gpu is None or self.workload.pairs is None or self.config.reference.mode != "precompute":
            return 0.0
        speed = Machine(self.gpu, self.settings, self.ranks).peak(self.config.train.dtype)
        return self.scoring_flops * self.workload.pairs / self.ranks / (speed * self.settings.efficiency)

    @property
    def seconds(self) -> float | None:
        """The whole training with its reference pass, without held-out evaluation."""
        if self.times is None:
            return None
        return self.reference_seconds + self.workload.steps * self.times.step

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.ranks * self.seconds / 3600


class Planner:
    """Plans configurations that share a model and data; what several of them need is made once."""

    def __init__(self, settings: PlanConfig, gpu: GpuConfig | None) -> None:
        self.settings = settings
        self.gpu = gpu
        self._made: dict[object, object] = {}

    def plan(self, config: RunConfig, ranks: int) -> Plan:
        """Raise ConfigError for what no run could do, and where numbers are lacking."""
        microbatches = config.train.accumulation(ranks)
        objective = build_objective(config)
        found = self._architecture(config)
        weights = self._parameters(config)
        policy = self._policy(config)
        layout = choose_layout(config.data.layout, [policy.model.config])
        work = self._workload(config, objective, layout, ranks)
        sketch = _sketch(config, objective, policy.vocabulary)
        usual = self._trace(config, work.usual, sketch, training=True)
        largest = self._trace(config, work.largest, sketch, training=True)
        scored = self._trace(config, work.scored, None, training=False)
        whole = self._gathers(config, work.usual) if config.engine.stage == 3 else None
        scores = _scores(config, objective, sketch, found.get_text_config().hidden_size, weights)
        computed = usual.forward_work + usual.backward_work
        if config.reference.mode == "model" and objective.needs_reference:
            computed += usual.forward_work
        step = StepMemory(
            config, weights, ranks, microbatches, largest, scored, whole, scores, self.gpu is not None
        )
        return Plan(
            config=config,
            settings=self.settings,
            gpu=self.gpu,
            ranks=ranks,
            parameters=weights,
            workload=work,
            step=step,
            work=computed * microbatches + reduction(config, weights, ranks, step.own_elements, microbatches),
            update=update(config, weights, ranks, step.own_elements),
            scoring_flops=usual.forward_work.flops / config.train.microbatch(ranks),
            deepspeed=messages(weights, config, ranks, microbatches, whole),
            own=own_messages(config, scores, microbatches) if ranks > 1 else [],
        )

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def _architecture(self, config: RunConfig) -> PreTrainedConfig:
        return self._once("architecture", lambda: architecture(config, self.settings.architecture))

    def _parameters(self, config: RunConfig) -> list[Parameter]:
        key = "parameters", repr(config.adapter)
        return self._once(key, lambda: parameters(self._architecture(config), config))

    def _policy(self, config: RunConfig) -> Policy:
        key = "policy", _kind(config)

        def make() -> Policy:
            policy = few_layers(self._architecture(config), config)
            policy.passes = ON_CPU if self.gpu is None else ON_GPU
            return policy

        return self._once(key, make)

    def _trace(self, config: RunConfig, rows: BatchShape, sketch: int | None, *, training: bool) -> Trace:
        def make() -> Trace:
            layers = depth(self._architecture(config))
            return trace(self._policy(config), rows, sketch, training=training, depth=layers)

        return self._once(("trace", _kind(config), rows, sketch, training), make)

    def _workload(self, config: RunConfig, objective: Objective, layout: str, ranks: int) -> Workload:
        run = repr(config.train), repr(config.rc), config.eval.batch_size, config.seed
        key = "workload", run, layout, ranks

        def data() -> PairDataset:
            return self._once("data", lambda: training_data(config, self.settings))

        return self._once(key, lambda: workload(config, self.settings, objective, layout, ranks, data))

    def _gathers(self, config: RunConfig, rows: BatchShape) -> Gathers:
        def make() -> Gathers:
            found = self._architecture(config)
            order = module_order(self._policy(config), rows, depth(found))
            numels = {p.name: p.numel for p in self._parameters(config)}
            limits = config.engine.deepspeed.get("zero_optimization", {})
            persists = limits.get(PERSISTS, longest_vector(self._policy(config)))
            return gathers(order, owned(found, config), numels, persists=persists)

        return self._once(("gathers", _kind(config), repr(config.engine.deepspeed)), make)


def _kind(config: RunConfig) -> tuple[str, str, bool]:
    """What a policy's layers depend on."""
    return repr(config.adapter), config.train.dtype, config.train.gradient_checkpointing


def _measures(config: RunConfig, objective: Objective) -> bool:
    return objective.needs_rejected and (config.rc.enabled or config.dynamics.every > 0)


def _sketch(config: RunConfig, objective: Objective, vocabulary: int) -> int | None:
    """Buckets of the vocabulary sketch; None where the forward pass sketches nothing."""
    if not _measures(config, objective) or config.rc.geometry != "head":
        return None
    return min(config.rc.sketch or vocabulary, vocabulary)


def _scores(
    config: RunConfig, objective: Objective, sketch: int | None, hidden: int, weights: list[Parameter]
) -> int:
    """Elements of both sides' scores."""
    if not _measures(config, objective):
        return 0
    if sketch is None:
        return 2 * sum(p.numel for p in weights if p.trained)
    return 2 * sketch * hidden
