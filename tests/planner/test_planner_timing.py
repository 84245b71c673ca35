"""Seconds by hand from a machine of round numbers."""

from __future__ import annotations

import pytest

from rcpo.config.schema import RunConfig
from rcpo.planner.communication import Message
from rcpo.planner.settings import GpuConfig, PlanConfig
from rcpo.planner.timing import RING_HOP, RING_NODE_HOP, RING_START, Machine, Times, times
from rcpo.planner.trace import Work

GPU = GpuConfig(
    name="round", memory=1e10, bf16=1e12, fp16=1e12, fp32=1e11, bandwidth=1e11, link=1e10, network=1e9,
    host=1e9, host_bandwidth=1e10, per_node=4,
)  # fmt: skip
SETTINGS = PlanConfig(efficiency=0.5, start_seconds=1e-5, link_efficiency=0.5)
UPDATE = Work(0, 5000, 3 * 10**10)


def test_a_ring_in_a_node() -> None:
    machine = Machine(GPU, SETTINGS, ranks=4)
    # 4e9 bytes all-reduced: each rank sends 2 · 3/4 of them at half of 1e10 bytes/s, in 2 · 3 hops
    assert machine.seconds(Message("all_reduce", 4 * 10**9, 1, "")) == pytest.approx(
        6e9 / 5e9 + RING_START + 6 * RING_HOP
    )
    # each rank puts in 1e9 and gets three others' in 3 hops
    assert machine.seconds(Message("all_gather_into_tensor", 10**9, 2, "")) == pytest.approx(
        2 * (3e9 / 5e9 + RING_START + 3 * RING_HOP)
    )
    assert Machine(GPU, SETTINGS, 1).seconds(Message("all_reduce", 10**9, 1, "")) == 0


def test_a_ring_through_nodes_takes_all_their_network_cards() -> None:
    machine = Machine(GPU, SETTINGS, ranks=8)
    # two nodes with four cards of 1e9 bytes/s each: slower than the link, half is reached
    hops = 6 * RING_HOP + RING_NODE_HOP
    assert machine.seconds(Message("reduce_scatter_tensor", 8 * 10**9, 1, "")) == pytest.approx(
        7e9 / 2e9 + RING_START + hops
    )


def of_a_step(config: RunConfig) -> Times:
    """On one GPU, with three micro-batches and a billion weights."""
    machine, work = Machine(GPU, SETTINGS, ranks=1), Work(2 * 10**12, 1000, 10**10)
    return times(config, machine, work, UPDATE, sent=[], own_elements=10**9, microbatches=3, weights=10**9)


def test_a_step_by_hand() -> None:
    config = RunConfig()
    config.train.dtype, config.engine.stage = "bf16", 2
    found = of_a_step(config)
    # 2e12 at half of 1e12; 1000 starts of 1e-5 s; 1e10 bytes at 1e11; the update's 3e10 bytes at 1e11
    assert found == Times(4.0, 0.01, 0.1, 0.0, 0.3, 0.0, overlaps=False)
    assert found.step == pytest.approx(4.3) and found.bottleneck == "products"
    config.engine.stage, config.engine.offload_optimizer, config.engine.offload_parameters = 3, True, True
    found = of_a_step(config)
    # an element's gradient, weight and two moments read, three written, a bf16 weight, in the host's memory
    # of 1e10 bytes/s; gradients there and weights back, weights for two passes of three
    assert found == Times(4.0, 0.01, 0.1, 0.0, 3.0, 6.0 + 6.0, overlaps=True)
    assert found.bottleneck == "the host"


def test_an_update_of_many_small_tensors_takes_as_long_as_their_operations_start() -> None:
    config = RunConfig()
    config.engine.stage = 2
    found = times(
        config,
        Machine(GPU, SETTINGS, 1),
        Work(),
        Work(0, 5000, 10**9),  # 5000 starts of 1e-5 s; 1e9 bytes at 1e11 take less
        sent=[],
        own_elements=10**7,
        microbatches=1,
        weights=0,
    )
    assert found.optimizer == pytest.approx(0.05) and found.bottleneck == "the optimizer"


def test_what_overlaps_is_not_added() -> None:
    assert Times(2.0, 1.0, 1.0, 3.0, 0.5, 0.0, overlaps=True).step == 3.5
    assert Times(2.0, 1.0, 1.0, 3.0, 0.5, 0.0, overlaps=False).step == 5.5
    assert Times(2.0, 1.0, 1.0, 3.0, 0.5, 0.0, overlaps=True).bottleneck == "communication"


def test_small_operations_wait_for_the_host_and_large_ones_for_the_memory() -> None:
    starting = Times(1.0, 4.0, 2.0, 3.0, 0.5, 0.0, overlaps=False)
    assert starting.step == 7.5 and starting.bottleneck == "starting operations"
    moving = Times(1.0, 2.0, 4.0, 3.0, 0.5, 0.0, overlaps=True)
    assert moving.step == 4.5 and moving.bottleneck == "memory traffic"
