"""Moving averages without the bias of their start."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.method.averages import Average


def test_weights_fall_by_the_memory_for_each_step_since() -> None:
    average = Average(0.5)
    assert average.value is None
    assert average.add(8.0) == 8.0
    assert average.add(2.0) == average.value == (0.25 * 8 + 0.5 * 2) / 0.75
    # two steps later: (¼ · (¼·8 + ½·2) + ¾ · 4) / (¼ · ¾ + ¾)
    assert average.add(4.0, steps=2) == pytest.approx((0.25 * 3 + 0.75 * 4) / (0.25 * 0.75 + 0.75))


@given(value=st.floats(-10, 10), memory=st.floats(0, 0.999), count=st.integers(1, 20))
def test_a_constant_is_its_own_average_from_the_first_value_on(
    value: float, memory: float, count: int
) -> None:
    average = Average(memory)
    for _ in range(count):
        assert average.add(value) == pytest.approx(value, abs=1e-9)


def test_a_restored_average_continues_with_the_same_bits() -> None:
    first, second = Average(0.7), Average(0.7)
    first.add(0.3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.add(0.1) == second.add(0.1)


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_a_memory_out_of_range_is_refused(memory: float) -> None:
    with pytest.raises(ValueError, match="memory"):
        Average(memory)


def test_a_value_that_comes_steps_later_has_let_the_others_fade() -> None:
    average = Average(memory=0.5)
    average.add(4.0)
    # three steps later the first has weight ½ · ⅛ = 1/16, the new one 1 − ⅛ = 7/8
    assert average.add(1.0, steps=3) == (4 / 16 + 7 / 8) / (1 / 16 + 7 / 8)
    assert average.state_dict() == [4 / 16 + 7 / 8, 1 / 16 + 7 / 8]
