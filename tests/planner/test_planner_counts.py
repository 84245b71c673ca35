"""Operations and bytes of a micro-batch: by hand, and what the sketch and half precision change."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from rcpo.config.schema import RunConfig
from rcpo.method.geometry import ON_GPU
from rcpo.planner.model import few_layers
from rcpo.planner.trace import BatchShape, Live, Work, trace

SHAPE = LlamaConfig(
    vocab_size=4000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS = BatchShape(2, 24, 30, shared=True)


def of_llama(*, sketch: int | None = None, dtype: str = "bf16") -> dict[str, Work]:
    """The two passes of a model of four layers, with the portions that a GPU takes."""
    config = RunConfig()
    config.train.dtype = dtype
    policy = few_layers(SHAPE, config)
    policy.passes = ON_GPU
    found = trace(policy, ROWS, sketch, training=True, depth=4)
    return {"forward": found.forward_work, "backward": found.backward_work}


def test_operations_and_bytes_by_hand() -> None:
    left, right = torch.zeros(3, 4), torch.zeros(4, 5)
    live = Live(iter([left, right]))
    with live:
        product = left @ right  # reads 12 + 20 numbers, writes 15
        product.t().detach()  # views: nothing
        product.relu_()  # reads 15 and writes them
        torch.empty(1000)  # nothing is written
    assert (live.operations, live.moved) == (2, 4 * (12 + 20 + 15) + 4 * (15 + 15))


def test_the_sketch_starts_few_operations_and_reads_the_excess_once() -> None:
    plain, sketched = of_llama(), of_llama(sketch=512)
    assert sketched["backward"].operations - plain["backward"].operations <= 1  # zeros for unused scores
    assert 0 < sketched["forward"].operations - plain["forward"].operations <= 25
    # each of the 8 · 512 columns' sums is added to once for every 4,096 tokens of the vocabulary
    excess = 4 * ROWS.responses * SHAPE.vocab_size
    assert excess < sketched["forward"].bytes - plain["forward"].bytes < 10 * excess


def test_half_precision_moves_about_half_the_bytes_with_few_more_operations() -> None:
    half, full = of_llama(), of_llama(dtype="fp32")
    for phase in ("forward", "backward"):
        assert 0.4 < half[phase].bytes / full[phase].bytes < 0.9
        assert 0 <= half[phase].operations - full[phase].operations < 40
