"""Bytes of weights, gradients and optimizer by hand, for one small parameter list under each stage."""

from __future__ import annotations

import pytest

from rcpo.config.schema import RunConfig
from rcpo.planner.states import (
    Parameter,
    States,
    flat_elements,
    partition,
    reduced_elements,
    states,
    sub_groups,
)

PARAMETERS = [Parameter("a", 10), Parameter("frozen", 7, trained=False), Parameter("b", 5), Parameter("c", 2)]


def config(stage: int, dtype: str, optimizer: str = "adamw") -> RunConfig:
    run = RunConfig()
    run.engine.stage, run.train.dtype, run.optim.name = stage, dtype, optimizer
    return run


@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        # 17 trained and 7 frozen; two moments of 17 and a step count for each of three tensors
        (0, "fp32", States(4 * 24, 4 * 17, 4 * 2 * 17 + 4 * 3)),
        # runs as ZeRO-1: gradients of 2 bytes, and a buffer of 18 in fp32 that they are added to
        (0, "bf16", States(2 * (18 + 7), 2 * 17 + 4 * 18, 4 * 3 * 6 + 4)),
        (1, "bf16", States(2 * (18 + 7), 2 * 17 + 4 * 18, 4 * 3 * 6 + 4)),
        # one buffer of 17 padded to 18, of which each of 3 ranks updates 6; rank 0's piece lies in `a` alone
        (1, "fp32", States(4 * (18 + 7), 4 * 10, 4 * 3 * 6 + 4)),
        # gradients are added up in fp32, just the 6 of its piece
        (2, "bf16", States(2 * (18 + 7), 4 * 6, 4 * 3 * 6 + 4)),
        # pieces of 4 (of 10), 3 (of 7), 2 (of 5), 1 (of 2)
        (3, "fp32", States(4 * (7 + 3), 4 * 7, 4 * 3 * 7 + 4)),
        (3, "bf16", States(2 * (7 + 3), 4 * 7, 4 * 3 * 7 + 4)),
    ],
)
def test_by_hand_on_three_ranks(stage: int, dtype: str, expected: States) -> None:
    assert states(PARAMETERS, config(stage, dtype), ranks=3) == expected


def test_plain_gradient_descent_keeps_nothing() -> None:
    assert states(PARAMETERS, config(0, "fp32", "sgd"), 1).optimizer == 0
    run = config(0, "fp32", "sgd")
    run.optim.momentum = 0.9
    assert states(PARAMETERS, run, 1).optimizer == 4 * 17


def test_moments_in_8_bits_have_magnitudes_of_blocks_and_a_map_each() -> None:
    large = [Parameter("a", 5000), Parameter("b", 100)]  # 20 blocks; the small one stays in fp32
    eight = config(0, "fp32", "adamw_8bit")
    assert states(large, eight, 1).optimizer == 2 * (5000 + 4 * 20 + 4 * 256 + 4 * 100)
    assert states(large, config(0, "fp32", "paged_adamw_32bit"), 1).optimizer == 2 * 4 * 5100
    eight.engine.stage = 1  # one buffer of 5100 elements beside the weights in fp32
    assert states(large, eight, 1).optimizer == 4 * 5100 + 2 * (5100 + 4 * 20 + 4 * 256)


def test_parameters_at_a_border_are_reduced_on_both_sides() -> None:
    # 17 in two pieces of 10 (padded to 20): a | b c and three of padding
    assert flat_elements([10, 5, 2], 2) == 20
    assert [reduced_elements([10, 5, 2], 2, rank) for rank in (0, 1)] == [10, 5 + 2 + 3]
    # 17 in three pieces of 6: a | a b | b c and one of padding
    assert [reduced_elements([10, 5, 2], 3, rank) for rank in range(3)] == [10, 10 + 5, 5 + 2 + 1]
    # more ranks than elements: the second has one of padding, the last two nothing else
    assert [reduced_elements([3], 4, rank) for rank in range(4)] == [3, 3 + 1, 2, 2]


def test_pieces_and_groups() -> None:
    assert [partition(numel, 4) for numel in (1, 4, 5)] == [1, 1, 2]
    assert sub_groups([10, 10], 1) == 1
    # 600 million a rank each: a group closes once it holds a thousand million
    assert sub_groups([600_000_000] * 4, 1) == 2
