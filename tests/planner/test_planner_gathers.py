"""ZeRO-3's gathers by hand for three modules; against DeepSpeed itself in test_planner_measured.py."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from rcpo.config.schema import RunConfig
from rcpo.planner.gathers import Event, Gathers, gathers, module_order
from rcpo.planner.model import few_layers, owned
from rcpo.planner.trace import BatchShape

# forward a, b, c, then backward c, b, a; each has one parameter of its name
ORDER = [Event(module, enters) for module in "abc" for enters in (True, False)]
ORDER += [Event(module, enters) for module in "cba" for enters in (True, False)]
OWNED = {module: [module] for module in "abc"}
NUMELS = {"a": 10, "b": 20, "c": 40}
ALL = {"prefetch": 1000, "max_live": 1000, "max_reuse": 1000}


def play(**limits: int) -> Gathers:
    return gathers(ORDER, OWNED, NUMELS, **{**ALL, **limits})


def test_without_limits_each_weight_is_gathered_once() -> None:
    # the first module waits for its own weight, then all others come in one message
    assert play() == Gathers((("a",), ("b", "c")), 70)


def test_without_reuse_weights_are_gathered_for_each_pass() -> None:
    # c ends its forward pass where its backward pass begins, but DeepSpeed has let go of it by then
    found = play(prefetch=0, max_reuse=0)
    assert found == Gathers((("a",), ("b",), ("c",), ("c",), ("b",), ("a",)), 40)


def test_what_is_used_again_soon_stays() -> None:
    # elements that modules have until a weight is used again: c none, b twice c's, a also twice b's
    assert play(prefetch=0, max_reuse=1) == Gathers((("a",), ("b",), ("c",), ("b",), ("a",)), 40)
    assert play(prefetch=0, max_reuse=80) == play(prefetch=0, max_reuse=1)
    assert play(prefetch=0, max_reuse=81) == Gathers((("a",), ("b",), ("c",), ("a",)), 20 + 40)
    assert play(prefetch=0, max_reuse=121) == Gathers((("a",), ("b",), ("c",)), 70)


def test_prefetching_ends_with_the_weight_that_passes_its_limit() -> None:
    assert play(prefetch=1).messages == (("a",), ("b",), ("c",))
    # a and b (30) leave room for no more: c is gathered when its turn comes
    assert play(max_live=30).messages == (("a",), ("b",), ("c",))


def test_pieces_are_padded() -> None:
    assert play().sizes(NUMELS, ranks=3) == {4: 1, 7 + 14: 1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_order_of_four_layers_stands_for_that_of_six(checkpointing: bool) -> None:
    config = RunConfig()
    config.train.gradient_checkpointing = checkpointing
    deep = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2
    )
    rows = BatchShape(1, 8, 4, False)
    short = module_order(few_layers(deep, config), rows, depth=6)
    whole = module_order(few_layers(deep, config, layers=6), rows, depth=6)
    assert short == whole
    assert {event.module for event in whole} <= owned(deep, config).keys()
