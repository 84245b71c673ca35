"""Operations and bytes of a micro-batch: extrapolated from two layers and three, and counted with four."""

from __future__ import annotations

from transformers import LlamaConfig

from rcpo.config.schema import RunConfig
from rcpo.planner.counts import Count, counts
from rcpo.planner.model import few_layers
from rcpo.planner.trace import Rows

SHAPE = LlamaConfig(
    vocab_size=4000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS = Rows(2, 24, 30, shared=True)


def of_llama(
    depth: int, *, more: int = 0, sketch: int | None = None, dtype: str = "bf16"
) -> dict[str, Count]:
    """Of a model `depth` deep, from those with 2 and 3 layers and so many `more`."""
    config = RunConfig()
    config.train.dtype = dtype
    return counts(lambda layers: few_layers(SHAPE, config, layers=layers + more), ROWS, sketch, depth=depth)


def test_a_layer_adds_as_much_as_the_one_before() -> None:
    assert of_llama(4) == of_llama(2, more=2)


def test_the_sketch_starts_few_operations_and_reads_the_excess_once() -> None:
    plain, sketched = of_llama(2), of_llama(2, sketch=512)
    assert sketched["backward"].operations - plain["backward"].operations <= 1  # zeros for unused scores
    assert 0 < sketched["forward"].operations - plain["forward"].operations <= 25
    # each of the 8 · 512 columns' sums is added to once for every 4,096 tokens of the vocabulary
    excess = 4 * ROWS.responses * SHAPE.vocab_size
    assert excess < sketched["forward"].bytes - plain["forward"].bytes < 10 * excess


def test_half_precision_moves_about_half_the_bytes_with_few_more_operations() -> None:
    half, full = of_llama(4), of_llama(4, dtype="fp32")
    for phase in ("forward", "backward"):
        assert 0.4 < half[phase].bytes / full[phase].bytes < 0.9
        assert 0 <= half[phase].operations - full[phase].operations < 40
