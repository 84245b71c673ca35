"""How long a step takes on a GPU, and what it waits for: products, links, memory, the host.

A model of the machine, not a measurement: products at a share of the GPU's peak, though never sooner than the
host starts the operations and the memory moves their bytes; messages in rings at a share of the slowest link
and with NCCL's latencies; the update by its operations and bytes, or at the bandwidth of the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rcpo.config.schema import RunConfig
from rcpo.planner.communication import Message
from rcpo.planner.settings import GpuConfig, PlanConfig
from rcpo.planner.states import ELEMENT, MASTER
from rcpo.planner.trace import Work
from rcpo.planner.update import optimizer_bytes

# NCCL's model of a ring with large messages (src/graph/tuning.cc): a start, a hop inside a node, one between
RING_START, RING_HOP, RING_NODE_HOP = 8.4e-6, 3.4e-6, 14.0e-6


@dataclass(frozen=True)
class Times:
    """Seconds of a step by what is busy.

    `starts`, the host's of starting operations, and `memory`, for what they read and write, run beside
    `products`, and so does `communication` where it `overlaps`.
    """

    products: float
    starts: float
    memory: float
    communication: float
    optimizer: float
    host: float
    overlaps: bool

    @property
    def step(self) -> float:
        both = max(self.products, self.starts, self.memory), self.communication
        return (max(both) if self.overlaps else sum(both)) + self.optimizer + self.host

    @property
    def bottleneck(self) -> str:
        """What takes most of the step."""
        found = {
            "products": self.products,
            "starting operations": self.starts,
            "memory traffic": self.memory,
            "communication": self.communication,
            "the optimizer": self.optimizer,
            "the host": self.host,
        }
        return max(found, key=lambda name: found[name])


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, `ranks` of them."""

    gpu: GpuConfig
    settings: PlanConfig
    ranks: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.gpu.per_node)

    @property
    def link(self) -> float:
        """Bytes/s of a ring through all GPUs: a node's network cards work together."""
        link = self.gpu.link
        if self.nodes > 1:
            link = min(link, self.gpu.network * self.gpu.per_node)
        return link * self.settings.link_efficiency

    def peak(self, dtype: str) -> float:
        """FLOP/s of dense products."""
        return {"fp32": self.gpu.fp32, "bf16": self.gpu.bf16, "fp16": self.gpu.fp16}[dtype]

    def seconds(self, message: Message) -> float:
        """Time of a message, all its repetitions."""
        if self.ranks == 1:
            return 0.0
        rounds = 2 if message.name == "all_reduce" else 1
        inside = (self.ranks - self.nodes) * RING_HOP
        latency = RING_START + rounds * (inside + (self.nodes - 1) * RING_NODE_HOP)
        return message.wire(self.ranks) / self.link + message.count * latency


def times(
    config: RunConfig,
    machine: Machine,
    work: Work,
    update: Work,
    sent: Iterable[Message],
    own_elements: int,
    microbatches: int,
    weights: int,
) -> Times:
    """Seconds of a step of one rank.

    `work` is that of the step's passes, `update` that of its end; `own_elements` are those that the rank's
    optimizer updates, `weights` the bytes that are brought from the host for each pass over the model where
    they are kept there.
    """
    gpu, element = machine.gpu, ELEMENT[config.train.dtype]
    starting = machine.settings.start_seconds
    optimizer, on_host = max(update.operations * starting, update.bytes / gpu.bandwidth), 0.0
    if config.engine.offload_optimizer:  # the model's own weight is written, too
        optimizer = own_elements * (optimizer_bytes(config) + element) / gpu.host_bandwidth
        on_host += own_elements * (MASTER + element) / gpu.host  # gradients there, weights back
    if config.engine.offload_parameters:
        on_host += 2 * microbatches * weights / gpu.host
    return Times(
        products=work.flops / (machine.peak(config.train.dtype) * machine.settings.efficiency),
        starts=work.operations * starting,
        memory=work.bytes / gpu.bandwidth,
        communication=sum(machine.seconds(message) for message in sent),
        optimizer=optimizer,
        host=on_host,
        overlaps=config.engine.stage == 3,  # DeepSpeed's own choice
    )
